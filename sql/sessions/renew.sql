-- Part of a password change: ends every session of a user except one, and starts a new epoch in that
-- session, which revokes its earlier tokens. Always returns one row; its last three columns are null if
-- there is no session to keep.
-- $1 user id, $2 the session to keep or null, $3 seconds of inactivity until the session expires,
-- $4 its total seconds
with ended as (
    delete from sessions where user_id = $1 and id is distinct from $2 returning id
), renewed as (
    update sessions
    -- Skips a generation, so that the grace period covers only a token that was never issued.
    set generation = generation + 2,
        epoch = generation + 2,
        last_used_at = clock_timestamp(),
        expires_at = greatest(clock_timestamp() + interval '1 second',
                              least(created_at + $4::float8 * interval '1 second',
                                    clock_timestamp() + $3::float8 * interval '1 second'))
    where user_id = $1 and id = $2
    returning id, generation, epoch, expires_at
), revoked as (
    insert into revocations (session_id, ended_at, before_epoch)
    select id, clock_timestamp(), epoch from renewed
    on conflict (session_id) do update
    set ended_at = excluded.ended_at, xid = excluded.xid, before_epoch = excluded.before_epoch
)
select (select coalesce(array_agg(id), '{}') from ended) as ended_ids,
       generation, epoch, extract(epoch from expires_at - clock_timestamp())::float8 as expires_in
from (select) one_row left join renewed on true
