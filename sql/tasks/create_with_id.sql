-- Creates a task under an id that the client chose, unless a task with this id exists or was deleted.
-- Always returns one row: the time of the last change and the revision of the new task, or nulls; and
-- the number of tasks before, or null if the account was deleted.
-- $1 user id, $2 task id, $3 title, $4 description, $5 completed, $6 the time that the id contains,
-- $7 the maximum number of tasks
with list as (
    select revision + 1 as revision from task_lists
    where user_id = $1 and tasks < $7
      and not exists (select from tasks where user_id = $1 and id = $2)
    for no key update
), created as (
    insert into tasks (user_id, id, title, description, completed, created_at, updated_at, revision)
    select $1, $2, $3, $4, $5, $6, greatest(clock_timestamp(), $6), revision
    from list
    where not was_deleted($1, $2)
    on conflict (user_id, id) do nothing
    returning updated_at, revision
), raised as (
    update task_lists l set revision = created.revision, tasks = tasks + 1
    from created
    where l.user_id = $1
)
select c.updated_at, c.revision, l.tasks
from (select) one_row
left join created c on true
left join task_lists l on l.user_id = $1
