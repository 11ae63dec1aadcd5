-- Ends one session of a user, unless it is in a later epoch than the token.
-- $1 user id, $2 session id, $3 the token's epoch
delete from sessions where user_id = $1 and id = $2 and epoch <= $3 returning id
