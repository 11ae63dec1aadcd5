-- Creates one task for each of several requests. The rows are numbered by request. A request gets no
-- row, and changes nothing, if its list is locked, missing or full.
-- $1 user ids, $2 task ids, $3 titles, $4 descriptions, $5 completed, $6 the times that the ids
-- contain, $7 the maximum numbers of tasks: one of each per request
with request as materialized (
    select request.*, list.revision, list.tasks, row_number() over of_list as position
    -- The subqueries hide the length of the arrays from the planner. Otherwise it would plan each
    -- length anew instead of keeping a generic plan.
    from unnest((select $1::uuid[]), (select $2::uuid[]), (select $3::text[]), (select $4::text[]),
                (select $5::boolean[]), (select $6::timestamptz[]), (select $7::integer[]))
        with ordinality as request (user_id, id, title, description, completed, created_at, max_tasks, ordinal)
    -- The limit forces one index lookup per request, however many rows the planner expects.
    cross join lateral (
        select revision, tasks from task_lists l
        where l.user_id = request.user_id
        limit 1
        for no key update skip locked
    ) list
    window of_list as (partition by request.user_id order by ordinal)
), changed as (
    insert into tasks (user_id, id, title, description, completed, created_at, updated_at, revision)
    select request.user_id, id, title, description, completed, created_at, created_at, revision + position
    from request
    where tasks + position <= max_tasks
    returning user_id, id, revision
), raised as (
    update task_lists l set revision = changed.revision, tasks = l.tasks + changed.tasks
    from (
        select user_id, max(revision) as revision, count(*) as tasks from changed group by user_id
    ) changed
    where l.user_id = changed.user_id
)
select changed.user_id, changed.revision, ordinal
from changed join request using (user_id, id)
order by ordinal
