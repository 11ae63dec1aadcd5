-- Lists a page of a user's tasks, oldest first. Each row has the revision of the list; for an empty
-- page, there is one row whose id is null.
-- $1 user id, $2 completed or null for all, $3 text to search for or null, $4 the last id of the
-- previous page or null, $5 limit, $6 size of the page in bytes
select t.id, t.title, t.description, t.completed, t.created_at, t.updated_at, l.revision
from task_lists l
left join lateral (
    select id, title, description, completed, created_at, updated_at
    from (
        select *,
            -- The minimum JSON size of the tasks, without this one and the previous one: the
            -- previous one completes the page, and this one shows that there are more.
            sum(200 + octet_length(title) + coalesce(octet_length(description), 0)) over (
                order by id asc rows between unbounded preceding and 2 preceding
            ) as size
        from (
            select id, title, description, completed, created_at, updated_at
            from tasks
            where user_id = $1
              and id > coalesce($4::uuid, '00000000-0000-0000-0000-000000000000')
              and ($2::boolean is null or completed = $2)
              and ($3::text is null
                   or strpos(fold_case(title), fold_case($3)) > 0
                   or strpos(fold_case(description), fold_case($3)) > 0)
            order by user_id asc, id asc
            limit $5
        ) limited
    ) page
    where coalesce(size, 0) <= $6
) t on true
where l.user_id = $1
