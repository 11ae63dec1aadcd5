-- Deletes an account and, by cascade, its tasks, keys and sessions; a trigger writes the revocations.
-- Returns no row if the password was changed or a lockout began meanwhile; neither prevents an operator.
-- Keeps the failed logins with the address, because clearing them would reveal that the account existed;
-- an operator clears them. Locks the list first, as every change of its tasks does.
-- $1 user id, $2 the hash that was verified; null for an operator
with list as (
    select user_id from task_lists where user_id = $1 for update
), account as (
    delete from users
    using list
    where id = list.user_id
    and ($2::text is null or (password_hash = $2 and not exists (
        select from login_failures
        where account = $1::text and network = 'session' and blocked_until > clock_timestamp())))
    returning id, email
), cleared as (
    delete from login_failures f
    using account a
    where (f.account = a.id::text and f.network = 'session') or ($2 is null and f.account = a.email)
)
select (select coalesce(array_agg(s.id), '{}') from sessions s where s.user_id = $1) as session_ids
from account
