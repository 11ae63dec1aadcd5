//! Statements on a user's whole list: its revision and its changes.

use tokio_postgres::Row;
use uuid::Uuid;

use super::batch::{BatchQuery, column};
use super::lease::{Lease, Params};
use super::statements::Sql;
use super::tasks::task;
use super::{Deadline, Queries, Result};
use crate::domain::{DeletedTask, Rfc3339, Task};

/// A change of a list: its revision, and the task that it changed or deleted.
pub(crate) type Position = (i64, Uuid);

/// A task that was changed or deleted.
pub(crate) enum Change {
    Changed(Task),
    Deleted(DeletedTask),
}

/// The changes after a position, oldest first, and the state of the list.
pub(crate) struct Changes {
    pub(crate) changes: Vec<(Position, Change)>,
    pub(crate) revision: i64,
    /// The highest revision whose deletions have been purged.
    pub(crate) purged_revision: i64,
}

/// Reads the revision of a list. Returns `None` if the account was deleted.
pub(crate) async fn revision(db: Queries<'_>, user_id: Uuid) -> Result<Option<i64>> {
    let batcher = &db.database.batchers.revision;
    let rows = db.batch(batcher, GetRevision(user_id)).await?;
    Ok(rows.first().map(|row| row.get("revision")))
}

/// Reads up to `limit` changes after the position `after`, and deletions after `deleted_after`.
/// Returns `None` if the account was deleted.
pub(crate) async fn changes(
    db: Queries<'_>,
    user_id: Uuid,
    after: Position,
    deleted_after: Position,
    limit: i64,
) -> Result<Option<Changes>> {
    let params: Params = &[
        &user_id,
        &after.0,
        &after.1,
        &deleted_after.0,
        &deleted_after.1,
        &limit,
    ];
    let rows = db.read(Sql::TaskListsChanges, params).await?;
    let change = |row: &Row| {
        let position = (row.get::<_, Option<i64>>("revision")?, row.get("id"));
        let change = match row.get::<_, Option<_>>("deleted_at") {
            Some(deleted_at) => Change::Deleted(DeletedTask {
                id: position.1,
                deleted_at: Rfc3339(deleted_at),
            }),
            None => Change::Changed(task(user_id, row)),
        };
        Some((position, change))
    };
    let mut changes: Vec<_> = rows.iter().filter_map(change).collect();
    // SQL does not guarantee the order of these rows.
    changes.sort_by_key(|(position, _)| *position);
    Ok(rows.first().map(|row| Changes {
        changes,
        revision: row.get("list_revision"),
        purged_revision: row.get("purged_revision"),
    }))
}

/// Reads the revision of the list of this user.
pub(super) struct GetRevision(Uuid);

impl BatchQuery for GetRevision {
    const MAX_ROWS: usize = 64;

    fn max_rows(&self) -> usize {
        1
    }

    fn user_id(&self) -> Uuid {
        self.0
    }

    async fn execute(lease: &mut Lease, deadline: Deadline, queries: &[Self]) -> Result<Vec<Row>> {
        let user_ids = column(queries, |query| query.0);
        let params: Params = &[&user_ids];
        lease.query(deadline, Sql::TaskListsRevisions, params).await
    }
}
