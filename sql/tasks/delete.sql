-- Deletes a task if it still is as the caller saw it: one row, whether it is deleted, and if not
-- whether there is such a task at all.
-- $1 user id, $2 task id, $3 versions or null, $4 whether the task must be in one of them or in none
-- of them
with deleted as (
    delete from tasks
    where user_id = $1 and id = $2
      and ($3::timestamptz[] is null or (updated_at = any($3)) = $4)
    returning id
)
select g.id is not null as deleted,
       g.id is null and $3 is not null
           and exists (select from tasks t where t.user_id = $1 and t.id = $2) as version_mismatch
from (select) one left join deleted g on true
