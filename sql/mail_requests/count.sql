-- Counts a mail to an address, known or not. Returns no row if three mails were requested within the last
-- hour; otherwise the account or else the pending registration, whose columns are null if there is neither.
-- $1 e-mail address
with counted as (
    insert into mail_requests as m (email, latest_at) values ($1, clock_timestamp())
    on conflict (email) do update
    set latest_at = excluded.latest_at, second_at = m.latest_at, third_at = m.second_at
    where m.third_at is null or m.third_at < clock_timestamp() - interval '1 hour'
    returning email
)
select coalesce(u.id, p.id) as id, c.email, coalesce(u.password_hash, p.password_hash) as password_hash,
       coalesce(u.email_verified, false) as email_verified, u.id is null as is_pending
from counted c
left join users u on u.email = c.email
left join pending_registrations p on p.email = c.email
