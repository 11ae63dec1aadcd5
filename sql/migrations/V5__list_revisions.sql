-- Each user's list of tasks has a revision, which every change of the tasks raises, and each changed
-- task carries the revision of its change. Deleted tasks leave tombstones.

-- Locked and raised before the task rows change, so that revisions become visible in order.
create table task_lists (
    user_id         uuid    primary key references users (id) on delete cascade,
    revision        bigint  not null default 0,
    -- The number of tasks in the list.
    tasks           integer not null default 0,
    -- The highest revision whose tombstones have been purged.
    purged_revision bigint  not null default 0
) with (fillfactor = 50);

-- Tasks from before this migration have revision 0, which does not rewrite the table. No other
-- revision has more than one task, so the index does not need the id.
alter table tasks add column revision bigint not null default 0;
create index tasks_by_revision on tasks (user_id, revision);

-- No foreign key: a row is only inserted by a transaction that has locked its list, and a trigger
-- deletes it with the list.
create table deleted_tasks (
    user_id    uuid        not null,
    revision   bigint      not null,
    id         uuid        not null,
    deleted_at timestamptz not null,
    primary key (user_id, revision, id)
);
create index deleted_tasks_by_id on deleted_tasks (user_id, id);
create index deleted_tasks_by_time on deleted_tasks (deleted_at);

-- Whether a task was deleted. A volatile function takes its snapshot when it is called. The caller
-- has locked the list by then, so the function sees all previous deletions.
create function was_deleted(owner uuid, task uuid) returns boolean language plpgsql volatile as $$
begin
    return exists (select from deleted_tasks where user_id = owner and id = task);
end
$$;

create function delete_tombstones() returns trigger language plpgsql as $$
begin
    delete from deleted_tasks where user_id = old.user_id;
    return null;
end
$$;
create trigger delete_tombstones after delete on task_lists
    for each row execute function delete_tombstones();

create function create_task_list() returns trigger language plpgsql as $$
begin
    insert into task_lists (user_id) values (new.id);
    return null;
end
$$;
create trigger create_task_list after insert on users
    for each row execute function create_task_list();

insert into task_lists (user_id, tasks)
select u.id, count(t.id) from users u left join tasks t on t.user_id = u.id group by u.id;

-- Raises the revision after statements that do not raise it themselves: statements of the previous
-- release, which may still run, and of an operator. The service's own statements never meet the
-- conditions of the triggers.
create function record_task_change() returns trigger language plpgsql as $$
begin
    with list as (
        update task_lists set revision = revision + 1, tasks = tasks + (tg_op = 'INSERT')::integer
        where user_id = new.user_id
        returning revision
    )
    update tasks t set revision = list.revision
    from list
    where t.user_id = new.user_id and t.id = new.id;
    return null;
end
$$;
create trigger record_created_task after insert on tasks
    for each row when (new.revision = 0) execute function record_task_change();
create trigger record_changed_task after update on tasks
    for each row when (new.revision = old.revision) execute function record_task_change();

-- Runs once for all tasks that a statement deletes: a list row that is updated for each of them would
-- take quadratic time.
create function record_deleted_tasks() returns trigger language plpgsql as $$
begin
    with list as (
        update task_lists l set revision = revision + 1, tasks = l.tasks - of_user.tasks
        from (select user_id, count(*) as tasks from deleted group by user_id) of_user
        where l.user_id = of_user.user_id
        returning l.user_id, revision
    )
    insert into deleted_tasks (user_id, revision, id, deleted_at)
    select user_id, list.revision, id, clock_timestamp() from deleted join list using (user_id);
    return null;
end
$$;
create trigger record_deleted_tasks after delete on tasks referencing old table as deleted
    for each statement when (strpos(current_query(), 'task_lists') = 0)
    execute function record_deleted_tasks();
