-- Replaces the password hash and clears the failed confirmations of the user. A reset also clears all
-- lockouts of the account, which do not prevent it. No row if the hash or the address was changed or, unless
-- it is a reset, a lockout began meanwhile.
-- $1 user id, $2 the hash that was verified, or null, $3 the new hash, $4 whether it is a reset, $5 the
-- address to which the token of the reset was sent, which counts as verified, or null
with account as (
    update users
    set password_hash = $3,
        email_verified = email_verified or $5::text is not null,
        updated_at = greatest(clock_timestamp(), updated_at + interval '1 microsecond')
    where id = $1 and password_hash = coalesce($2, password_hash) and email = coalesce($5, email)
      and ($4 or not exists (
          select from login_failures
          where account = $1::text and network = 'session' and blocked_until > clock_timestamp()))
    returning id, email, email_verified, created_at, updated_at
), cleared as (
    delete from login_failures f
    using account a
    where (f.account = a.id::text and f.network = 'session') or ($4 and f.account = a.email)
)
select id, email, email_verified, created_at, updated_at from account
