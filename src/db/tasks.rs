//! Statements that read tasks. Each one takes the owner's ID and reads only the owner's rows.

use std::cmp::Reverse;

use tokio_postgres::Row;
use tokio_postgres::types::FromSql;
use uuid::Uuid;

use super::batch::{BatchQuery, column};
use super::lease::{Lease, Params};
use super::statements::Sql;
use super::{Deadline, Queries, Result};
use crate::domain::{Rfc3339, Task};

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

/// Reads a task.
pub(crate) async fn get(db: Queries<'_>, user_id: Uuid, id: Uuid) -> Result<Option<Task>> {
    let batcher = &db.database.batchers.get;
    let rows = db.batch(batcher, GetTask { user_id, id }).await?;
    Ok(rows.first().map(|row| task(user_id, row)))
}

/// Reads a page of a user's tasks: up to `limit` tasks that follow the task `after`. A long page
/// ends early: at least one task after its JSON exceeds `max_bytes`, to show that there are more.
pub(crate) async fn list(
    db: Queries<'_>,
    user_id: Uuid,
    filter: &Filter,
    after: Option<Uuid>,
    limit: i64,
    max_bytes: usize,
) -> Result<TaskPage> {
    let is_search = filter.text.is_some() || filter.completed.is_some();
    if !is_search && !filter.oldest_first && limit <= ListNewest::MAX_LIMIT {
        let query = ListNewest {
            user_id,
            after,
            limit,
        };
        let rows = db.batch(&db.database.batchers.list_newest, query).await?;
        return Ok(TaskPage::new(user_id, rows, filter));
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
    Ok(TaskPage::new(user_id, rows, filter))
}

/// The tasks of a page, in the rows in which they were read.
pub(crate) struct TaskPage {
    user_id: Uuid,
    rows: Vec<Row>,
    /// The revision of the list, or `None` if the account was deleted.
    pub(crate) revision: Option<i64>,
}

impl TaskPage {
    /// Takes rows that each have the revision of the list; for an empty page, there is one row whose
    /// id is null.
    fn new(user_id: Uuid, mut rows: Vec<Row>, filter: &Filter) -> Self {
        let revision = rows.first().and_then(|row| row.get("revision"));
        rows.retain(|row| id(row).is_some());
        // SQL does not guarantee the order of these rows.
        match filter.oldest_first {
            true => rows.sort_by_key(id),
            false => rows.sort_by_key(|row| Reverse(id(row))),
        }
        Self {
            user_id,
            rows,
            revision,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    pub(crate) fn tasks(&self) -> impl Iterator<Item = Task<&str>> {
        self.rows.iter().map(|row| task(self.user_id, row))
    }
}

/// Reads a single task.
pub(super) struct GetTask {
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
        let user_ids = column(queries, |query| query.user_id);
        let ids = column(queries, |query| query.id);
        lease
            .query(deadline, Sql::TasksGetBatch, &[&user_ids, &ids])
            .await
    }
}

/// Reads a short page of a user's tasks, newest first.
pub(super) struct ListNewest {
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
        let user_ids = column(queries, |query| query.user_id);
        let after = column(queries, |query| query.after);
        let limits = column(queries, |query| query.limit);
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

/// Reads a task of this user from a row. Every statement that returns tasks starts with these columns,
/// in this order: looking up columns by name for each row of a page would take longer than reading
/// the values.
pub(super) fn task<'a, T: FromSql<'a>>(user_id: Uuid, row: &'a Row) -> Task<T> {
    Task {
        id: row.get(0),
        user_id,
        title: row.get(1),
        description: row.get(2),
        completed: row.get(3),
        created_at: Rfc3339(row.get(4)),
        updated_at: Rfc3339(row.get(5)),
    }
}

/// Reads the ID of the task of a row, if it has a task.
fn id(row: &Row) -> Option<Uuid> {
    row.get(0)
}
