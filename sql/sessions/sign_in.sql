-- Makes a session for somebody whose password was verified, forgets the wrong attempts, renews an
-- old hash and ends the sessions used least recently beyond a hundred; no row if the password was
-- changed or the account deleted meanwhile. The row lock makes a change of password, and another
-- login that counts sessions, wait for us or us for them.
-- $1 user id, $2 the hash that was verified, $3 the hash to keep, $4 session id,
-- $5 seconds until the session idles out, $6 user agent
with person as (
    select id, email, created_at, updated_at from users
    where id = $1 and password_hash = $2
    for no key update
), renewed as (
    update users u set password_hash = $3
    from person p
    where u.id = p.id and u.password_hash = $2 and $3 <> $2
), cleared as (
    delete from sign_in_failures where email = (select email from person)
), session as (
    insert into sessions (id, user_id, generation, rotated_at, created_at, last_used_at, expires_at, user_agent)
    select $4, id, 1, clock_timestamp(), clock_timestamp(), clock_timestamp(),
           clock_timestamp() + $5::float8 * interval '1 second', $6
    from person
)
select id, email, created_at, updated_at, end_surplus_sessions(id, $4, 100) as ended_ids
from person
