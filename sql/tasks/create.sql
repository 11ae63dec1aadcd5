-- Creates a task and returns its id and the revision of its list; no row if the account was deleted or has the
-- maximum number of tasks.
-- $1 user id, $2 task id, $3 title, $4 description, $5 completed, $6 the time that the id contains,
-- $7 the maximum number of tasks
with list as (
    update task_lists set revision = revision + 1, tasks = tasks + 1
    where user_id = $1 and tasks < $7
    returning revision
)
insert into tasks (user_id, id, title, description, completed, created_at, updated_at, revision)
select $1, $2, $3, $4, $5, $6, $6, revision from list
returning id, revision
