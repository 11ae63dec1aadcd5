//! Statements on tasks. Each is told the owner first, or several owners, and touches no row of
//! anybody else.

use std::cmp::Reverse;

use jiff::Timestamp;
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

use super::batch::{BatchQuery, Batcher};
use super::statements::Sql;
use super::{Database, DbError, Deadline, Lease, Queries};
use crate::domain::{Completion, Description, NewTask, Rfc3339, Task, TaskChange, Title};

/// A page that travels with those of others; a longer one goes alone.
pub(crate) const MAX_BATCHED_LIMIT: i64 = 100;

/// Which tasks a list has, and in which order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Filter {
    pub(crate) completed: Option<bool>,
    /// A substring of title or description, case aside.
    pub(crate) text: Option<String>,
    pub(crate) oldest_first: bool,
}

/// Which versions of a task a statement may change.
pub(crate) enum Versions {
    Any,
    Only(Vec<Timestamp>),
    Except(Vec<Timestamp>),
}

impl Versions {
    /// The versions, and whether the task must be in one of them or in none of them.
    fn params(&self) -> (Option<&[Timestamp]>, bool) {
        match self {
            Self::Any => (None, true),
            Self::Only(versions) => (Some(versions), true),
            Self::Except(versions) => (Some(versions), false),
        }
    }
}

/// What came of a statement that preconditions guard.
pub(crate) enum Conditional<T> {
    Done(T),
    /// The task is in another version.
    VersionMismatch,
    /// There is no such task.
    NotFound,
}

/// Whether a new task was made.
pub(crate) enum CreateOutcome {
    /// This is it, or the one that the same request made before.
    Task(Task),
    /// The key was used for a task with other values.
    KeyReused,
    /// The account was deleted meanwhile.
    NoSuchUser,
}

/// Makes a task, under an Idempotency-Key at most once.
pub(crate) async fn create(
    db: Queries<'_>,
    user_id: Uuid,
    new: NewTask,
    key: Option<&str>,
) -> Result<CreateOutcome, DbError> {
    let (id, created_at) = NewTask::new_id();
    let title = new.title.as_str();
    let description = new.description.as_ref().map(Description::as_str);
    let params: super::Params = &[
        &user_id,
        &id,
        &title,
        &description,
        &new.completed,
        &created_at.0,
        &key,
    ];
    let (sql, params) = match key {
        None => (Sql::TasksCreate, &params[..6]),
        Some(_) => (Sql::TasksCreateIdempotent, params),
    };
    let rows = match db.insert(sql, params).await {
        // Nobody else has this id: the first run of a repeated insert has made it.
        Err(error) if error.is(&SqlState::UNIQUE_VIOLATION) => Ok(Vec::new()),
        rows => rows,
    };
    match rows.map(|rows| rows.first().map(task)) {
        Ok(None) => Ok(CreateOutcome::Task(Task {
            id,
            user_id,
            title: title.to_owned(),
            description: description.map(str::to_owned),
            completed: new.completed,
            created_at,
            updated_at: created_at,
        })),
        Ok(Some(task))
            if task.title == title
                && task.description.as_deref() == description
                && task.completed == new.completed =>
        {
            Ok(CreateOutcome::Task(task))
        }
        Ok(_) => Ok(CreateOutcome::KeyReused),
        Err(error) if error.is(&SqlState::FOREIGN_KEY_VIOLATION) => Ok(CreateOutcome::NoSuchUser),
        Err(error) => Err(error),
    }
}

/// One task of a user.
pub(crate) async fn get(db: Queries<'_>, user_id: Uuid, id: Uuid) -> Result<Option<Task>, DbError> {
    let rows = db.submit(GetTask { user_id, id }).await?;
    Ok(rows.first().map(task))
}

/// A page of a user's tasks: up to `limit` of them after the task `after`.
pub(crate) async fn list(
    db: Queries<'_>,
    user_id: Uuid,
    filter: &Filter,
    after: Option<Uuid>,
    limit: i64,
) -> Result<Vec<Task>, DbError> {
    let sql = if filter.oldest_first {
        Sql::TasksListOldest
    } else {
        Sql::TasksListNewest
    };
    let params: super::Params = &[&user_id, &filter.completed, &filter.text, &after, &limit];
    let rows = if filter.text.is_some() || filter.completed.is_some() {
        db.search(sql, params).await?
    } else if filter.oldest_first || limit > ListNewest::MAX_LIMIT {
        db.read(sql, params).await?
    } else {
        let page = ListNewest {
            user_id,
            after,
            limit,
        };
        let mut rows = db.submit(page).await?;
        // The statement promises the order of the askers, not that of each one's rows.
        rows.sort_unstable_by_key(|row| Reverse(row.get::<_, Uuid>(0)));
        rows
    };
    Ok(rows.iter().map(task).collect())
}

/// What many ask at the same moment.
#[derive(Default)]
pub(super) struct Batchers {
    one: Batcher<GetTask>,
    newest: Batcher<ListNewest>,
}

/// A task of a user.
struct GetTask {
    user_id: Uuid,
    id: Uuid,
}

impl BatchQuery for GetTask {
    const MAX_BATCH: usize = 64;

    fn batcher(db: &Database) -> &Batcher<Self> {
        &db.0.batchers.one
    }

    async fn execute(
        lease: &mut Lease,
        deadline: Deadline,
        questions: &[Self],
    ) -> Result<Vec<Row>, DbError> {
        let user_ids: Vec<Uuid> = questions.iter().map(|one| one.user_id).collect();
        let ids: Vec<Uuid> = questions.iter().map(|one| one.id).collect();
        lease
            .query(deadline, Sql::TasksGetBatch, &[&user_ids, &ids])
            .await
    }
}

/// A short page of a user's tasks, newest first.
struct ListNewest {
    user_id: Uuid,
    after: Option<Uuid>,
    limit: i64,
}

impl ListNewest {
    /// The most of `limit`: a short page, and one more to see whether there is more.
    const MAX_LIMIT: i64 = MAX_BATCHED_LIMIT + 1;
}

impl BatchQuery for ListNewest {
    const MAX_BATCH: usize = 32;

    fn batcher(db: &Database) -> &Batcher<Self> {
        &db.0.batchers.newest
    }

    async fn execute(
        lease: &mut Lease,
        deadline: Deadline,
        questions: &[Self],
    ) -> Result<Vec<Row>, DbError> {
        let user_ids: Vec<Uuid> = questions.iter().map(|page| page.user_id).collect();
        let after: Vec<Option<Uuid>> = questions.iter().map(|page| page.after).collect();
        let limits: Vec<i64> = questions.iter().map(|page| page.limit).collect();
        lease
            .query(
                deadline,
                Sql::TasksListNewestBatch,
                &[&user_ids, &after, &limits],
            )
            .await
    }
}

/// How many tasks a list has over all its pages.
pub(crate) async fn count(db: Queries<'_>, user_id: Uuid, filter: &Filter) -> Result<i64, DbError> {
    let rows = db
        .search(
            Sql::TasksCount,
            &[&user_id, &filter.completed, &filter.text],
        )
        .await?;
    Ok(rows.first().map_or(0, |row| row.get(0)))
}

/// Changes a task if it is in a version that may be changed.
pub(crate) async fn update(
    db: Queries<'_>,
    user_id: Uuid,
    id: Uuid,
    change: &TaskChange,
    versions: &Versions,
) -> Result<Conditional<Task>, DbError> {
    let title = change.title.as_ref().map(Title::as_str);
    let description = change
        .description
        .as_ref()
        .and_then(|text| text.as_ref().map(Description::as_str));
    let completed = match change.completed {
        Some(Completion::Set(completed)) => Some(completed),
        _ => None,
    };
    let (versions, among) = versions.params();
    let rows = db
        .write(
            Sql::TasksUpdate,
            &[
                &user_id,
                &id,
                &title,
                &change.description.is_some(),
                &description,
                &(change.completed == Some(Completion::Toggle)),
                &completed,
                &versions,
                &among,
            ],
        )
        .await?;
    Ok(guarded(rows.first(), 7, |row| {
        row.get::<_, Option<Uuid>>(0).map(|_| task(row))
    }))
}

/// Deletes a task if it is in a version that may be changed.
pub(crate) async fn delete(
    db: Queries<'_>,
    user_id: Uuid,
    id: Uuid,
    versions: &Versions,
) -> Result<Conditional<()>, DbError> {
    let (versions, among) = versions.params();
    let rows = db
        .write(Sql::TasksDelete, &[&user_id, &id, &versions, &among])
        .await?;
    Ok(guarded(rows.first(), 1, |row| {
        row.get::<_, bool>(0).then_some(())
    }))
}

/// Deletes all completed tasks of a user and says how many they were.
pub(crate) async fn delete_completed(db: Queries<'_>, user_id: Uuid) -> Result<u64, DbError> {
    db.execute(Sql::TasksDeleteCompleted, &[&user_id]).await
}

/// Reads the one row of a guarded statement; `moved_on` is the column that says why not.
fn guarded<T>(
    row: Option<&Row>,
    version_mismatch: usize,
    done: impl Fn(&Row) -> Option<T>,
) -> Conditional<T> {
    match row {
        Some(row) => match done(row) {
            Some(done) => Conditional::Done(done),
            None if row.get(version_mismatch) => Conditional::VersionMismatch,
            None => Conditional::NotFound,
        },
        None => Conditional::NotFound,
    }
}

fn task(row: &Row) -> Task {
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
