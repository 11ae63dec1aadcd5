-- Forgets a batch of addresses whose last wrong password is a day old.
delete from sign_in_failures
where ctid = any(array(
    select ctid from sign_in_failures
    where last_failure_at < now() - interval '24 hours'
    limit 500 for update skip locked))
