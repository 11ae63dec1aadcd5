//! Statements that create tasks.

use jiff::Timestamp;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

use super::lease::Params;
use super::retry::Repeat;
use super::statements::Sql;
use super::tasks::{get, task};
use super::{Queries, Result};
use crate::domain::{Description, NewTask, Rfc3339, Task};

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
    let title = new.title.as_str();
    let description = new.description.as_ref().map(Description::as_str);
    let params: Params = &[
        &user_id,
        &id,
        &title,
        &description,
        &new.completed,
        &created_at.0,
        &max_tasks,
        &key,
        // Deletes the user's surplus keys in one of a hundred requests, to reduce the cost.
        &(fastrand::u8(..100) == 0),
    ];
    let created = || Task {
        id,
        user_id,
        title: title.to_owned(),
        description: description.map(str::to_owned),
        completed: new.completed,
        created_at,
        updated_at: created_at,
    };
    let (sql, params) = match key {
        None => (Sql::TasksCreate, &params[..7]),
        Some(_) => (Sql::TasksCreateIdempotent, params),
    };
    let written = db.write_tasks(Repeat::Insert, user_id, sql, params);
    let rows = match written.await {
        Err(error) if error.is(&SqlState::FOREIGN_KEY_VIOLATION) => Vec::new(),
        // The ID is unique to this call, so the first attempt of a retried insert took effect.
        Err(error) if error.is(&SqlState::UNIQUE_VIOLATION) => {
            return Ok(CreateOutcome::Task(created()));
        }
        rows => rows?,
    };
    let Some(row) = rows.first() else {
        let user = db.read(Sql::UsersGet, &[&user_id]).await?;
        return Ok(match user.is_empty() {
            true => CreateOutcome::NoSuchUser,
            false => CreateOutcome::QuotaExceeded,
        });
    };
    if key.is_none() {
        return Ok(CreateOutcome::Task(created()));
    }
    let task = task(row);
    let values = (title, description, new.completed);
    match (&*task.title, task.description.as_deref(), task.completed) == values {
        true => Ok(CreateOutcome::Task(task)),
        false => Ok(CreateOutcome::KeyReused),
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
    let title = new.title.as_str();
    let description = new.description.as_ref().map(Description::as_str);
    let params: Params = &[
        &user_id,
        &id,
        &title,
        &description,
        &new.completed,
        &created_at.0,
        &max_tasks,
    ];
    let written = db.write_tasks(Repeat::Never, user_id, Sql::TasksCreateWithId, params);
    let rows = written.await?;
    let row = rows.first();
    if let Some(updated_at) = row.and_then(|row| row.get("updated_at")) {
        return Ok(CreateOutcome::Task(Task {
            id,
            user_id,
            title: title.to_owned(),
            description: description.map(str::to_owned),
            completed: new.completed,
            created_at,
            updated_at: Rfc3339(updated_at),
        }));
    }
    let Some(count) = row.and_then(|row| row.get::<_, Option<i32>>("tasks")) else {
        return Ok(CreateOutcome::NoSuchUser);
    };
    Ok(match get(db, user_id, id).await? {
        None if count >= max_tasks => CreateOutcome::QuotaExceeded,
        existing => CreateOutcome::IdTaken(existing.map(|task| task.updated_at.0)),
    })
}
