-- Deletes a batch of networks that have not been used for 30 days.
-- No parameters.
delete from login_networks
where ctid = any(array(
    select ctid from login_networks
    where last_used_at < now() - interval '30 days'
    limit 500 for update skip locked))
