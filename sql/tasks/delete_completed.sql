-- Deletes all completed tasks of a user.
-- $1 user id
delete from tasks where user_id = $1 and completed
