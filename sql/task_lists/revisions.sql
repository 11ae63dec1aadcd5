-- Reads the revision of a user's list for each of several requests. The rows are numbered by request;
-- a request whose user does not exist gets no row.
-- $1 user ids
select list.*, request.ordinal
-- The subqueries hide the length of the arrays from the planner. Otherwise it would plan each length
-- anew instead of keeping a generic plan.
from unnest((select $1::uuid[])) with ordinality as request (user_id, ordinal)
-- The limit forces one index lookup per request, however many rows the planner expects.
cross join lateral (
    select user_id, revision from task_lists l where l.user_id = request.user_id limit 1
) list
order by request.ordinal
