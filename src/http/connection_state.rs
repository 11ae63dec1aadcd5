//! The state of one connection, shared by its socket, its service and the connection table.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};

use hyper::body::{Body as _, Incoming};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

const CHUNKED: u64 = u64::MAX;

// The phases of a connection, in order.
/// No request has been received yet.
const UNUSED: u8 = 0;
/// All responses have been written.
const WAITING: u8 = 1;
/// A request is in progress, from the end of its head.
const BUSY: u8 = 2;
/// The response is ready but not yet written.
const RESPONDED: u8 = 3;

/// The state of one connection.
#[derive(Default)]
pub(crate) struct ConnectionState {
    phase: AtomicU8,
    idle_since: Mutex<Option<Instant>>,
    evicted: Notify,
    /// The length of the current request's body, or [`CHUNKED`].
    body_length: AtomicU64,
    malformed: AtomicBool,
}

impl ConnectionState {
    /// Whether no request has been received yet.
    pub(crate) fn is_unused(&self) -> bool {
        self.phase.load(Relaxed) == UNUSED
    }

    /// Whether a request is in progress: from the end of its head until its response is written.
    pub(crate) fn is_busy(&self) -> bool {
        self.phase.load(Relaxed) >= BUSY
    }

    /// Records that a complete request head has arrived.
    pub(crate) fn on_head(&self) {
        self.phase.store(BUSY, Relaxed);
    }

    /// Records that hyper has parsed a request. Returns the error that the framer found in its
    /// head, if any.
    pub(crate) fn on_request(&self, body: &Incoming) -> Option<&'static str> {
        self.set_body_length(body.size_hint().exact());
        self.take_malformed()
            .then_some("a line of the head ends in a bare CR or LF, or Content-Length is repeated")
    }

    /// Records that the response is ready.
    pub(crate) fn on_response(&self) {
        self.phase.store(RESPONDED, Relaxed);
    }

    /// Records that all pending output was written. Returns whether that completes a response.
    pub(crate) fn on_flushed(&self) -> bool {
        let phase = &self.phase;
        let completed = phase.compare_exchange(RESPONDED, WAITING, Relaxed, Relaxed);
        completed.is_ok()
    }

    /// Since when the connection has been idle; `None` from the first byte of a request to the end
    /// of its response.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        *self.idle_since.lock()
    }

    pub(crate) fn set_idle(&self, idle: bool) {
        let mut since = self.idle_since.lock();
        if idle != since.is_some() {
            *since = idle.then(Instant::now);
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
