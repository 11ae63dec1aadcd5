-- Reads one task for each of several requests. The rows are numbered by request; a request whose
-- task does not exist gets no row.
-- $1 user ids, $2 task ids: one of each per request
select task.*, request.ordinal
-- The subqueries hide the length of the arrays from the planner. Otherwise it would plan each length
-- anew instead of keeping a generic plan.
from unnest((select $1::uuid[]), (select $2::uuid[]))
    with ordinality as request (user_id, id, ordinal)
-- The limit forces one index lookup per request, however many rows the planner expects.
cross join lateral (
    select id, title, description, completed, created_at, updated_at, user_id
    from tasks t
    where t.user_id = request.user_id and t.id = request.id
    limit 1
) task
order by request.ordinal
