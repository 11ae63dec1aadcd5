-- Replaces the hash that was verified and clears the failed confirmations of the user; no row if the
-- password was changed or a lockout began meanwhile.
-- $1 user id, $2 the hash that was verified, $3 the new hash
with account as (
    update users
    set password_hash = $3,
        updated_at = greatest(clock_timestamp(), updated_at + interval '1 microsecond')
    where id = $1 and password_hash = $2
      and not exists (
          select from login_failures
          where account = $1::text and network = 'session' and blocked_until > clock_timestamp())
    returning id, email, created_at, updated_at
), cleared as (
    delete from login_failures where account = (select id::text from account) and network = 'session'
)
select id, email, created_at, updated_at from account
