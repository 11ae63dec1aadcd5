-- Deletes a batch of revocations whose last access token has expired: none is valid for more than a
-- day.
-- No parameters.
delete from revocations
where ctid = any(array(
    select ctid from revocations
    where ended_at < now() - interval '1 day 1 minute'
    limit 500 for update skip locked))
