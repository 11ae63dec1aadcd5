-- Verified addresses, registrations that wait for their verification, and quotas of mails.

alter table users add column email_verified boolean not null default false;

-- Registrations while verification is required. There is one for each address, whether or not an
-- account has it, so that neither the response of the registration nor a later login with this
-- password reveals the account. The verification turns the row into an account with this id.
create table pending_registrations (
    email         varchar(254) primary key,
    id            uuid         not null unique,
    password_hash varchar(60)  not null check (length(password_hash) = 60),
    registered_at timestamptz  not null
);
create index pending_registrations_by_time on pending_registrations (registered_at);

-- The times of the last three mails that were requested for an address, known or not.
create table mail_requests (
    email     varchar(254) primary key,
    latest_at timestamptz  not null,
    second_at timestamptz,
    third_at  timestamptz
);
create index mail_requests_by_time on mail_requests (latest_at);
