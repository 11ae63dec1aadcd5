//! Restarts PostgreSQL when it dies.

use std::{fs::File, io, process::ExitStatus, time::Duration};

use log::{error, info, warn};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep},
};

use super::{Cluster, server::Server};

const MIN_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// A server that ran this long did start well: the backoff begins again.
const BACKOFF_RESET: Duration = Duration::from_secs(60);

/// Keeps PostgreSQL running until `stop` is dropped, then shuts it down. Holds the lock until then.
pub(super) async fn supervise(
    cluster: Cluster,
    mut server: Server,
    mut stop: oneshot::Receiver<()>,
    _lock: File,
) {
    let mut backoff = MIN_BACKOFF;
    loop {
        let started = Instant::now();
        let status = tokio::select! {
            _ = &mut stop => break,
            status = server.wait() => status,
        };
        if started.elapsed() > BACKOFF_RESET {
            backoff = MIN_BACKOFF;
        }
        error!(
            "embedded PostgreSQL ended unexpectedly ({}), restarting it",
            outcome(status)
        );
        server = tokio::select! {
            server = relaunch(&cluster, &mut backoff) => server,
            _ = &mut stop => {
                // The start that was abandoned has been signalled to stop; this waits for it.
                if let Err(error) = cluster.stop_stale_server().await {
                    warn!("{error}");
                }
                return cluster.remove_external_socket_dir();
            }
        };
        info!("embedded PostgreSQL is running again");
    }
    server.shut_down().await;
    cluster.remove_external_socket_dir();
}

/// Retries until the server runs, with a longer pause after each attempt.
async fn relaunch(cluster: &Cluster, backoff: &mut Duration) -> Server {
    loop {
        sleep(*backoff).await;
        *backoff = (*backoff * 2).min(MAX_BACKOFF);
        match cluster.launch().await {
            Ok(server) => return server,
            Err(error) => warn!("{error}; retrying in {} ms", backoff.as_millis()),
        }
    }
}

fn outcome(status: io::Result<ExitStatus>) -> String {
    status.map_or_else(|error| error.to_string(), |status| status.to_string())
}
