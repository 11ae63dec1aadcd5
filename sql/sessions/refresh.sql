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
)
select id, email, email_verified, created_at, updated_at, generation, epoch, expires_in,
       record_network(id, $6)
from session
