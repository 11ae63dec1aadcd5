-- What checking the password of somebody signed in needs; no row if the account is gone.
-- $1 user id
select u.email, u.password_hash,
       coalesce(extract(epoch from f.blocked_until - clock_timestamp()), 0)::float8 as wait
from users u
left join sign_in_failures f on f.email = u.email
where u.id = $1
