-- Reads an account.
-- $1 user id
select id, email, email_verified, created_at, updated_at from users where id = $1
