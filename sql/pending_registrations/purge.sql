-- Deletes a batch of registrations that were not verified within a week.
-- No parameters.
delete from pending_registrations
where ctid = any(array(
    select ctid from pending_registrations
    where registered_at < now() - interval '7 days'
    limit 500 for update skip locked))
