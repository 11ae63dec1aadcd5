-- The sessions of a user that are alive, newest first: the newest thousand of them.
-- $1 user id
select id, user_agent, created_at, last_used_at, expires_at
from sessions
where user_id = $1 and expires_at > now()
order by user_id desc, id desc
limit 1000
