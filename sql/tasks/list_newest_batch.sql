-- Reads a short page of tasks, newest first, for each of several requests. The rows are numbered by
-- request.
-- $1 user ids, $2 the last id of the previous page or null, $3 limit, up to 101: one of each
-- per request
select page.*, request.ordinal
-- The subqueries hide the length of the arrays from the planner. Otherwise it would plan each length
-- anew instead of keeping a generic plan.
from unnest((select $1::uuid[]), (select $2::uuid[]), (select $3::bigint[]))
    with ordinality as request (user_id, after, max_rows, ordinal)
cross join lateral (
    select *
    -- A constant limit tells the planner that there are few rows, so it does not JIT-compile the
    -- query.
    from (
        select id, user_id, title, description, completed, created_at, updated_at
        from tasks t
        where t.user_id = request.user_id
          and t.id < coalesce(request.after, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
        order by t.user_id desc, t.id desc
        limit 101
    ) newest
    limit request.max_rows
) page
order by request.ordinal
