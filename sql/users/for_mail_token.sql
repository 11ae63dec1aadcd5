-- Reads the account or the pending registration to which a token was sent by mail.
-- $1 user id
select id, email, password_hash, email_verified, false as is_pending from users where id = $1
union all
select id, email, password_hash, false, true from pending_registrations where id = $1
