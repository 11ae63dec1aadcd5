//! The embedded PostgreSQL, which the service runs if `DATABASE_URL` is unset.
//!
//! `DATA_DIR` contains:
//!
//! | name | content |
//! |---|---|
//! | `lock` | locked while a service uses this directory |
//! | `cluster/` | PostgreSQL's data directory |
//! | `socket/` | the only address that PostgreSQL listens on (in a temporary directory if this path is too long for a socket) |
//! | `pg_hba.conf`, `pg_ident.conf` | the rules that say who can connect |
//! | `postgres.log` | PostgreSQL's log |
//! | `jwt-secret` | the secret that signs tokens, created at the first start |
//!
//! A supervisor restarts the server if it ends unexpectedly. A server that is still running after
//! the service crashed is stopped before the next one is started.

mod access;
mod child;
mod cluster;
mod data_dir;
mod file;
mod install;
mod os_user;
mod server;
mod supervisor;

use std::{
    io,
    path::Path,
    process::{Output, Stdio},
    time::Duration,
};

use log::{error, info};
use tokio::{process::Command, sync::oneshot, task::JoinHandle, time::timeout};

pub use child::become_child;
use cluster::Cluster;
pub use data_dir::{default_data_dir, jwt_secret};
use install::Installation;
use os_user::OsUser;

const SUPERUSER: &str = "todo";
const DATABASE: &str = "todo";

/// Why the embedded PostgreSQL is unavailable: one line for the operator.
type Error = String;

/// Names the failed operation and its path.
fn path_error(operation: &str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let operation = format!("cannot {operation} {}", path.display());
    move |error| format!("{operation}: {error}")
}

/// A running embedded PostgreSQL.
pub struct Postgres {
    cluster: Cluster,
    /// Dropping it makes the supervisor stop the server.
    stop: oneshot::Sender<()>,
    supervisor: JoinHandle<()>,
}

impl Postgres {
    /// Starts PostgreSQL, in a new cluster if there is none, and waits until it accepts connections.
    pub async fn start(data_dir: &Path) -> Result<Postgres, Error> {
        Postgres::start_with(data_dir, &[]).await
    }

    /// Like [`Postgres::start`], with additional settings, such as `("max_connections", "300")`.
    pub async fn start_with(data_dir: &Path, settings: &[(&str, &str)]) -> Result<Postgres, Error> {
        let existing = data_dir::existing_ancestor(data_dir);
        let (data_dir, os_user) = data_dir::create(data_dir)?;
        let lock = data_dir::lock(&data_dir).await?;
        let cluster = match Cluster::open(data_dir.clone(), os_user, settings).await {
            Err(error) if !data_dir.join("cluster").exists() => {
                data_dir::remove_new(&data_dir, &existing);
                return Err(error);
            }
            opened => opened?,
        };
        let (version, directory) = (&cluster.installation.version, cluster.directory.display());
        info!("starting embedded PostgreSQL {version} in {directory}");
        let server = cluster.launch().await?;
        let (stop, stopped) = oneshot::channel();
        let supervise = supervisor::supervise(cluster.clone(), server, stopped, lock);
        let supervisor = tokio::spawn(supervise);
        Ok(Postgres {
            cluster,
            stop,
            supervisor,
        })
    }

    /// The configuration of a connection through the socket, without a password.
    pub fn config(&self) -> tokio_postgres::Config {
        socket_config(&self.cluster.socket_dir, DATABASE)
    }

    /// The directory of the socket.
    pub fn socket_dir(&self) -> &Path {
        &self.cluster.socket_dir
    }

    /// The absolute path of the directory that contains the cluster, the log and the secret.
    pub fn data_dir(&self) -> &Path {
        &self.cluster.data_dir
    }

    /// PostgreSQL's version, such as `15.8`.
    pub fn version(&self) -> &str {
        &self.cluster.installation.version
    }

    /// Shuts PostgreSQL down and waits until it has ended.
    pub async fn stop(self) {
        drop(self.stop);
        // A supervisor that panicked has dropped its server, which signals it to stop.
        if let Err(error) = self.supervisor.await {
            error!("the supervisor of embedded PostgreSQL failed: {error}");
        }
    }
}

/// Returns the version of PostgreSQL that [`Postgres::start`] would run, or the error that it would
/// return. Creates nothing.
pub async fn dry_run(data_dir: &Path) -> Result<String, Error> {
    if data_dir.exists() {
        data_dir::check(data_dir)?;
    } else {
        data_dir::check_missing(data_dir)?;
    }
    Ok(Installation::find(&data_dir.join("cluster")).await?.version)
}

/// Whether `data_dir` contains a cluster.
pub fn has_cluster(data_dir: &Path) -> bool {
    data_dir.join("cluster").exists()
}

/// The configuration of a connection to the embedded PostgreSQL that runs in `data_dir`, or `None`
/// if none is running.
pub fn running_config(data_dir: &Path) -> Result<Option<tokio_postgres::Config>, Error> {
    if !data_dir.exists() {
        return Ok(None);
    }
    let (data_dir, _) = data_dir::check(data_dir)?;
    if !data_dir::is_locked(&data_dir) {
        return Ok(None);
    }
    let pid_file = file::read(&data_dir.join("cluster/postmaster.pid")).unwrap_or_default();
    // The fifth line is the socket directory.
    let socket_dir = pid_file.lines().nth(4);
    Ok(socket_dir.map(|directory| socket_config(Path::new(directory), DATABASE)))
}

fn socket_config(socket_dir: &Path, database: &str) -> tokio_postgres::Config {
    let mut config = tokio_postgres::Config::new();
    config
        .host_path(socket_dir)
        .user(SUPERUSER)
        .dbname(database)
        .application_name("todo-api");
    config
}

/// Runs a program and returns its output. Kills it at the timeout.
async fn run(mut command: Command, time_limit: Duration) -> io::Result<Output> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(time_limit, command.output()).await;
    output.map_err(|_| io::Error::other(format!("still running after {time_limit:?}")))?
}
