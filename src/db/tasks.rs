//! Statements on tasks. Each one takes the owner's ID and touches only the owner's rows.

use std::cmp::Reverse;

use jiff::Timestamp;
use tokio_postgres::Row;
use uuid::Uuid;

use super::batch::{BatchQuery, Batcher};
use super::lease::{Lease, Params};
use super::retry::Repeat;
use super::statements::Sql;
use super::{Deadline, Queries, Result};
use crate::domain::{Completion, Description, Rfc3339, Task, TaskChange, Title};

/// The longest page whose query is batched.
pub(crate) const MAX_BATCHED_LIMIT: i64 = 100;

/// Which tasks a list includes, and in what order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Filter {
    pub(crate) completed: Option<bool>,
    /// A substring of the title or the description, ignoring case.
    pub(crate) text: Option<String>,
    pub(crate) oldest_first: bool,
}

/// The versions in which a task may be changed.
pub(crate) enum Versions {
    Any,
    Only(Vec<Timestamp>),
    Except(Vec<Timestamp>),
}

impl Versions {
    /// The versions, and whether the task must be in one of them (true) or in none (false).
    fn params(&self) -> (Option<&[Timestamp]>, bool) {
        match self {
            Self::Any => (None, true),
            Self::Only(versions) => (Some(versions), true),
            Self::Except(versions) => (Some(versions), false),
        }
    }
}

/// The result of a write with preconditions.
pub(crate) enum Conditional<T> {
    Done(T),
    /// The task's version does not match.
    VersionMismatch,
    NotFound,
}

impl<T> Conditional<T> {
    /// Reads the row returned by a write with preconditions; `done` returns `None` if the task was
    /// not changed.
    fn from_rows(rows: &[Row], done: impl Fn(&Row) -> Option<T>) -> Self {
        match rows.first().map(|row| (done(row), row)) {
            Some((Some(done), _)) => Self::Done(done),
            Some((None, row)) if row.get("version_mismatch") => Self::VersionMismatch,
            _ => Self::NotFound,
        }
    }
}

/// Reads a task.
pub(crate) async fn get(db: Queries<'_>, user_id: Uuid, id: Uuid) -> Result<Option<Task>> {
    let batcher = &db.database.batchers.get;
    let rows = db.batch(batcher, GetTask { user_id, id }).await?;
    Ok(rows.first().map(task))
}

/// Reads a page of a user's tasks: up to `limit` tasks that follow the task `after`. A long page
/// ends early: at least one task after its JSON exceeds `max_bytes`, to show that there are more.
/// Also reads the revision of the list, or `None` if the account was deleted.
pub(crate) async fn list(
    db: Queries<'_>,
    user_id: Uuid,
    filter: &Filter,
    after: Option<Uuid>,
    limit: i64,
    max_bytes: usize,
) -> Result<(Vec<Task>, Option<i64>)> {
    let is_search = filter.text.is_some() || filter.completed.is_some();
    if !is_search && !filter.oldest_first && limit <= ListNewest::MAX_LIMIT {
        let query = ListNewest {
            user_id,
            after,
            limit,
        };
        let rows = db.batch(&db.database.batchers.list_newest, query).await?;
        return Ok(tasks_and_revision(&rows, filter));
    }
    let sql = match filter.oldest_first {
        true => Sql::TasksListOldest,
        false => Sql::TasksListNewest,
    };
    let params: Params = &[
        &user_id,
        &filter.completed,
        &filter.text,
        &after,
        &limit,
        &(max_bytes as i64),
    ];
    let rows = match is_search {
        true => db.search(user_id, sql, params).await?,
        false => db.read(sql, params).await?,
    };
    Ok(tasks_and_revision(&rows, filter))
}

/// Reads the rows of a page. Each has the revision of the list; for an empty page, there is one row
/// whose id is null.
fn tasks_and_revision(rows: &[Row], filter: &Filter) -> (Vec<Task>, Option<i64>) {
    let revision = rows.first().and_then(|row| row.get("revision"));
    let has_task = |row: &&Row| row.get::<_, Option<Uuid>>(0).is_some();
    let mut tasks: Vec<Task> = rows.iter().filter(has_task).map(task).collect();
    // SQL does not guarantee the order of these rows.
    match filter.oldest_first {
        true => tasks.sort_by_key(|task| task.id),
        false => tasks.sort_by_key(|task| Reverse(task.id)),
    }
    (tasks, revision)
}

/// The queues of the batched queries.
#[derive(Default)]
pub(super) struct Batchers {
    get: Batcher<GetTask>,
    list_newest: Batcher<ListNewest>,
}

/// Reads a single task.
struct GetTask {
    user_id: Uuid,
    id: Uuid,
}

impl BatchQuery for GetTask {
    const MAX_ROWS: usize = 64;

    fn max_rows(&self) -> usize {
        1
    }

    fn user_id(&self) -> Uuid {
        self.user_id
    }

    async fn execute(lease: &mut Lease, deadline: Deadline, queries: &[Self]) -> Result<Vec<Row>> {
        let user_ids: Vec<Uuid> = queries.iter().map(|query| query.user_id).collect();
        let ids: Vec<Uuid> = queries.iter().map(|query| query.id).collect();
        lease
            .query(deadline, Sql::TasksGetBatch, &[&user_ids, &ids])
            .await
    }
}

/// Reads a short page of a user's tasks, newest first.
struct ListNewest {
    user_id: Uuid,
    after: Option<Uuid>,
    limit: i64,
}

impl ListNewest {
    /// A short page plus one more task, which shows whether another page follows.
    const MAX_LIMIT: i64 = MAX_BATCHED_LIMIT + 1;
}

impl BatchQuery for ListNewest {
    /// 32 pages of 20 tasks, or 6 of 100.
    const MAX_ROWS: usize = 672;

    fn max_rows(&self) -> usize {
        self.limit.max(21) as usize
    }

    fn user_id(&self) -> Uuid {
        self.user_id
    }

    async fn execute(lease: &mut Lease, deadline: Deadline, queries: &[Self]) -> Result<Vec<Row>> {
        let user_ids: Vec<Uuid> = queries.iter().map(|query| query.user_id).collect();
        let after: Vec<Option<Uuid>> = queries.iter().map(|query| query.after).collect();
        let limits: Vec<i64> = queries.iter().map(|query| query.limit).collect();
        let params: Params = &[&user_ids, &after, &limits];
        lease
            .query(deadline, Sql::TasksListNewestBatch, params)
            .await
    }
}

/// Counts the tasks of a list over all its pages.
pub(crate) async fn count(db: Queries<'_>, user_id: Uuid, filter: &Filter) -> Result<i64> {
    let params: Params = &[&user_id, &filter.completed, &filter.text];
    let rows = db.search(user_id, Sql::TasksCount, params).await?;
    Ok(rows.first().map_or(0, |row| row.get("total")))
}

/// Changes a task if its version matches `versions`.
pub(crate) async fn update(
    db: Queries<'_>,
    user_id: Uuid,
    id: Uuid,
    change: &TaskChange,
    versions: &Versions,
) -> Result<Conditional<Task>> {
    let title = change.title.as_ref().map(Title::as_str);
    let description = change.description.as_ref();
    let new_description = description.and_then(|text| text.as_ref().map(Description::as_str));
    let completed = match change.completed {
        Some(Completion::Set(completed)) => Some(completed),
        _ => None,
    };
    let (versions, one_of) = versions.params();
    let params: Params = &[
        &user_id,
        &id,
        &title,
        &description.is_some(),
        &new_description,
        &(change.completed == Some(Completion::Toggle)),
        &completed,
        &versions,
        &one_of,
    ];
    let written = db.write_tasks(Repeat::Never, user_id, Sql::TasksUpdate, params);
    let rows = written.await?;
    Ok(Conditional::from_rows(&rows, |row| {
        row.get::<_, Option<Uuid>>("id").map(|_| task(row))
    }))
}

/// Deletes a task if its version matches `versions`.
pub(crate) async fn delete(
    db: Queries<'_>,
    user_id: Uuid,
    id: Uuid,
    versions: &Versions,
) -> Result<Conditional<()>> {
    let (versions, one_of) = versions.params();
    let params: Params = &[&user_id, &id, &versions, &one_of];
    let written = db.write_tasks(Repeat::Never, user_id, Sql::TasksDelete, params);
    let rows = written.await?;
    Ok(Conditional::from_rows(&rows, |row| {
        row.get::<_, Option<i64>>("revision").map(|_| ())
    }))
}

/// Deletes all completed tasks of a user and returns how many there were.
pub(crate) async fn delete_completed(db: Queries<'_>, user_id: Uuid) -> Result<i64> {
    let params: Params = &[&user_id];
    let written = db.write_tasks(Repeat::Never, user_id, Sql::TasksDeleteCompleted, params);
    let rows = written.await?;
    Ok(rows.first().map_or(0, |row| row.get("deleted")))
}

/// Reads a task from a row. Every statement that returns tasks starts with these columns, in this
/// order: looking up columns by name for each row of a page would take longer than reading the
/// values.
pub(super) fn task(row: &Row) -> Task {
    Task {
        id: row.get(0),
        user_id: row.get(1),
        title: row.get(2),
        description: row.get(3),
        completed: row.get(4),
        created_at: Rfc3339(row.get(5)),
        updated_at: Rfc3339(row.get(6)),
    }
}
