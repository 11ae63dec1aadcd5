-- Failed logins are counted by account and client network, and, with one count, for all networks
-- that the account does not use. E-mail addresses are compared in NFC, with Unicode's simple case
-- folding and without invisible characters.

-- `sign_in_failures` stays for the previous release.
create table login_failures (
    -- The address of a login, registered or not, or the user id of an authenticated user who confirms
    -- a change.
    account         text        not null,
    -- An IPv4 address or the first address of an IPv6 /64; `*` for all networks that the account does
    -- not use; `session` for confirmations of an authenticated user.
    network         text        not null,
    failures        integer     not null,
    last_failure_at timestamptz not null,
    blocked_until   timestamptz,
    primary key (account, network)
);
create index login_failures_by_time on login_failures (last_failure_at);

-- The networks from which an account registered, logged in or refreshed. `last_used_at` may be up to
-- an hour behind.
create table login_networks (
    user_id      uuid        not null references users (id) on delete cascade,
    network      text        not null,
    last_used_at timestamptz not null,
    primary key (user_id, network)
);
create index login_networks_by_time on login_networks (last_used_at);

-- Converts the stored addresses to the form that logins now look up. Two accounts whose addresses
-- would become equal keep them, and only the account whose address has the new form can log in.
with renamed as (
    select distinct on (address) id, address
    from users,
         normalize(regexp_replace(email,
             '[\u00AD\u034F\u061C\u115F\u1160\u17B4\u17B5\u180B-\u180F\u200B-\u200F\u202A-\u202E\u2060-\u206F\u3164\uFE00-\uFE0F\uFEFF\uFFA0\uFFF0-\uFFF8\U0001BCA0-\U0001BCA3\U0001D173-\U0001D17A\U000E0000-\U000E0FFF]',
             '', 'g'), nfc) as visible,
         -- The lower-case letters that folding changes, such as long s, micro sign and final sigma.
         normalize(translate(visible,
             U&'\00B5\017F\0345\03C2\03D0\03D1\03D5\03D6\03F0\03F1\03F5\1C80\1C81\1C82\1C83\1C84\1C85\1C86\1C87\1C88\1E9B',
             U&'\03BC\0073\03B9\03C3\03B2\03B8\03C6\03C0\03BA\03C1\03B5\0432\0434\043E\0441\0442\0442\044A\0463\A64B\1E61'), nfc) as address
    where email ~ '[^\u0001-\u007F]' and address <> email
    order by address, id
)
update users u
set email = r.address
from renamed r
where u.id = r.id
  and r.address ~ '^[^@]+@[^@]+$' and octet_length(r.address) <= 254
  and not exists (select from users taken where taken.email = r.address);
