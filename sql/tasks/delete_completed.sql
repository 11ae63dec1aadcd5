-- Deletes all completed tasks of a user. Returns their number and the revision of the deletion.
-- $1 user id
with list as (
    select revision + 1 as revision from task_lists where user_id = $1 for no key update
), deleted as (
    delete from tasks t
    using list
    where t.user_id = $1 and completed
    returning id, list.revision
), tombstones as (
    insert into deleted_tasks (user_id, revision, id, deleted_at)
    select $1, revision, id, clock_timestamp() from deleted
), total as (
    select count(*) as deleted, max(revision) as revision from deleted
), raised as (
    update task_lists l set revision = total.revision, tasks = tasks - total.deleted
    from total
    where l.user_id = $1 and total.deleted > 0
)
select deleted, revision from total
