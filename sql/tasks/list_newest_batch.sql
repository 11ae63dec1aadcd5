-- Reads a short page of tasks, newest first, for each of several requests. The rows are numbered by
-- request. Each row has the revision of the list; for an empty page, there is one row whose id is
-- null.
-- $1 user ids, $2 the last id of the previous page or null, $3 limit, up to 101: one of each per
-- request
select page.id, page.title, page.description, page.completed, page.created_at, page.updated_at,
       list.revision, list.user_id, request.ordinal
-- The subqueries hide the length of the arrays from the planner. Otherwise it would plan each length
-- anew instead of keeping a generic plan.
from unnest((select $1::uuid[]), (select $2::uuid[]), (select $3::bigint[]))
    with ordinality as request (user_id, after, max_rows, ordinal)
-- The limit forces one index lookup per request, however many rows the planner expects.
cross join lateral (
    select user_id, revision from task_lists l where l.user_id = request.user_id limit 1
) list
left join lateral (
    select *
    -- A constant limit tells the planner that there are few rows, so it does not JIT-compile the
    -- query.
    from (
        select id, title, description, completed, created_at, updated_at
        from tasks t
        where t.user_id = request.user_id
          and t.id < coalesce(request.after, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
        order by t.user_id desc, t.id desc
        limit 101
    ) newest
    limit request.max_rows
) page on true
order by request.ordinal
