-- One task for each of several askers: row number n answers the n-th, who gets none if there is none.
-- $1 user ids, $2 task ids: one of each for every asker
select task.*, request.n
-- How many askers there are is hidden in queries: PostgreSQL would make a plan for their number anew
-- each time rather than keep one for any.
from unnest((select $1::uuid[]), (select $2::uuid[])) with ordinality as request (user_id, id, n)
-- The limit makes it one look-up in the index for each, whatever the planner thinks of their number.
cross join lateral (
    select id, user_id, title, description, completed, created_at, updated_at
    from tasks t
    where t.user_id = request.user_id and t.id = request.id
    limit 1
) task
order by request.n
