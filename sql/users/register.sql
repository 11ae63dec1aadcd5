-- Creates an account with its first session and network; no row if the address is taken.
-- $1 user id, $2 e-mail address, $3 password hash, $4 session id, $5 seconds of inactivity until the
-- session expires, $6 user agent, $7 network
with account as (
    insert into users (id, email, password_hash, created_at, updated_at)
    values ($1, $2, $3, now(), now())
    on conflict (email) do nothing
    returning id, email, email_verified, created_at, updated_at
), session as (
    insert into sessions (id, user_id, generation, rotated_at, created_at, last_used_at, expires_at, user_agent)
    select $4, id, 1, now(), now(), now(), now() + $5::float8 * interval '1 second', $6
    from account
), network as (
    insert into login_networks (user_id, network, last_used_at)
    select id, $7, now() from account
)
select id, email, email_verified, created_at, updated_at from account
