-- Ends every session of a user but one.
-- $1 user id, $2 the session that stays
delete from sessions where user_id = $1 and id <> $2 returning id
