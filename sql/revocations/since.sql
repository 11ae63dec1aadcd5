-- What ended since we last asked, with 30 s of overlap: a row's time is older than its commit.
-- $1 the database's time when we last asked, null for the first time
select session_id, now() as asked_at
from revocations
where ended_at > coalesce($1::timestamptz - interval '30 seconds', '-infinity')
  -- Always true. Of a range PostgreSQL expects few rows and takes the index; of a lower bound
  -- alone, as long as it does not know it, a third of the table, and then it reads all of that.
  and ended_at < 'infinity'
union all
select null, now()
