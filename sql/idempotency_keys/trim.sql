-- Deletes a user's oldest keys beyond 10,000.
-- $1 user id
with of_user as materialized (
    -- Materialized, so that no plan reads the keys of all users in the order of their times.
    select created_at from idempotency_keys where user_id = $1
)
delete from idempotency_keys
where ctid = any(array(
    select ctid from idempotency_keys
    where user_id = $1 and created_at < (
        select created_at from of_user order by created_at desc offset 9999 limit 1)
    for update skip locked))
