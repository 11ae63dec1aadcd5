-- Reads the account for a login. Always returns one row: the account, if it exists, the hash of a pending
-- registration, and the seconds until logins with this address, registered or not, are accepted from this
-- network again.
-- $1 e-mail address, $2 network
select u.id, u.email, u.password_hash, u.email_verified, false as is_pending,
       u.disabled_at is not null as is_disabled, p.password_hash as pending_hash,
       coalesce((
           select extract(epoch from max(f.blocked_until) - clock_timestamp())
           from login_failures f
           where f.account = request.email
             and f.network = any(array[$2, case when n.user_id is null then '*' end])), 0)::float8
           as retry_after_secs
from (select $1::text as email) request
left join users u on u.email = request.email
left join pending_registrations p on p.email = request.email
left join login_networks n
       on n.user_id = u.id and n.network = $2
      and n.last_used_at > clock_timestamp() - interval '30 days'
