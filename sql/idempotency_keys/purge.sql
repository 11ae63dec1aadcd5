-- Deletes a batch of keys that are more than a day old.
-- No parameters.
delete from idempotency_keys
where ctid = any(array(
    select ctid from idempotency_keys
    where created_at < now() - interval '24 hours'
    limit 500 for update skip locked))
