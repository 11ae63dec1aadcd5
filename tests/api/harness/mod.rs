//! The test harness: servers, databases, and an HTTP client.
//!
//! Servers are child processes of the real binary and listen on ports that the system chooses.
//! Tests share a PostgreSQL server, on which each has its own database, cloned from a migrated template.
//! Each module depends only on those listed before it.

mod scratch;

mod database;
mod process;
mod request;
mod wire;

mod user;

mod server;

mod mail;

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use tokio::time::sleep;

pub(crate) use database::{Database, Lock};
pub(crate) use mail::{MailServer, PUBLIC_URL};
pub(crate) use process::Process;
pub(crate) use request::{Request, Response};
pub(crate) use scratch::{DataDir, is_alive};
pub(crate) use server::Server;
pub(crate) use user::{User, base64url, claims, forge};
pub(crate) use wire::{Wire, WireResponse, head};

/// The default `JWT_SECRET` of test servers.
pub(crate) const SECRET: &str = "a secret of the tests, and 32 bytes or more of it";
/// The password of every user that the harness registers.
pub(crate) const PASSWORD: &str = "mossy-Lantern-42-harbour";

/// The hash of [`PASSWORD`] with the default `BCRYPT_COST` of test servers.
const PASSWORD_HASH: &str = "$2b$10$abcdefghijklmnopqrstuut26eJFqvnNaaoES.5d8lrd.gefLe/hW";

const WAIT_TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Returns a number that is unique within this run.
pub(crate) fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Polls until the condition holds; panics with its description after 30 seconds.
pub(crate) async fn until(description: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + WAIT_TIMEOUT;
    while !condition().await {
        assert!(
            Instant::now() < deadline,
            "not within {WAIT_TIMEOUT:?}: {description}"
        );
        sleep(POLL_INTERVAL).await;
    }
}
