-- Ends the session that a refresh token, used or not, belongs to.
-- $1 session id
delete from sessions where id = $1 returning id
