-- Deletes a batch of sessions that expired more than a day ago, so that their access tokens have expired
-- as well.
-- No parameters.
delete from sessions
where ctid = any(array(
    select ctid from sessions
    where expires_at < now() - interval '1 day'
    limit 500 for update skip locked))
