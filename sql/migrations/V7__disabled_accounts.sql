-- An operator can disable an account: it keeps its data, but logins and refreshes are refused.

-- When the account was disabled; null if it is enabled. The previous release ignores it.
alter table users add column disabled_at timestamptz;
