-- Changes one task for each of several requests. The rows are numbered by request. A request gets no
-- row, and changes nothing, if its list or its task is locked or missing, or if another request of
-- this statement changes the same task.
-- $1 user ids, $2 task ids, $3 titles or null to keep them, $4 whether to change the descriptions,
-- $5 their new values or null, $6 whether to toggle completed, $7 completed or null to keep it: one of
-- each per request
with request as materialized (
    select request.*, task.address, list.revision + row_number() over of_list as revision
    -- The subqueries hide the length of the arrays from the planner. Otherwise it would plan each
    -- length anew instead of keeping a generic plan.
    from unnest((select $1::uuid[]), (select $2::uuid[]), (select $3::text[]), (select $4::boolean[]),
                (select $5::text[]), (select $6::boolean[]), (select $7::boolean[]))
        with ordinality as request
            (user_id, id, title, sets_description, description, toggles, completed, ordinal)
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
        for no key update skip locked
    ) task
    window of_list as (partition by request.user_id order by ordinal)
), changed as (
    update tasks t
    set title = coalesce(request.title, t.title),
        description = case when sets_description then request.description else t.description end,
        completed = case when toggles then not t.completed else coalesce(request.completed, t.completed) end,
        updated_at = greatest(clock_timestamp(), t.updated_at + interval '1 microsecond'),
        revision = request.revision
    from request
    -- The address of a locked row does not change. The last condition is always true: it lowers the
    -- expected number of requests, so that no plan reads a whole table that is small at first.
    where t.user_id = request.user_id and t.ctid = request.address and ordinal between 1 and 1000
    returning t.id, t.title, t.description, t.completed, t.created_at, t.updated_at, t.revision,
              t.user_id, request.ordinal
), raised as (
    update task_lists l set revision = changed.revision
    from (select user_id, max(revision) as revision from changed group by user_id) changed
    where l.user_id = changed.user_id
)
select * from changed order by ordinal
