-- Clears every lockout of an account.
-- $1 user id
delete from login_failures f
using users u
where u.id = $1 and f.account in (u.email, u.id::text)
