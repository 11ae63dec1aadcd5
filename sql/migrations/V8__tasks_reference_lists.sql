-- A task refers to the list of its owner instead of the owner's account. The statement that creates
-- a task has locked the list already, so the check of the foreign key locks and writes no further
-- row. Deleting an account still deletes its tasks, by way of the list. Locks the tables in one order,
-- which prevents a deadlock with running statements. `not valid` omits a scan of all tasks: each of
-- them has an account, and each account has a list.
lock table task_lists, tasks, users in access exclusive mode;
alter table tasks
    drop constraint tasks_user_id_fkey,
    add constraint tasks_user_id_fkey
        foreign key (user_id) references task_lists (user_id) on delete cascade not valid;

-- PostgreSQL prunes a page whose free space is below what the fill factor reserves, which is after
-- almost every update of this table. Pruning takes less time if the page has fewer rows.
alter table task_lists set (fillfactor = 25);
