-- Revocations are read by transaction instead of by time, tokens of a session can be revoked while
-- the session goes on, and an account has a limited number of sessions.

-- The transaction that wrote the revocation. Its time says when it was written, not when it became
-- visible; "every transaction below the oldest one still open" is exact.
alter table revocations add column xid xid8 not null default pg_current_xact_id();
create index revocations_by_xid on revocations (xid);

-- A session's epoch is the generation of refresh tokens that its last change of password started
-- with, 0 without one. Tokens of earlier epochs are revoked.
alter table sessions add column epoch integer not null default 0;
-- Tokens of epochs before this are revoked. The default is all of them.
alter table revocations add column before_epoch integer not null default 2147483647;

-- As before; but a session that ends may have a revocation of its earlier epochs.
create or replace function record_ended_sessions() returns trigger language plpgsql as $$
begin
    insert into revocations (session_id, ended_at)
    select id, clock_timestamp() from ended where expires_at > clock_timestamp() - interval '1 day'
    on conflict (session_id) do update
    set ended_at = excluded.ended_at, xid = excluded.xid, before_epoch = excluded.before_epoch;
    return null;
end
$$;

-- Ends the least recently used sessions of an account so that `most` are alive at the most, the new
-- one included, and returns them. A function, because its snapshot is taken when it is called: the
-- caller holds the lock on the account by then, so it counts the sessions of every login before.
create function end_surplus_sessions(account uuid, new_session uuid, most integer) returns uuid[]
language sql volatile as $$
    with ended as (
        delete from sessions
        where user_id = account and id in (
            select id from sessions
            where user_id = account and id <> new_session and expires_at > clock_timestamp()
            order by last_used_at desc, id desc
            offset most - 1)
        returning id
    )
    select coalesce(array_agg(id), '{}') from ended
$$;
