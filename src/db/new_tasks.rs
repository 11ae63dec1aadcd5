//! Statements that create tasks.

use std::sync::Arc;

use jiff::Timestamp;
use log::warn;
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

use super::batch::column;
use super::lease::{Lease, Params};
use super::retry::Repeat;
use super::statements::Sql;
use super::task_writes::BatchWrite;
use super::tasks::{get, task};
use super::{Deadline, Queries, Result};
use crate::domain::{NewTask, Rfc3339, Task};

/// The result of creating a task.
pub(crate) enum CreateOutcome {
    /// The new task, or the task that an earlier request with the same key created.
    Task(Task),
    /// An earlier request used the same key for a task with different values.
    KeyReused,
    /// The user has the maximum number of tasks.
    QuotaExceeded,
    /// The account has been deleted.
    NoSuchUser,
    /// The ID belongs to a task of this version, or to a deleted task (`None`).
    IdTaken(Option<Timestamp>),
}

/// Creates a task. With an `Idempotency-Key`, creates it at most once.
pub(crate) async fn create(
    db: Queries<'_>,
    user_id: Uuid,
    new: NewTask,
    key: Option<&str>,
    max_tasks: i32,
) -> Result<CreateOutcome> {
    let (id, created_at) = NewTask::new_id();
    let new = new.into_task(user_id, id, created_at);
    let create = CreateTask {
        task: new.clone(),
        key: key.map(Into::into),
        max_tasks,
    };
    let rows = match db.batch_write(&db.database.batchers.create, create).await {
        // The ID is unique to this call, so the first attempt of a retried insert took effect.
        Err(error) if error.is(&SqlState::UNIQUE_VIOLATION) => {
            return Ok(CreateOutcome::Task(new));
        }
        rows => rows?,
    };
    let Some(row) = rows.first() else {
        // A repeated insert whose first attempt took the last place in the list finds it full.
        if get(db, user_id, id).await?.is_some() {
            return Ok(CreateOutcome::Task(new));
        }
        let user = db.read(Sql::UsersGet, &[&user_id]).await?;
        return Ok(match user.is_empty() {
            true => CreateOutcome::NoSuchUser,
            false => CreateOutcome::QuotaExceeded,
        });
    };
    if row.get::<_, Uuid>("id") == id {
        if key.is_some() {
            trim_keys(db, user_id).await;
        }
        return Ok(CreateOutcome::Task(new));
    }
    let stored: Task = task(user_id, row);
    let has_same_values = stored.title == new.title
        && stored.description == new.description
        && stored.completed == new.completed;
    match has_same_values {
        true => Ok(CreateOutcome::Task(stored)),
        false => Ok(CreateOutcome::KeyReused),
    }
}

/// Deletes the user's surplus keys in one of a hundred calls, to reduce the cost.
async fn trim_keys(db: Queries<'_>, user_id: Uuid) {
    if fastrand::u8(..100) == 0
        && let Err(error) = db.execute(Sql::IdempotencyKeysTrim, &[&user_id]).await
    {
        warn!("cannot delete surplus idempotency keys: {error:?}");
    }
}

pub(super) struct CreateTask {
    task: Task,
    key: Option<Box<str>>,
    max_tasks: i32,
}

impl BatchWrite for CreateTask {
    const IS_INSERT: bool = true;

    fn user_id(&self) -> Uuid {
        self.task.user_id
    }

    async fn write_batch(
        lease: &mut Lease,
        deadline: Deadline,
        writes: &[Arc<Self>],
    ) -> Result<Vec<Row>> {
        let params: Params = &[
            &column(writes, |write| write.task.user_id),
            &column(writes, |write| write.task.id),
            &column(writes, |write| &write.task.title),
            &column(writes, |write| &write.task.description),
            &column(writes, |write| write.task.completed),
            &column(writes, |write| write.task.created_at.0),
            &column(writes, |write| write.max_tasks),
            &column(writes, |write| write.key.as_deref()),
        ];
        lease.query(deadline, Sql::TasksCreateBatch, params).await
    }

    async fn write_alone(&self, db: Queries<'_>, repeat: Repeat) -> Result<Vec<Row>> {
        let params: Params = &[
            &self.task.user_id,
            &self.task.id,
            &self.task.title,
            &self.task.description,
            &self.task.completed,
            &self.task.created_at.0,
            &self.max_tasks,
            &self.key,
        ];
        let (sql, params) = match self.key {
            Some(_) => (Sql::TasksCreateIdempotent, params),
            None => (Sql::TasksCreate, &params[..7]),
        };
        db.write_tasks(repeat, self.user_id(), sql, params).await
    }
}

/// Creates a task under an ID that the client chose and that encodes this time.
pub(crate) async fn create_with_id(
    db: Queries<'_>,
    user_id: Uuid,
    (id, created_at): (Uuid, Rfc3339),
    new: NewTask,
    max_tasks: i32,
) -> Result<CreateOutcome> {
    let new = new.into_task(user_id, id, created_at);
    let params: Params = &[
        &user_id,
        &id,
        &new.title,
        &new.description,
        &new.completed,
        &created_at.0,
        &max_tasks,
    ];
    let written = db.write_tasks(Repeat::Never, user_id, Sql::TasksCreateWithId, params);
    let rows = written.await?;
    let row = rows.first();
    if let Some(updated_at) = row.and_then(|row| row.get("updated_at")) {
        let updated_at = Rfc3339(updated_at);
        return Ok(CreateOutcome::Task(Task { updated_at, ..new }));
    }
    let Some(count) = row.and_then(|row| row.get::<_, Option<i32>>("tasks")) else {
        return Ok(CreateOutcome::NoSuchUser);
    };
    Ok(match get(db, user_id, id).await? {
        None if count >= max_tasks => CreateOutcome::QuotaExceeded,
        existing => CreateOutcome::IdTaken(existing.map(|task| task.updated_at.0)),
    })
}
