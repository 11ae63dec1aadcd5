-- Revocations are read by transaction instead of by time, tokens of a session can be revoked without
-- ending it, and the number of sessions of an account is limited.

-- The transaction that wrote the revocation. A timestamp would tell when the revocation was
-- written, not when it became visible. The oldest open transaction is an exact limit.
alter table revocations add column xid xid8 not null default pg_current_xact_id();
create index revocations_by_xid on revocations (xid);

-- The generation of refresh tokens with which the last password change started, or 0. Tokens of
-- earlier epochs are revoked.
alter table sessions add column epoch integer not null default 0;
-- Tokens of epochs before this one are revoked; by default, all tokens.
alter table revocations add column before_epoch integer not null default 2147483647;

-- Replaces the function, because a session may already have a revocation of its earlier epochs.
create or replace function record_ended_sessions() returns trigger language plpgsql as $$
begin
    insert into revocations (session_id, ended_at)
    select id, clock_timestamp() from ended where expires_at > clock_timestamp() - interval '1 day'
    on conflict (session_id) do update
    set ended_at = excluded.ended_at, xid = excluded.xid, before_epoch = excluded.before_epoch;
    return null;
end
$$;

-- Ends the least recently used sessions of an account beyond `most`, including the new one, and
-- returns them. A volatile function takes its snapshot when it is called. The caller has locked the
-- account by then, so the function sees the sessions of all previous logins.
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
