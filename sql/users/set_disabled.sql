-- Disables an account and ends its sessions, or enables it again; no row if there is no such account.
-- $1 user id, $2 whether the account is to be disabled
update users set disabled_at = case when $2 then coalesce(disabled_at, clock_timestamp()) end
where id = $1
returning case when $2 then end_other_sessions(id, null) else '{}' end as ended_ids
