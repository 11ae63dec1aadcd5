-- Creates a task with an Idempotency-Key. The first request claims the key and creates the task; a
-- concurrent copy waits for it and returns the same values. A key more than a day old can be
-- claimed again. Returns no row, and claims nothing, if the account was deleted or has the maximum
-- number of tasks, which concurrent requests can exceed.
-- $1 user id, $2 task id, $3 title, $4 description, $5 completed, $6 the time that the id contains,
-- $7 the maximum number of tasks, $8 key, $9 whether to delete the user's oldest keys beyond 10,000
with claim as (
    insert into idempotency_keys as k (user_id, key, task_id, title, description, completed, created_at)
    select $1, $8::text, $2, $3, $4, $5, $6
    from task_lists l
    where l.user_id = $1
      and (l.tasks < $7 or exists (
          select from idempotency_keys
          where user_id = $1 and key = $8 and created_at >= clock_timestamp() - interval '24 hours'))
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
), trim as (
    delete from idempotency_keys
    where $9 and user_id = $1 and ctid = any(array(
        select ctid from idempotency_keys
        where user_id = $1 and key <> $8 and created_at < (
            select created_at from idempotency_keys
            where user_id = $1
            order by created_at desc offset 9999 limit 1)
        for update skip locked))
)
select task_id as id, title, description, completed,
       created_at, created_at as updated_at, (select revision from list) as revision
from claim
