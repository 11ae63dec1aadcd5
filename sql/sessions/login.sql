-- Creates a session for a user whose password was verified, clears the failures from this network,
-- records the network, replaces an outdated hash, and ends the least recently used sessions beyond a
-- hundred. Returns no row if the password was changed, the account deleted or disabled, or a lockout
-- began meanwhile. The row lock serializes logins with each other and with password changes.
-- $1 user id, $2 the hash that was verified, $3 the hash to store, $4 session id, $5 seconds of
-- inactivity until the session expires, $6 user agent, $7 network
with account as (
    select id, email, email_verified, created_at, updated_at from users u
    where id = $1 and password_hash = $2 and disabled_at is null
      and not exists (
          select from login_failures f
          where f.account = u.email
            and f.network = any(array[$7, case when not exists (
                select from login_networks n
                where n.user_id = u.id and n.network = $7
                  and n.last_used_at > clock_timestamp() - interval '30 days') then '*' end])
            and f.blocked_until > clock_timestamp())
    for no key update
), rehashed as (
    update users u set password_hash = $3
    from account a
    where u.id = a.id and u.password_hash = $2 and $3 <> $2
), cleared as (
    delete from login_failures where account = (select email from account) and network = $7
), session as (
    insert into sessions (id, user_id, generation, rotated_at, created_at, last_used_at, expires_at, user_agent)
    select $4, id, 1, clock_timestamp(), clock_timestamp(), clock_timestamp(),
           clock_timestamp() + $5::float8 * interval '1 second', $6
    from account
)
select id, email, email_verified, created_at, updated_at, record_network(id, $7),
       end_surplus_sessions(id, $4, 100) as ended_ids
from account
