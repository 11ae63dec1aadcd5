//! How writes of tasks run: together with others of their kind, or alone.

use std::sync::Arc;

use tokio_postgres::Row;
use uuid::Uuid;

use super::batch::{BatchQuery, Batcher};
use super::lease::{Lease, Params};
use super::retry::Repeat;
use super::statements::Sql;
use super::{DbError, Deadline, Queries, Result};

/// A write of one task that can share a statement with others of its kind.
///
/// The statement of a batch waits for no lock. A write whose list or task is locked gets no row, and
/// neither does a write that the statement cannot do, for example because the task does not exist.
/// It then runs alone.
pub(super) trait BatchWrite: Send + Sync + 'static {
    /// Whether the write inserts a row under an ID chosen by the caller, so that it may run again.
    const IS_INSERT: bool;

    /// The owner of the task.
    fn user_id(&self) -> Uuid;

    /// Runs several writes; see [`BatchQuery::execute`].
    fn write_batch(
        lease: &mut Lease,
        deadline: Deadline,
        writes: &[Arc<Self>],
    ) -> impl Future<Output = Result<Vec<Row>>> + Send;

    /// Runs this write in a statement of its own, which may wait for locks.
    fn write_alone(
        &self,
        db: Queries<'_>,
        repeat: Repeat,
    ) -> impl Future<Output = Result<Vec<Row>>> + Send;
}

impl<W: BatchWrite> BatchQuery for Arc<W> {
    const IS_WRITE: bool = true;
    /// There are three kinds of writes.
    const MAX_WORKERS: usize = 3;
    const MAX_ROWS: usize = 64;

    fn max_rows(&self) -> usize {
        1
    }

    fn user_id(&self) -> Uuid {
        W::user_id(self)
    }

    async fn execute(lease: &mut Lease, deadline: Deadline, writes: &[Self]) -> Result<Vec<Row>> {
        W::write_batch(lease, deadline, writes).await
    }
}

impl Queries<'_> {
    /// Runs a write together with others of its kind, or alone if there are none, if the batch did not
    /// include it, if the server rejected the batch, or if other writes of this user run alone.
    pub(super) async fn batch_write<W: BatchWrite>(
        self,
        batcher: &Batcher<Arc<W>>,
        write: W,
    ) -> Result<Vec<Row>> {
        let write = Arc::new(write);
        // Batches would overtake the user's writes that wait for the lock of the list, again and again.
        let is_user_alone = self.database.connections.is_writing_alone(write.user_id());
        // One write takes the statement of a batch almost twice as long as its own.
        let (_in_progress, is_idle) = batcher.begin();
        let written = match is_idle || is_user_alone {
            true => Ok(Vec::new()),
            false => self.batch(batcher, write.clone()).await,
        };
        let unknown = match written {
            Ok(rows) if !rows.is_empty() => {
                self.record_revision(write.user_id(), &rows);
                return Ok(rows);
            }
            Ok(_) | Err(DbError::Refused(_)) => None,
            Err(error @ DbError::ConnectionLost(_)) if W::IS_INSERT => Some(error),
            Err(error) => return Err(error),
        };
        let repeat = match W::IS_INSERT {
            true => Repeat::Insert(unknown),
            false => Repeat::Never,
        };
        write.write_alone(self, repeat).await
    }

    /// Runs a write of this user's tasks alone, and wakes the watchers of their list. The number of
    /// concurrent writes of one user is limited.
    pub(super) async fn write_tasks(
        self,
        repeat: Repeat,
        user_id: Uuid,
        sql: Sql,
        params: Params<'_>,
    ) -> Result<Vec<Row>> {
        let (connections, deadline) = (&self.database.connections, self.deadline);
        // Each attempt has its own permit: the user's other writes need not wait during the backoff.
        let attempt = || async {
            let _permit = connections.acquire_task_write(user_id, deadline).await?;
            let mut lease = connections.acquire(deadline).await?;
            lease.query(deadline, sql, params).await
        };
        // On the heap, so that idle connections of clients keep no room for it.
        let rows = Box::pin(connections.retry(deadline, repeat, attempt)).await?;
        self.record_revision(user_id, &rows);
        Ok(rows)
    }
}
