-- Turns a pending registration into an account with a verified address. No row if the registration was
-- replaced meanwhile; `is_created` is false if an account has taken the address.
-- $1 user id, $2 the hash that the token is bound to, $3 the hash to store
with pending as (
    delete from pending_registrations where id = $1 and password_hash = $2
    returning id, email
), account as (
    insert into users (id, email, password_hash, email_verified, created_at, updated_at)
    select id, email, $3, true, now(), now() from pending
    on conflict (email) do nothing
    returning id
), cleared as (
    delete from login_failures where account = (select email from pending)
)
select exists (select from account) as is_created from pending
