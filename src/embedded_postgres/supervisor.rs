//! Restarts PostgreSQL when it ends unexpectedly.

use std::{fs::File, time::Duration};

use log::{error, info, warn};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep},
};

use super::{Cluster, server::Server};

const MIN_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// A server that has run for this long resets the backoff.
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
        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        error!("embedded PostgreSQL ended unexpectedly ({status}), restarting it");
        if started.elapsed() > BACKOFF_RESET {
            backoff = MIN_BACKOFF;
        }
        server = tokio::select! {
            server = relaunch(&cluster, &mut backoff) => server,
            _ = &mut stop => {
                // Waits for the end of a server that the abandoned launch has signalled to stop.
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

/// Launches the server, retrying with exponential backoff until it runs.
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
