-- Failed logins are counted by account and client network, and over all networks that the account
-- does not use.

-- `sign_in_failures` stays for the previous binary; nothing else reads it.
create table login_failures (
    -- The address of a login, whether or not an account has it; the user id where a signed-in user
    -- confirms a change.
    account         text        not null,
    -- An IPv4 address or the first address of an IPv6 /64. `*` counts all networks that the account
    -- does not use, `session` the confirmations of a signed-in user.
    network         text        not null,
    failures        integer     not null,
    last_failure_at timestamptz not null,
    blocked_until   timestamptz,
    primary key (account, network)
);
create index login_failures_by_time on login_failures (last_failure_at);

-- The networks from which somebody registered, logged in or refreshed; `last_used_at` is up to an
-- hour late.
create table login_networks (
    user_id      uuid        not null references users (id) on delete cascade,
    network      text        not null,
    last_used_at timestamptz not null,
    primary key (user_id, network)
);
create index login_networks_by_time on login_networks (last_used_at);
