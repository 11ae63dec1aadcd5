-- Deletes a batch of revocations that are more than a day old: all their access tokens have expired.
-- No parameters.
delete from revocations
where ctid = any(array(
    select ctid from revocations
    where ended_at < now() - interval '1 day 1 minute'
    limit 500 for update skip locked))
