-- Creates a task with an Idempotency-Key. The first request claims the key and creates the task; a
-- concurrent copy waits for it and returns the same values. A key more than a day old can be
-- claimed again. Returns no row, and claims nothing, if the account was deleted or has the maximum
-- number of tasks.
-- $1 user id, $2 task id, $3 title, $4 description, $5 completed, $6 the time that the id contains,
-- $7 the maximum number of tasks, $8 key
with list as (
    select revision + 1 as revision, tasks from task_lists where user_id = $1
    for no key update
), claim as (
    insert into idempotency_keys as k (user_id, key, task_id, title, description, completed, created_at)
    select $1, $8::text, $2, $3, $4, $5, $6
    from list
    where tasks < $7 or was_key_used($1, $8)
    on conflict (user_id, key) do update
    set (task_id, title, description, completed, created_at) = (
        select (w).task_id, (w).title, (w).description, (w).completed, (w).created_at
        from (select case when k.created_at < clock_timestamp() - interval '24 hours'
                          then excluded else k end as w) winner)
    returning task_id, title, description, completed, created_at
), created as (
    insert into tasks (user_id, id, title, description, completed, created_at, updated_at, revision)
    select $1, task_id, title, description, completed, created_at, created_at, revision
    from claim, list
    where task_id = $2
    returning revision
), raised as (
    update task_lists l set revision = created.revision, tasks = tasks + 1
    from created
    where l.user_id = $1
)
select task_id as id, title, description, completed,
       created_at, created_at as updated_at, (select revision from created) as revision
from claim
