-- Rotates a refresh token and records the network. The newest token advances the session; within the
-- grace period, the previous token returns the same successor again; any other token returns no row.
-- $1 session id, $2 the token's generation, $3 grace seconds, $4 seconds of inactivity until the
-- session expires, $5 its total seconds, $6 network
with session as (
    update sessions s
    set generation = $2 + 1,
        rotated_at = case when s.generation = $2 then clock_timestamp() else s.rotated_at end,
        last_used_at = clock_timestamp(),
        expires_at = least(s.created_at + $5::float8 * interval '1 second',
                           clock_timestamp() + $4::float8 * interval '1 second')
    from users u
    where s.id = $1
      and u.id = s.user_id and u.disabled_at is null
      and s.expires_at > clock_timestamp()
      and (s.generation = $2
           or (s.generation = $2 + 1
               and s.rotated_at > clock_timestamp() - $3::float8 * interval '1 second'))
    returning u.id, u.email, u.email_verified, u.created_at, u.updated_at, s.generation, s.epoch,
              extract(epoch from s.expires_at - clock_timestamp())::float8 as expires_in
), recorded as (
    -- Updated at most once an hour.
    insert into login_networks (user_id, network, last_used_at)
    select id, $6, clock_timestamp() from session
    where not exists (
        select from login_networks n
        where n.user_id = session.id and n.network = $6
          and n.last_used_at > clock_timestamp() - interval '1 hour')
    on conflict (user_id, network) do update set last_used_at = excluded.last_used_at
    returning user_id
), evicted as (
    -- Evicts the least recently used network if there are already a hundred.
    delete from login_networks n
    using recorded, lateral (
        select min(known.last_used_at) as last_used_at from login_networks known
        where known.user_id = recorded.user_id
        having count(*) >= 100) oldest
    where n.user_id = recorded.user_id and n.last_used_at = oldest.last_used_at and n.network <> $6
)
select id, email, email_verified, created_at, updated_at, generation, epoch, expires_in from session
