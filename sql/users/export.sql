-- Reads everything that is stored about a user, except password hashes, as one JSON document; no row if
-- there is no such account.
-- $1 user id
select json_build_object(
    'user', to_jsonb(u) - 'password_hash',
    'task_lists', (select json_agg(t) from task_lists t where t.user_id = $1),
    'tasks', (select json_agg(t order by t.id) from tasks t where t.user_id = $1),
    'deleted_tasks', (select json_agg(t) from deleted_tasks t where t.user_id = $1),
    'sessions', (select json_agg(t) from sessions t where t.user_id = $1),
    'login_networks', (select json_agg(t) from login_networks t where t.user_id = $1),
    'login_failures', (select json_agg(t) from login_failures t where t.account in (u.email, $1::text)),
    'sign_in_failures', (select json_agg(t) from sign_in_failures t where t.email = u.email),
    'pending_registrations', (select json_agg(to_jsonb(t) - 'password_hash') from pending_registrations t
                              where t.email = u.email),
    'mail_requests', (select json_agg(t) from mail_requests t where t.email = u.email),
    'idempotency_keys', (select json_agg(t) from idempotency_keys t where t.user_id = $1)
)::text as document
from users u
where u.id = $1
