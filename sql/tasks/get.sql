-- One task.
-- $1 user id, $2 task id
select id, user_id, title, description, completed, created_at, updated_at
from tasks
where user_id = $1 and id = $2
