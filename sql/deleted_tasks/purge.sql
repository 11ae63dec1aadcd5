-- Deletes a batch of tombstones that are more than 30 days old, and records in each list the
-- highest revision that was purged. Skips locked lists.
-- No parameters.
with due as (
    select user_id, revision, id from deleted_tasks
    where deleted_at < now() - interval '30 days'
    limit 500
), lists as (
    select user_id from task_lists where user_id in (select user_id from due)
    for no key update skip locked
), purged as (
    select due.* from due join lists using (user_id)
), recorded as (
    update task_lists l set purged_revision = greatest(purged_revision, latest.revision)
    from (select user_id, max(revision) as revision from purged group by user_id) latest
    where l.user_id = latest.user_id
)
delete from deleted_tasks d
using purged p
where d.user_id = p.user_id and d.revision = p.revision and d.id = p.id
