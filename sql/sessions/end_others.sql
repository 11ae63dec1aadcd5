-- Ends every session of a user except one.
-- $1 user id, $2 the session to keep
delete from sessions where user_id = $1 and id <> $2 returning id
