-- Creates a task with an Idempotency-Key. The first request claims the key and creates the task; a
-- concurrent copy waits for it and returns the same values. A key more than a day old can be claimed
-- again.
-- $1 user id, $2 task id, $3 title, $4 description, $5 completed, $6 the time that the id contains,
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
), list as (
    update task_lists set revision = revision + 1, tasks = tasks + 1
    where user_id = $1 and exists (select from claim where task_id = $2)
    returning revision
), task as (
    insert into tasks (user_id, id, title, description, completed, created_at, updated_at, revision)
    select $1, task_id, title, description, completed, created_at, created_at, revision
    from claim, list
)
select task_id as id, $1::uuid as user_id, title, description, completed,
       created_at, created_at as updated_at, (select revision from list) as revision
from claim
