-- Deletes a task if its version matches. Always returns one row: whether the task was deleted and,
-- if not, whether the version was the reason.
-- $1 user id, $2 task id, $3 versions or null, $4 whether the task must be in one of the versions
-- (true) or in none (false)
with deleted as (
    delete from tasks
    where user_id = $1 and id = $2
      and ($3::timestamptz[] is null or (updated_at = any($3)) = $4)
    returning id
)
select d.id is not null as deleted,
       d.id is null and $3 is not null
           and exists (select from tasks t where t.user_id = $1 and t.id = $2) as version_mismatch
from (select) one_row left join deleted d on true
