-- Deletes one task for each of several requests. The rows are numbered by request. A request gets no
-- row, and changes nothing, if its list or its task is locked or missing, or if another request of
-- this statement deletes the same task.
-- $1 user ids, $2 task ids: one of each per request
with request as materialized (
    select request.*, task.address, list.revision + row_number() over of_list as revision
    -- The subqueries hide the length of the arrays from the planner. Otherwise it would plan each
    -- length anew instead of keeping a generic plan.
    from unnest((select $1::uuid[]), (select $2::uuid[]))
        with ordinality as request (user_id, id, ordinal)
    -- The limit forces one index lookup per request, however many rows the planner expects.
    cross join lateral (
        select revision from task_lists l
        where l.user_id = request.user_id
        limit 1
        for no key update skip locked
    ) list
    cross join lateral (
        select t.ctid as address from tasks t
        where t.user_id = request.user_id and t.id = request.id
        limit 1
        for update skip locked
    ) task
    window of_list as (partition by request.user_id order by ordinal)
), changed as (
    delete from tasks t
    using request
    -- The address of a locked row does not change. The last condition is always true: it lowers the
    -- expected number of requests, so that no plan reads a whole table that is small at first.
    where t.user_id = request.user_id and t.ctid = request.address and ordinal between 1 and 1000
    returning t.user_id, t.id, request.revision, request.ordinal
), tombstones as (
    insert into deleted_tasks (user_id, revision, id, deleted_at)
    select changed.user_id, revision, id, clock_timestamp() from changed
), raised as (
    update task_lists l set revision = changed.revision, tasks = l.tasks - changed.tasks
    from (
        select user_id, max(revision) as revision, count(*) as tasks from changed group by user_id
    ) changed
    where l.user_id = changed.user_id
)
select user_id, revision, ordinal from changed order by ordinal
