-- Reads accounts for an operator, in the order of their addresses: at most $2, from $1 on.
-- $1 e-mail address, $2 limit
select u.id, u.email, u.email_verified, u.created_at, u.updated_at, u.disabled_at, list.tasks,
       (select count(*) from sessions s where s.user_id = u.id and s.expires_at > now()) as sessions,
       (select max(n.last_used_at) from login_networks n where n.user_id = u.id) as last_used_at,
       (select max(f.blocked_until) from login_failures f
        where f.account in (u.email, u.id::text) and f.blocked_until > now()) as locked_until
from users u
join task_lists list on list.user_id = u.id
where u.email >= $1
order by u.email
limit $2
