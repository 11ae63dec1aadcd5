-- What ended since we last asked, with 30 s of overlap: a row's time is older than its commit.
-- $1 the database's time when we last asked, null for the first time
select session_id, now() as asked_at
from revocations
where $1::timestamptz is null or ended_at > $1::timestamptz - interval '30 seconds'
union all
select null, now()
