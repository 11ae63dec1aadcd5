-- Lists the active sessions of a user, newest first.
-- $1 user id
select id, user_agent, created_at, last_used_at, expires_at
from sessions
where user_id = $1 and expires_at > now()
order by id desc
