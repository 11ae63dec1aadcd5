-- What a sign-in needs: always one row, with the account where there is one and the seconds for
-- which attempts on this address, known or not, are refused.
-- $1 e-mail
select u.id, u.password_hash,
       coalesce(extract(epoch from f.blocked_until - clock_timestamp()), 0)::float8 as wait
from (select $1::varchar as email) asked
left join users u on u.email = asked.email
left join sign_in_failures f on f.email = asked.email
