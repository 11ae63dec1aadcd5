-- Creates a task.
-- $1 user id, $2 task id, $3 title, $4 description, $5 completed, $6 the time that the id contains
insert into tasks (user_id, id, title, description, completed, created_at, updated_at)
values ($1, $2, $3, $4, $5, $6, $6)
