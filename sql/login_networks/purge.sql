-- Deletes a batch of networks that were last used 30 days ago.
-- No parameters.
delete from login_networks
where ctid = any(array(
    select ctid from login_networks
    where last_used_at < now() - interval '30 days'
    limit 500 for update skip locked))
