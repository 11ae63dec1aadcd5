-- Accounts, tasks, sessions, and their protection. The check constraints repeat the service's
-- validation, as a second line of defense.

create table users (
    id            uuid         primary key,
    email         varchar(254) not null unique
                  check (email ~ '^[^@]+@[^@]+$' and email !~ '[A-Z]' and octet_length(email) <= 254),
    -- A bcrypt hash: 60 ASCII characters that start with `$2b$` and the cost.
    password_hash varchar(60)  not null check (length(password_hash) = 60),
    created_at    timestamptz  not null,
    updated_at    timestamptz  not null
);

-- The key starts with the owner: a user's tasks are stored together, newest-first is the same index
-- backwards (ids are UUIDv7), and the table can be distributed by `user_id`.
create table tasks (
    user_id     uuid          not null references users (id) on delete cascade,
    id          uuid          not null,
    title       varchar(200)  not null
                -- Not empty, without Unicode white space at either end.
                check (title <> '' and title = btrim(title,
                    U&' \0009\000A\000B\000C\000D\0085\00A0\1680\2000\2001\2002\2003\2004\2005\2006\2007\2008\2009\200A\2028\2029\202F\205F\3000')),
    description varchar(1000),
    completed   boolean       not null,
    created_at  timestamptz   not null,
    updated_at  timestamptz   not null check (updated_at >= created_at),
    primary key (user_id, id)
);

-- The active sessions. `generation` counts the refresh tokens of a session; only the newest one is
-- valid. The tokens themselves are not stored.
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

-- Sessions that ended while one of their access tokens may still be valid. No foreign key, because
-- these rows outlive the session and the account.
create table revocations (
    session_id uuid        primary key,
    ended_at   timestamptz not null
);
create index revocations_by_end on revocations (ended_at);

-- Writes the revocation of a session however it ends: by a logout, a password change, the cascade of
-- a deleted account, or an operator's `delete from sessions`. A session that expired is purged a day
-- later, when its access tokens have expired as well, and needs no revocation.
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

-- Consecutive wrong passwords by address, whether or not there is an account.
create table sign_in_failures (
    email           varchar(254) primary key,
    failures        integer      not null,
    last_failure_at timestamptz  not null,
    blocked_until   timestamptz
);
create index sign_in_failures_by_time on sign_in_failures (last_failure_at);

-- The tasks that requests with an Idempotency-Key created, with their original values.
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
