//! Statements that change or delete tasks.

use std::sync::Arc;

use jiff::Timestamp;
use tokio_postgres::Row;
use uuid::Uuid;

use super::batch::column;
use super::lease::{Lease, Params};
use super::retry::Repeat;
use super::statements::Sql;
use super::task_writes::BatchWrite;
use super::tasks::task;
use super::{Deadline, Queries, Result};
use crate::domain::{Completion, Description, Task, TaskChange, Title};

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
    /// Reads the row returned by a write; `done` returns `None` if the task was not changed.
    fn from_rows(rows: &[Row], done: impl Fn(&Row) -> Option<T>) -> Self {
        match rows.first().map(|row| (done(row), row)) {
            Some((Some(done), _)) => Self::Done(done),
            Some((None, row)) if row.get("version_mismatch") => Self::VersionMismatch,
            _ => Self::NotFound,
        }
    }
}

/// Changes a task if its version matches `versions`.
pub(crate) async fn update(
    db: Queries<'_>,
    user_id: Uuid,
    id: Uuid,
    change: TaskChange,
    versions: Versions,
) -> Result<Conditional<Task>> {
    let is_conditional = !matches!(versions, Versions::Any);
    let update = UpdateTask {
        user_id,
        id,
        change,
        versions,
    };
    let rows = match is_conditional {
        true => update.write_alone(db, Repeat::Never).await?,
        false => db.batch_write(&db.database.batchers.update, update).await?,
    };
    Ok(Conditional::from_rows(&rows, |row| {
        row.get::<_, Option<Uuid>>("id").map(|_| task(user_id, row))
    }))
}

/// Deletes a task if its version matches `versions`.
pub(crate) async fn delete(
    db: Queries<'_>,
    user_id: Uuid,
    id: Uuid,
    versions: Versions,
) -> Result<Conditional<()>> {
    let is_conditional = !matches!(versions, Versions::Any);
    let delete = DeleteTask {
        user_id,
        id,
        versions,
    };
    let rows = match is_conditional {
        true => delete.write_alone(db, Repeat::Never).await?,
        false => db.batch_write(&db.database.batchers.delete, delete).await?,
    };
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

pub(super) struct UpdateTask {
    user_id: Uuid,
    id: Uuid,
    change: TaskChange,
    versions: Versions,
}

impl UpdateTask {
    fn title(&self) -> Option<&str> {
        self.change.title.as_ref().map(Title::as_str)
    }

    /// Whether to change the description.
    fn sets_description(&self) -> bool {
        self.change.description.is_some()
    }

    fn description(&self) -> Option<&str> {
        let description = self.change.description.as_ref()?.as_ref();
        description.map(Description::as_str)
    }

    fn toggles(&self) -> bool {
        self.change.completed == Some(Completion::Toggle)
    }

    fn completed(&self) -> Option<bool> {
        match self.change.completed {
            Some(Completion::Set(completed)) => Some(completed),
            _ => None,
        }
    }
}

impl BatchWrite for UpdateTask {
    const IS_INSERT: bool = false;

    fn user_id(&self) -> Uuid {
        self.user_id
    }

    async fn write_batch(
        lease: &mut Lease,
        deadline: Deadline,
        writes: &[Arc<Self>],
    ) -> Result<Vec<Row>> {
        let params: Params = &[
            &column(writes, |write| write.user_id),
            &column(writes, |write| write.id),
            &column(writes, |write| write.title()),
            &column(writes, |write| write.sets_description()),
            &column(writes, |write| write.description()),
            &column(writes, |write| write.toggles()),
            &column(writes, |write| write.completed()),
        ];
        lease.query(deadline, Sql::TasksUpdateBatch, params).await
    }

    async fn write_alone(&self, db: Queries<'_>, repeat: Repeat) -> Result<Vec<Row>> {
        let (versions, one_of) = self.versions.params();
        let params: Params = &[
            &self.user_id,
            &self.id,
            &self.title(),
            &self.sets_description(),
            &self.description(),
            &self.toggles(),
            &self.completed(),
            &versions,
            &one_of,
        ];
        db.write_tasks(repeat, self.user_id, Sql::TasksUpdate, params)
            .await
    }
}

pub(super) struct DeleteTask {
    user_id: Uuid,
    id: Uuid,
    versions: Versions,
}

impl BatchWrite for DeleteTask {
    const IS_INSERT: bool = false;

    fn user_id(&self) -> Uuid {
        self.user_id
    }

    async fn write_batch(
        lease: &mut Lease,
        deadline: Deadline,
        writes: &[Arc<Self>],
    ) -> Result<Vec<Row>> {
        let params: Params = &[
            &column(writes, |write| write.user_id),
            &column(writes, |write| write.id),
        ];
        lease.query(deadline, Sql::TasksDeleteBatch, params).await
    }

    async fn write_alone(&self, db: Queries<'_>, repeat: Repeat) -> Result<Vec<Row>> {
        let (versions, one_of) = self.versions.params();
        let params: Params = &[&self.user_id, &self.id, &versions, &one_of];
        db.write_tasks(repeat, self.user_id, Sql::TasksDelete, params)
            .await
    }
}
