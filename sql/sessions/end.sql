-- Ends one session of a user, unless its tokens up to this epoch are revoked already.
-- $1 user id, $2 session id, $3 epoch
delete from sessions where user_id = $1 and id = $2 and epoch <= $3 returning id
