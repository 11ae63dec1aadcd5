-- People, their tasks, their sessions, and what protects them. The checks repeat the rules
-- that the service enforces at its edge: the last gate is the database.

create table users (
    id            uuid         primary key,
    email         varchar(254) not null unique
                  check (email ~ '^[^@]+@[^@]+$' and email !~ '[A-Z]' and octet_length(email) <= 254),
    -- A bcrypt hash is 60 characters of ASCII, `$2b$` and the cost in front.
    password_hash varchar(60)  not null check (length(password_hash) = 60),
    created_at    timestamptz  not null,
    updated_at    timestamptz  not null
);

-- The key leads with the owner: a user's tasks lie together, newest first is this index read
-- backwards (ids are UUIDv7), and the table can be distributed by `user_id` as it stands.
create table tasks (
    user_id     uuid          not null references users (id) on delete cascade,
    id          uuid          not null,
    title       varchar(200)  not null
                -- Not empty, and no white space (Unicode's) at either end.
                check (title <> '' and title = btrim(title,
                    U&' \0009\000A\000B\000C\000D\0085\00A0\1680\2000\2001\2002\2003\2004\2005\2006\2007\2008\2009\200A\2028\2029\202F\205F\3000')),
    description varchar(1000),
    completed   boolean       not null,
    created_at  timestamptz   not null,
    updated_at  timestamptz   not null check (updated_at >= created_at),
    primary key (user_id, id)
);

-- The sessions that are alive. `generation` counts the refresh tokens of a session; only the
-- newest is good, so there is nothing here that a thief could use.
create table sessions (
    id           uuid         primary key,
    user_id      uuid         not null references users (id) on delete cascade,
    generation   integer      not null check (generation > 0),
    rotated_at   timestamptz  not null,
    created_at   timestamptz  not null,
    last_used_at timestamptz  not null,
    expires_at   timestamptz  not null,
    user_agent   varchar(200)
);
create index sessions_by_user on sessions (user_id, id);
create index sessions_by_expiry on sessions (expires_at);

-- What ended while an access token of it may still be alive. No foreign key: these rows outlive
-- the session and the account.
create table revocations (
    session_id uuid        primary key,
    ended_at   timestamptz not null
);
create index revocations_by_end on revocations (ended_at);

-- However a session ends (sign-out, a changed password, a deleted account and the cascade that
-- follows it, an operator's `delete from sessions`), its revocation is written with it. A session
-- that ran out of time by itself leaves its last access token to that token's own end; it is swept
-- a day later, when no access token of it can be alive, and that needs no revocation.
create function record_ended_sessions() returns trigger language plpgsql as $$
begin
    insert into revocations (session_id, ended_at)
    select id, clock_timestamp() from ended where expires_at > clock_timestamp() - interval '1 day'
    on conflict do nothing;
    return null;
end
$$;
create trigger record_ended_sessions after delete on sessions
    referencing old table as ended
    for each statement execute function record_ended_sessions();

-- Wrong passwords in a row by address, whether or not an account has that address.
create table sign_in_failures (
    email           varchar(254) primary key,
    failures        integer      not null,
    last_failure_at timestamptz  not null,
    blocked_until   timestamptz
);
create index sign_in_failures_by_time on sign_in_failures (last_failure_at);

-- What a create with an Idempotency-Key made, as it was made.
create table idempotency_keys (
    user_id     uuid          not null references users (id) on delete cascade,
    key         varchar(255)  not null,
    task_id     uuid          not null,
    title       varchar(200)  not null,
    description varchar(1000),
    completed   boolean       not null,
    created_at  timestamptz   not null,
    primary key (user_id, key)
);
create index idempotency_keys_by_time on idempotency_keys (created_at);
