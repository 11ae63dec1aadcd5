-- Reads the account and the lockout of an authenticated user; no row if the account was deleted.
-- $1 user id
select u.id, u.email, u.password_hash, u.email_verified, false as is_pending,
       coalesce(extract(epoch from f.blocked_until - clock_timestamp()), 0)::float8
           as retry_after_secs
from users u
left join login_failures f on f.account = u.id::text and f.network = 'session'
where u.id = $1
