-- Forgets a batch of sessions that ran out of time.
delete from sessions
where ctid = any(array(
    select ctid from sessions where expires_at < now() limit 500 for update skip locked))
