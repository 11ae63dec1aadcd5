-- Ends the session of a refresh token that was used before, which means that two clients have it. A
-- token of an earlier epoch is revoked rather than reused.
-- $1 session id, $2 the token's generation
delete from sessions
where id = $1 and generation > $2 and epoch <= $2 and expires_at > clock_timestamp()
returning id
