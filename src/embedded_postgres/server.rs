//! Starting and stopping the server on a cluster.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use log::{info, warn};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};
use tokio_postgres::{NoTls, error::SqlState};

use super::{
    Cluster, DATABASE, Error,
    cluster::first_error_line,
    data_dir::SOCKET_NAME,
    file::{self, open_own},
    path_error, run, socket_config,
};

/// A log longer than this is rotated at the next start; one previous log is kept.
const LOG_LIMIT: u64 = 16 << 20;

/// Long enough to replay the WAL after a crash.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// Backends of a killed server exit immediately, unless they are running a query.
const STALE_BACKENDS_TIMEOUT: Duration = Duration::from_secs(30);
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(10);
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// The signals that shut the server down, and how long to wait after each one: fast, immediate
/// (nothing is lost, because the next start replays the WAL), kill.
const SHUTDOWN: [(Signal, Duration); 3] = [
    (Signal::INT, Duration::from_secs(10)),
    (Signal::QUIT, Duration::from_secs(6)),
    (Signal::KILL, Duration::from_secs(2)),
];

impl Cluster {
    /// Starts the server and waits until it accepts connections.
    pub(super) async fn launch(&self) -> Result<Server, Error> {
        self.stop_stale_server().await?;
        self.remove_socket()?;
        let data_dir = self.data_dir.display();
        let deadline = Instant::now() + STALE_BACKENDS_TIMEOUT;
        let mut server = loop {
            let mut server = self.spawn()?;
            let Err(reason) = server.wait_ready(&self.directory).await else {
                break server;
            };
            server.shut_down().await;
            // Backends of a killed server still use its shared memory.
            let stale_backends =
                reason.contains("shared memory block") || reason.contains("lock file");
            if !stale_backends || Instant::now() > deadline {
                let reason = format!("embedded PostgreSQL in {data_dir} does not start: {reason}");
                return Err(reason);
            }
            sleep(RETRY_INTERVAL).await;
        };
        let reason = match timeout(RESPONSE_TIMEOUT, self.create_database()).await {
            Ok(Ok(())) => return Ok(server),
            // The error itself prints only "db error".
            Ok(Err(error)) => std::error::Error::source(&error)
                .map_or_else(|| error.to_string(), |source| source.to_string()),
            Err(_) => "no response".into(),
        };
        server.shut_down().await;
        let reason = format!("embedded PostgreSQL in {data_dir} cannot be used: {reason}");
        Err(reason)
    }

    fn spawn(&self) -> Result<Server, Error> {
        let log_path = self.data_dir.join("postgres.log");
        if fs::symlink_metadata(&log_path).is_ok_and(|log| log.len() > LOG_LIMIT) {
            let previous = self.data_dir.join("postgres.log.1");
            fs::rename(&log_path, &previous).map_err(path_error("rename", &log_path))?;
        }
        let mut options = OpenOptions::new();
        let log = open_own(&log_path, options.create(true).append(true).mode(0o600))?;
        let log_start = log.metadata().map_or(0, |log| log.len());

        // SIGQUIT waits neither for queries nor for a checkpoint: the next start replays the WAL.
        let mut command = self.command("postgres", Signal::QUIT);
        command.arg("-D").arg(&self.directory);
        // Quoted because the setting is a comma-separated list.
        let socket_dir = format!("unix_socket_directories=\"{}\"", self.socket_dir.display());
        let settings = [
            "listen_addresses=",
            "port=5432",
            &socket_dir,
            "unix_socket_permissions=0700",
            "logging_collector=off",
            // The JIT compiler needs memory that is both writable and executable, which the systemd
            // unit forbids, so an expensive search would fail. No statement of the service benefits
            // from JIT.
            "jit=off",
            // A line for every checkpoint would fill the log.
            "log_checkpoints=off",
        ];
        for setting in settings
            .into_iter()
            .chain(self.settings.iter().map(|s| &**s))
        {
            command.args(["-c", setting]);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let child = command.spawn();
        let child = child.map_err(path_error("start PostgreSQL in", &self.data_dir))?;
        Ok(Server {
            child,
            log_path,
            log_start,
        })
    }

    /// Stops a server on this cluster that outlived its service. No other service can be using it,
    /// because the caller holds the lock.
    pub(super) async fn stop_stale_server(&self) -> Result<(), Error> {
        let pid_file = self.directory.join("postmaster.pid");
        let Some(pid) = file::read(&pid_file)
            .ok()
            .and_then(|text| Pid::from_raw(text.lines().next()?.trim().parse().ok()?))
        else {
            return Ok(());
        };
        if !self.is_our_postmaster(pid).await {
            if test_kill_process(pid).is_ok() {
                // The pid has been reused, but PostgreSQL would mistake that process for a server.
                // It detects real servers by their shared memory.
                fs::remove_file(&pid_file).map_err(path_error("remove", &pid_file))?;
            }
            return Ok(());
        }
        info!("stopping the PostgreSQL of an earlier run pid={pid}");
        for (signal, time_limit) in SHUTDOWN {
            // The process may have ended since the check.
            let _ = kill_process(pid, signal);
            let ended = async {
                while self.is_our_postmaster(pid).await {
                    sleep(POLL_INTERVAL).await;
                }
            };
            if timeout(time_limit, ended).await.is_ok() {
                return Ok(());
            }
        }
        let data_dir = self.data_dir.display();
        Err(format!(
            "the PostgreSQL of an earlier run (process {pid}) in {data_dir} does not stop"
        ))
    }

    /// Removes the socket files of a killed server. Needed because the pid in the lock file may
    /// have been reused.
    fn remove_socket(&self) -> Result<(), Error> {
        for name in [SOCKET_NAME.to_owned(), format!("{SOCKET_NAME}.lock")] {
            let path = self.socket_dir.join(name);
            file::remove_if_exists(&path).map_err(path_error("remove", &path))?;
        }
        Ok(())
    }

    /// Whether this process is a PostgreSQL server on this cluster.
    async fn is_our_postmaster(&self, pid: Pid) -> bool {
        if cfg!(target_os = "linux") {
            // A server's working directory is the cluster. A zombie has no working directory.
            let process = PathBuf::from(format!("/proc/{pid}"));
            return fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == self.directory)
                && fs::read_to_string(process.join("comm"))
                    .is_ok_and(|name| name.starts_with("postgres"));
        }
        let mut ps = Command::new("ps");
        ps.args(["-ww", "-o", "command=", "-p", &pid.to_string()]);
        run(ps, RESPONSE_TIMEOUT).await.is_ok_and(|output| {
            let command = String::from_utf8_lossy(&output.stdout);
            command.contains("postgres") && command.contains(&*self.directory.to_string_lossy())
        })
    }

    /// Creates the service's database if it is missing.
    async fn create_database(&self) -> Result<(), tokio_postgres::Error> {
        match socket_config(&self.socket_dir, DATABASE)
            .connect(NoTls)
            .await
        {
            Ok(_) => return Ok(()),
            Err(error) if error.code() == Some(&SqlState::INVALID_CATALOG_NAME) => {}
            Err(error) => return Err(error),
        }
        let (client, connection) = socket_config(&self.socket_dir, "postgres")
            .connect(NoTls)
            .await?;
        let connection = tokio::spawn(connection);
        let created = client
            .batch_execute(&format!("create database {DATABASE}"))
            .await;
        drop(client);
        let _ = connection.await;
        created
    }
}

/// A server started by this process. Dropping it signals the server to shut down.
pub(super) struct Server {
    child: Child,
    log_path: PathBuf,
    /// The length of the log file when the server started.
    log_start: u64,
}

impl Server {
    pub(super) async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }

    /// Waits until the server accepts connections. On failure, returns the reason.
    async fn wait_ready(&mut self, cluster: &Path) -> Result<(), String> {
        let pid = self.child.id().map(|pid| pid.to_string());
        let deadline = Instant::now() + START_TIMEOUT;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().map_err(|error| error.to_string())? {
                return Err(self.startup_error().unwrap_or_else(|| status.to_string()));
            }
            // The eighth line is the server's state, which pg_ctl reads as well. Connecting instead
            // would log each rejected attempt.
            let text = file::read(&cluster.join("postmaster.pid")).unwrap_or_default();
            let mut lines = text.lines();
            if lines.next().map(str::trim) == pid.as_deref()
                && lines.nth(6).map(str::trim) == Some("ready")
            {
                return Ok(());
            }
            sleep(POLL_INTERVAL).await;
        }
        Err(format!("not ready after {} s", START_TIMEOUT.as_secs()))
    }

    fn startup_error(&self) -> Option<String> {
        let mut log = open_own(&self.log_path, OpenOptions::new().read(true)).ok()?;
        log.seek(SeekFrom::Start(self.log_start)).ok()?;
        let mut text = Vec::new();
        log.take(LOG_LIMIT).read_to_end(&mut text).ok()?;
        first_error_line(&String::from_utf8_lossy(&text))
    }

    pub(super) async fn shut_down(&mut self) {
        for (signal, time_limit) in SHUTDOWN {
            self.signal(signal);
            if timeout(time_limit, self.child.wait()).await.is_ok() {
                return;
            }
            warn!("embedded PostgreSQL has not stopped after {time_limit:?}");
        }
    }

    fn signal(&self, signal: Signal) {
        // A child that has been waited for has no id, so no other process can receive the signal.
        if let Some(pid) = self.child.id().and_then(|id| Pid::from_raw(id as i32)) {
            let _ = kill_process(pid, signal);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.signal(Signal::INT);
    }
}
