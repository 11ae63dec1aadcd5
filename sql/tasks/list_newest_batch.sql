-- A short page of tasks, newest first, for each of several askers: rows with the number n answer
-- the n-th.
-- $1 user ids, $2 the ids that the pages before ended with or nulls, $3 how many, up to 101: one of
-- each for every asker
select page.*, request.n
-- How many askers there are is hidden in queries: PostgreSQL would make a plan for their number anew
-- each time rather than keep one for any.
from unnest((select $1::uuid[]), (select $2::uuid[]), (select $3::bigint[])) with ordinality
    as request (user_id, after, most, n)
cross join lateral (
    select *
    -- The planner believes a number, and that so few rows are not worth compiling anything for.
    from (
        select id, user_id, title, description, completed, created_at, updated_at
        from tasks t
        where t.user_id = request.user_id
          and t.id < coalesce(request.after, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
        order by t.user_id desc, t.id desc
        limit 101
    ) newest
    limit request.most
) page
order by request.n
