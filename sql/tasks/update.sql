-- Changes a task if its version matches. Always returns one row: the changed task, or nulls and
-- whether the version was the reason.
-- $1 user id, $2 task id, $3 title or null to keep it, $4 whether to change the description, $5 its
-- new value or null, $6 whether to toggle completed, $7 completed or null to keep it, $8 versions
-- or null, $9 whether the task must be in one of the versions (true) or in none (false)
with list as (
    update task_lists set revision = revision + 1
    where user_id = $1 and exists (
        select from tasks
        where user_id = $1 and id = $2
          and ($8::timestamptz[] is null or (updated_at = any($8)) = $9))
    returning revision
), changed as (
    -- Checks the version again: another request may have changed the task before this one locked the
    -- list.
    update tasks t
    set title = coalesce($3, title),
        description = case when $4 then $5 else description end,
        completed = case when $6 then not completed else coalesce($7, completed) end,
        updated_at = greatest(clock_timestamp(), updated_at + interval '1 microsecond'),
        revision = list.revision
    from list
    where t.user_id = $1 and t.id = $2
      and ($8::timestamptz[] is null or (updated_at = any($8)) = $9)
    returning id, title, description, completed, created_at, updated_at, t.revision
)
select c.id, c.title, c.description, c.completed, c.created_at, c.updated_at, c.revision,
       c.id is null and $8 is not null
           and exists (select from tasks t where t.user_id = $1 and t.id = $2) as version_mismatch
from (select) one_row left join changed c on true
