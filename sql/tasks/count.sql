-- How many tasks a list has over all its pages.
-- $1 user id, $2 completed or null for all, $3 text to find or null
select count(*) as total
from tasks
where user_id = $1
  and ($2::boolean is null or completed = $2)
  and ($3::text is null
       or strpos(lower(title), lower($3)) > 0
       or strpos(lower(description), lower($3)) > 0)
