//! Runs every statement in READ COMMITTED. If the server, database or role has another default, each
//! statement is sent between BEGIN and COMMIT, pipelined, because a session setting would not survive
//! a transaction pooler.
//!
//! The default is read when a connection is opened. If it changes later, or differs between the
//! backends of a pooler, a statement fails with a serialization failure, which cannot occur in READ
//! COMMITTED, and is retried inside a transaction.

use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::join3;
use log::warn;
use tokio_postgres::{Client, Error};

/// Opens a transaction in READ COMMITTED.
pub(super) const BEGIN: &str = "begin isolation level read committed";

/// Whether statements need an explicit transaction. Once set, it remains set until a restart.
#[derive(Default)]
pub(super) struct Isolation {
    explicit: AtomicBool,
}

impl Isolation {
    pub(super) fn is_explicit(&self) -> bool {
        self.explicit.load(Ordering::Relaxed)
    }

    /// Reads the default isolation level of a new connection.
    pub(super) async fn detect(&self, client: &Client) -> Result<(), Error> {
        const NAME: &str = "default_transaction_isolation";
        let row = client.query_typed_one(&format!("show {NAME}"), &[]).await?;
        let default: &str = row.get(NAME);
        if default != "read committed" {
            self.require_transactions(&format!("{NAME} is {default}"));
        }
        Ok(())
    }

    /// Records that a connection has a different default.
    pub(super) fn require_transactions(&self, reason: &str) {
        if !self.explicit.swap(true, Ordering::Relaxed) {
            warn!(
                "the database's default isolation level is not read committed ({reason}): every statement now opens a transaction, which is slower; to avoid that, set default_transaction_isolation of the role to 'read committed' and restart the service"
            );
        }
    }
}

/// Runs a statement in READ COMMITTED: alone, or, if `explicit`, between BEGIN and COMMIT.
pub(super) async fn read_committed<T>(
    explicit: bool,
    client: &Client,
    query: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    if !explicit {
        return query.await;
    }
    // The futures are polled in this order, and each one sends its message when first polled. Boxed
    // to keep the future of the common case small.
    let begin = client.batch_execute(BEGIN);
    let commit = client.batch_execute("commit");
    let (_, result, committed) = Box::pin(join3(begin, query, commit)).await;
    let value = result?;
    committed.map(|()| value)
}
