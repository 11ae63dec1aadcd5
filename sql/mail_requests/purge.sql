-- Deletes a batch of counters whose last mail is more than an hour ago.
-- No parameters.
delete from mail_requests
where ctid = any(array(
    select ctid from mail_requests
    where latest_at < now() - interval '1 hour'
    limit 500 for update skip locked))
