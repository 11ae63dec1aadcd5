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
    stop: oneshot::Receiver<()>,
    _lock: File,
) {
    let restart = async {
        let mut backoff = MIN_BACKOFF;
        loop {
            let started = Instant::now();
            let status = match server.wait().await {
                Ok(status) => status.to_string(),
                Err(error) => error.to_string(),
            };
            error!("embedded PostgreSQL ended unexpectedly ({status}); restarting it");
            if started.elapsed() > BACKOFF_RESET {
                backoff = MIN_BACKOFF;
            }
            server = relaunch(&cluster, &mut backoff).await;
            info!("embedded PostgreSQL is running again");
        }
    };
    tokio::select! {
        () = restart => {}
        _ = stop => {}
    }
    server.shut_down().await;
    // Waits for a server that an abandoned launch has signalled to stop.
    if let Err(error) = cluster.stop_stale_server().await {
        warn!("{error}");
    }
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
