-- After a change of password: ends every session of a user but one, and starts a new epoch in that
-- one, so that its tokens from before are revoked. One row always; the last three columns are null
-- if there is no session to keep.
-- $1 user id, $2 the session to keep, null for none, $3 idle seconds, $4 seconds in all
with ended as (
    delete from sessions where user_id = $1 and id is distinct from $2 returning id
), renewed as (
    update sessions
    -- Two generations on: the grace time for the token before the newest reaches no further back
    -- than to one that was never issued.
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
from (select) always left join renewed on true
