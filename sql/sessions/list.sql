-- The sessions of a user that are alive, newest first: the newest thousand of them. The thousand
-- is a query, so that PostgreSQL does not know how many that is and follows the index from row to
-- row: with a plain number it may rather collect all of them and sort.
-- $1 user id
select id, user_agent, created_at, last_used_at, expires_at
from sessions
where user_id = $1 and expires_at > now()
order by user_id desc, id desc
limit (select 1000)
