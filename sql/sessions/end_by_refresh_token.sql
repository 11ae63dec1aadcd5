-- Ends the session of a refresh token, used or not, unless the token is of an earlier epoch.
-- $1 session id, $2 the token's generation
delete from sessions where id = $1 and epoch <= $2 returning id
