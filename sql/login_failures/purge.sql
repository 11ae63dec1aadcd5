-- Deletes a batch of counters whose last failure is more than a day ago.
-- No parameters.
delete from login_failures
where ctid = any(array(
    select ctid from login_failures
    where last_failure_at < now() - interval '24 hours'
    limit 500 for update skip locked))
