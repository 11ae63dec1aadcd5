-- Counts a failed attempt for its network and, if the account does not use that network, for all
-- unused networks together. After the tenth consecutive failure, a network is locked out for 30 s,
-- doubling with each further failure up to an hour; after the hundredth, unused networks are locked
-- out for a day. If a lockout began while this attempt was being verified, the attempt does not count,
-- and the row contains the seconds until that lockout ends; otherwise 0.
-- $1 the e-mail address, or the user id of an authenticated user, $2 the network, or 'session'
with counters as (
    select $2::text as network
    union all
    select '*'
    where $2 <> 'session'
      and not exists (
          select from users u
          join login_networks n on n.user_id = u.id
          where u.email = $1 and n.network = $2
            and n.last_used_at > clock_timestamp() - interval '30 days')
), counted as (
    insert into login_failures as f (account, network, failures, last_failure_at)
    select $1, network, 1, clock_timestamp() from counters
    on conflict (account, network) do update
    set failures = case when f.last_failure_at < clock_timestamp() - interval '24 hours'
                        then 1 else f.failures + 1 end,
        last_failure_at = clock_timestamp(),
        blocked_until = clock_timestamp()
            + case when f.last_failure_at < clock_timestamp() - interval '24 hours' then null
                   when f.network = '*' and f.failures >= 99 then interval '24 hours'
                   when f.network <> '*' and f.failures >= 9
                   then least(30 * power(2, least(f.failures - 9, 7)), 3600) * interval '1 second'
              end
    where f.blocked_until is null or f.blocked_until <= clock_timestamp()
    returning network
)
select case when (select count(*) from counted) = (select count(*) from counters) then 0
            -- A lockout that has just begun is not visible to this snapshot.
            else coalesce(greatest(1, (
                select extract(epoch from max(f.blocked_until) - clock_timestamp())
                from login_failures f
                where f.account = $1 and f.network in (select network from counters))), 1)
       end::float8 as retry_after_secs
