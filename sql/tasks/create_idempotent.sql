-- A new task under an Idempotency-Key: whoever comes first claims the key and makes the task, a
-- copy waits for that and gets what was made. A key a day old is claimed anew.
-- $1 user id, $2 task id, $3 title, $4 description, $5 completed, $6 the time that the id carries,
-- $7 key
with claim as (
    insert into idempotency_keys as k (user_id, key, task_id, title, description, completed, created_at)
    values ($1, $7, $2, $3, $4, $5, $6)
    on conflict (user_id, key) do update
    set (task_id, title, description, completed, created_at) = (
        select (w).task_id, (w).title, (w).description, (w).completed, (w).created_at
        from (select case when k.created_at < clock_timestamp() - interval '24 hours'
                          then excluded else k end as w) winner)
    returning task_id, title, description, completed, created_at
), task as (
    insert into tasks (user_id, id, title, description, completed, created_at, updated_at)
    select $1, task_id, title, description, completed, created_at, created_at
    from claim
    where task_id = $2
)
select task_id as id, $1::uuid as user_id, title, description, completed,
       created_at, created_at as updated_at
from claim
