-- Ends the session that a refresh token belongs to, used or not, unless it is of an earlier epoch.
-- $1 session id, $2 the token's generation
delete from sessions where id = $1 and epoch <= $2 returning id
