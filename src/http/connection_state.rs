//! The state of one connection, shared by its socket, its service and the connection table.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use hyper::body::{Body as _, Incoming};
use tokio::sync::Notify;
use tokio::time::Instant;

const CHUNKED: u64 = u64::MAX;

/// The state of one connection.
#[derive(Default)]
pub(crate) struct ConnectionState {
    /// When the connection became idle, as returned by [`uptime`]; 0 while it is not idle.
    idle_since: AtomicU64,
    evicted: Notify,
    /// Whether at least one request has been received.
    used: AtomicBool,
    /// Whether a request is in progress: from the end of its head until its response is written.
    busy: AtomicBool,
    /// Whether the response is ready but not yet written.
    responded: AtomicBool,
    /// The length of the current request's body, or [`CHUNKED`].
    body_length: AtomicU64,
    malformed: AtomicBool,
}

impl ConnectionState {
    /// Whether no request has been received yet.
    pub(crate) fn is_unused(&self) -> bool {
        !self.used.load(Relaxed)
    }

    /// Records that hyper has parsed a request. Returns the error that the framer found in its
    /// head, if any.
    pub(crate) fn on_request(&self, body: &Incoming) -> Option<&'static str> {
        self.used.store(true, Relaxed);
        self.responded.store(false, Relaxed);
        self.set_body_length(body.size_hint().exact());
        self.take_malformed().then_some(
            "a line of the head ends in a bare CR or LF, or Content-Length is there twice",
        )
    }

    /// Records that the response is ready.
    pub(crate) fn on_response(&self) {
        self.responded.store(true, Relaxed);
    }

    /// Records that a complete request head has arrived.
    pub(crate) fn on_head(&self) {
        self.busy.store(true, Relaxed);
    }

    /// Records that all pending output was written. Returns whether that completes a response.
    pub(crate) fn on_flushed(&self) -> bool {
        let is_complete = self.responded.swap(false, Relaxed);
        if is_complete {
            self.busy.store(false, Relaxed);
        }
        is_complete
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.busy.load(Relaxed)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.idle_since.load(Relaxed) > 0
    }

    /// How long the connection has been idle; `None` from the first byte of a request to the end of
    /// its response.
    pub(crate) fn idle_time(&self) -> Option<Duration> {
        let since = self.idle_since.load(Relaxed);
        (since > 0).then(|| Duration::from_micros(uptime().saturating_sub(since)))
    }

    pub(crate) fn set_idle(&self, idle: bool) {
        if idle != self.is_idle() {
            let since = if idle { uptime() } else { 0 };
            self.idle_since.store(since, Relaxed);
        }
    }

    /// The length of the current request's body; `None` if it is chunked.
    pub(crate) fn body_length(&self) -> Option<u64> {
        Some(self.body_length.load(Relaxed)).filter(|length| *length != CHUNKED)
    }

    pub(crate) fn set_body_length(&self, length: Option<u64>) {
        self.body_length.store(length.unwrap_or(CHUNKED), Relaxed);
    }

    /// Marks the current or next request as malformed.
    pub(crate) fn set_malformed(&self) {
        self.malformed.store(true, Relaxed);
    }

    pub(crate) fn take_malformed(&self) -> bool {
        self.malformed.swap(false, Relaxed)
    }

    /// Makes the connection close if it is still idle.
    pub(crate) fn evict(&self) {
        self.evicted.notify_one();
    }

    /// Returns once the connection should be evicted.
    pub(crate) async fn evicted(&self) {
        self.evicted.notified().await;
    }
}

/// Microseconds since the first connection, at least 1.
fn uptime() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed().as_micros() as u64 + 1
}
