-- Deletes a task if its version matches. Always returns one row: the revision of the deletion or, if
-- the task was not deleted, null and whether the version was the reason.
-- $1 user id, $2 task id, $3 versions or null, $4 whether the task must be in one of the versions
-- (true) or in none (false)
with list as (
    select revision + 1 as revision from task_lists
    where user_id = $1 and exists (
        select from tasks
        where user_id = $1 and id = $2
          and ($3::timestamptz[] is null or (updated_at = any($3)) = $4))
    for no key update
), deleted as (
    delete from tasks t
    using list
    where t.user_id = $1 and t.id = $2
      and ($3::timestamptz[] is null or (updated_at = any($3)) = $4)
    returning id, list.revision
), raised as (
    update task_lists l set revision = deleted.revision, tasks = tasks - 1
    from deleted
    where l.user_id = $1
), tombstone as (
    insert into deleted_tasks (user_id, revision, id, deleted_at)
    select $1, revision, id, clock_timestamp() from deleted
)
select d.revision,
       d.id is null and $3 is not null
           and exists (select from tasks t where t.user_id = $1 and t.id = $2) as version_mismatch
from (select) one_row left join deleted d on true
