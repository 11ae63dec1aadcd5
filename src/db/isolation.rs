//! Every statement runs in READ COMMITTED, whatever the server's, database's or role's default is.
//!
//! Where that is the default, as nearly everywhere, a plain statement does, and this costs nothing.
//! Elsewhere each statement is sent between BEGIN and COMMIT, all in one flight: settings of a
//! session would not survive a transaction pooler. The default is looked up when a connection is
//! made, in the flight that prepares the statements. It may change later, and behind a pooler from
//! one backend to the next; then a statement fails with a serialization failure, which READ
//! COMMITTED does not have, and is retried inside BEGIN and COMMIT.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::join3;
use log::warn;
use tokio_postgres::{Client, Error, SimpleQueryMessage};

/// Opens a transaction in READ COMMITTED.
pub(super) const BEGIN: &str = "begin isolation level read committed";

/// Whether statements need a transaction of their own. Once they do, they do until a restart.
#[derive(Default)]
pub(super) struct Isolation {
    explicit: AtomicBool,
}

impl Isolation {
    pub(super) fn is_explicit(&self) -> bool {
        self.explicit.load(Ordering::Relaxed)
    }

    /// Looks up the default of a new connection.
    pub(super) async fn detect(&self, client: &Client) -> Result<(), Error> {
        for message in client
            .simple_query("show default_transaction_isolation")
            .await?
        {
            if let SimpleQueryMessage::Row(row) = message
                && let Some(default) = row.get(0).filter(|level| *level != "read committed")
            {
                self.is_not_read_committed(&format!("default_transaction_isolation is {default}"));
            }
        }
        Ok(())
    }

    /// Notes that the default of some connection is another.
    pub(super) fn is_not_read_committed(&self, reason: &str) {
        if !self.explicit.swap(true, Ordering::Relaxed) {
            warn!(
                "the database does not use read committed by default ({reason}): from now on every statement opens a transaction, which makes it slower; set default_transaction_isolation for the role to 'read committed' and restart the service to avoid that"
            );
        }
    }
}

/// Runs a statement in READ COMMITTED: as it is, or if `explicit` between BEGIN and COMMIT.
pub(super) async fn read_committed<T>(
    explicit: bool,
    client: &Client,
    query: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    if !explicit {
        return query.await;
    }
    // Each is sent when it is polled for the first time, in this order. Boxed, so that the usual
    // future is no larger for it.
    let begin = client.batch_execute(BEGIN);
    let commit = client.batch_execute("commit");
    let (_, result, committed) = Box::pin(join3(begin, query, commit)).await;
    let value = result?;
    committed.map(|()| value)
}
