-- Disables an account, or enables it again; no row if there is no such account.
-- $1 user id, $2 whether the account is to be disabled
update users set disabled_at = case when $2 then coalesce(disabled_at, clock_timestamp()) end
where id = $1
returning id
