-- An idempotency key refers to the list of its owner instead of the owner's account. The statement
-- that claims a key has locked the list already, so the check of the foreign key locks and writes no
-- further row. Locks the tables in the order of the previous release's statement, which prevents a
-- deadlock. `not valid` omits a scan of all keys: each has an account, and each account has a list.
lock table idempotency_keys, task_lists, users in access exclusive mode;
alter table idempotency_keys
    drop constraint idempotency_keys_user_id_fkey,
    add constraint idempotency_keys_user_id_fkey
        foreign key (user_id) references task_lists (user_id) on delete cascade not valid;

-- Whether a key was used in the last 24 hours. A volatile function takes its snapshot when it is
-- called. The caller has locked the list by then, so the function sees all previous uses.
create function was_key_used(owner uuid, used_key text) returns boolean language plpgsql volatile as $$
begin
    return exists (
        select from idempotency_keys
        where user_id = owner and key = used_key
          and created_at >= clock_timestamp() - interval '24 hours');
end
$$;
