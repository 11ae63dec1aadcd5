-- Forgets a batch of ended sessions whose last access token has run out.
-- $1 seconds that an access token lives
delete from revocations
where ctid = any(array(
    select ctid from revocations
    where ended_at < now() - ($1::float8 + 60) * interval '1 second'
    limit 500 for update skip locked))
