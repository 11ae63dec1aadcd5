-- Ends one session of a user.
-- $1 user id, $2 session id
delete from sessions where user_id = $1 and id = $2 returning id
