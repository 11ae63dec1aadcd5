//! The signals that shut the service down.

use std::io;

use futures_util::future::select_all;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGINT, SIGTERM, SIGHUP and SIGQUIT, received from the creation of this value on.
pub(crate) struct ShutdownSignals(Vec<Signal>);

impl ShutdownSignals {
    pub(crate) fn listen() -> io::Result<Self> {
        let mut kinds = vec![
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::quit(),
        ];
        if !ignores_hangup() {
            kinds.push(SignalKind::hangup());
        }
        let signals: io::Result<_> = kinds.into_iter().map(signal).collect();
        signals.map(Self)
    }

    /// Waits for the first of the signals.
    pub(crate) async fn recv(&mut self) {
        select_all(self.0.iter_mut().map(|signal| Box::pin(signal.recv()))).await;
    }
}

/// Whether SIGHUP is ignored, as under `nohup`: a handler would undo that. Linux only.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        // Bit n - 1 is signal n, and SIGHUP is 1.
        .is_some_and(|mask| mask & 1 == 1)
}
