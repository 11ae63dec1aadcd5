-- Forgets a batch of ended sessions whose last access token has run out: none lives longer than a
-- day. No parameters.
delete from revocations
where ctid = any(array(
    select ctid from revocations
    where ended_at < now() - interval '1 day 1 minute'
    limit 500 for update skip locked))
