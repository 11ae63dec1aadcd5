-- Creates one task for each of several requests. The rows are numbered by request. A request gets no
-- row, and changes nothing, if its list is locked, missing or full, or if its key has been used.
-- $1 user ids, $2 task ids, $3 titles, $4 descriptions, $5 completed, $6 the times that the ids
-- contain, $7 the maximum numbers of tasks, $8 keys or null: one of each per request
with request as materialized (
    select request.*, list.revision, list.tasks, row_number() over of_list as position
    -- The subqueries hide the length of the arrays from the planner. Otherwise it would plan each
    -- length anew instead of keeping a generic plan.
    from unnest((select $1::uuid[]), (select $2::uuid[]), (select $3::text[]), (select $4::text[]),
                (select $5::boolean[]), (select $6::timestamptz[]), (select $7::integer[]), (select $8::text[]))
        with ordinality as request
            (user_id, id, title, description, completed, created_at, max_tasks, key, ordinal)
    -- The limit forces one index lookup per request, however many rows the planner expects.
    cross join lateral (
        select revision, tasks from task_lists l
        where l.user_id = request.user_id
        limit 1
        for no key update skip locked
    ) list
    window of_list as (partition by request.user_id order by ordinal)
), claim as (
    -- Waits for no other transaction: those that use a key of this user have locked the list.
    insert into idempotency_keys (user_id, key, task_id, title, description, completed, created_at)
    select user_id, key, id, title, description, completed, created_at
    from request
    where key is not null and tasks + position <= max_tasks
    on conflict (user_id, key) do nothing
    returning task_id
), changed as (
    insert into tasks (user_id, id, title, description, completed, created_at, updated_at, revision)
    select request.user_id, id, title, description, completed, created_at, created_at, revision + position
    from request
    where tasks + position <= max_tasks and (key is null or id in (select task_id from claim))
    returning user_id, id, revision
), raised as (
    update task_lists l set revision = changed.revision, tasks = l.tasks + changed.tasks
    from (
        select user_id, max(revision) as revision, count(*) as tasks from changed group by user_id
    ) changed
    where l.user_id = changed.user_id
)
select id, changed.user_id, changed.revision, ordinal
from changed join request using (user_id, id)
order by ordinal
