-- Reads the changes of a user's list after a position, oldest first: tasks that were changed and
-- still exist, and ids that were deleted. Each row has the state of the list; if there are no
-- changes, one row has only the state.
-- $1 user id, $2 and $3 the revision and the id of the last known change, $4 and $5 the revision
-- and the id of the last known deletion, $6 limit, up to 101
select change.id, change.title, change.description, change.completed,
       change.created_at, change.updated_at, change.revision, change.deleted_at,
       l.revision as list_revision, l.purged_revision
from task_lists l
left join lateral (
    -- Only tasks from before there were revisions have a revision in common: 0. Constant limits let the
    -- planner keep a generic plan, whose cost it would otherwise overestimate for long lists.
    (
        select id, title, description, completed, created_at, updated_at, revision,
               null::timestamptz as deleted_at
        from tasks
        where user_id = $1 and $2::bigint = 0 and revision = 0 and id > $3::uuid
        order by user_id, id
        limit 101
    )
    union all
    (
        select id, title, description, completed, created_at, updated_at, revision, null
        from tasks
        where user_id = $1 and revision > $2
        order by user_id, revision
        limit 101
    )
    union all
    (
        select id, null, null, null, null, null, revision, deleted_at
        from deleted_tasks
        where user_id = $1 and (revision, id) > ($4::bigint, $5::uuid)
        order by revision, id
        limit 101
    )
    order by revision, id
    limit $6
) change on true
where l.user_id = $1
