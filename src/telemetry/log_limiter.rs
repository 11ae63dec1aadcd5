//! Limits the number of log lines about rejected and slow requests, so that one client cannot fill
//! the disk or make the journal drop the lines about other clients.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use log::{Level, log, log_enabled, warn};
use parking_lot::Mutex;

/// How many lines of each kind a client network may cause in each [`WINDOW`].
const MAX_LINES: u64 = 10;
const WINDOW: Duration = Duration::from_secs(1);
/// The maximum number of networks that are counted separately in a window, at about 100 bytes each.
/// All other networks are counted together.
const MAX_NETWORKS: usize = 1000;

/// Why a request is logged.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum LineKind {
    /// Authentication failed.
    Authentication,
    /// The request was slow.
    Slow,
    /// The service or its database had no capacity for the request. All clients share a limit,
    /// because an outage affects all of them.
    Capacity,
}

/// Writes lines up to a limit, then one line at the end of the window with the number of suppressed
/// lines.
#[derive(Clone, Default)]
pub(crate) struct LogLimiter(Arc<Mutex<Window>>);

/// The lines of this window by network; `None` stands for several networks.
type Window = HashMap<(LineKind, Option<IpAddr>), Lines>;

struct Lines {
    count: u64,
    /// The client of the last line.
    client: IpAddr,
}

impl LogLimiter {
    /// Logs a line at WARN, or at DEBUG if it exceeds the limit of the client's network.
    pub(crate) fn warn(
        &self,
        kind: LineKind,
        network: IpAddr,
        client: IpAddr,
        line: impl FnOnce() -> String,
    ) {
        let mut lines = self.0.lock();
        if lines.is_empty() {
            let limiter = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(WINDOW).await;
                limiter.end_window();
            });
        }
        let mut key = (kind, Some(network).filter(|_| kind != LineKind::Capacity));
        if lines.len() >= MAX_NETWORKS && !lines.contains_key(&key) {
            key = (kind, None);
        }
        let entry = lines.entry(key).or_insert(Lines { count: 0, client });
        entry.count += 1;
        entry.client = client;
        let level = match entry.count <= MAX_LINES {
            true => Level::Warn,
            false => Level::Debug,
        };
        drop(lines);
        if log_enabled!(level) {
            log!(level, "{}", line());
        }
    }

    /// Logs how many lines were suppressed in this window, and begins the next one.
    pub(crate) fn end_window(&self) {
        let lines = std::mem::take(&mut *self.0.lock());
        for ((kind, network), Lines { count, client }) in lines {
            let suppressed = count.saturating_sub(MAX_LINES);
            if suppressed == 0 {
                continue;
            }
            let lines = match kind {
                LineKind::Authentication => "authentication failures",
                LineKind::Capacity => "refused requests",
                LineKind::Slow => "slow requests",
            };
            match network {
                Some(_) => warn!("{lines} suppressed count={suppressed} client={client}"),
                None => warn!("{lines} suppressed count={suppressed}"),
            }
        }
    }
}
