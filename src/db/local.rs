//! The private PostgreSQL that the service runs for itself where `DATABASE_URL` is not set.
//!
//! In `DATA_DIR` there are:
//!
//! | name | what |
//! |---|---|
//! | `lock` | held while a service runs on this directory |
//! | `cluster/` | PostgreSQL's own data directory |
//! | `socket/` | the only place where it listens, mode 0700 (elsewhere if the path is too long for a socket) |
//! | `postgres.log` | what PostgreSQL has to say |
//! | `jwt-secret` | the secret that signs tokens, made at the first start |
//!
//! A server started here outlives nothing: it ends with [`Postgres::stop`], and one that a crash
//! left behind is ended before the next is started. In between a supervisor starts it again when
//! it dies.

use std::{
    env, fmt,
    fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{ExitStatus, Output, Stdio},
    time::Duration,
};

use log::{error, info, warn};
use rustix::process::{Pid, Signal, geteuid, kill_process, test_kill_process};
use tokio::{
    process::{Child, Command},
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tokio_postgres::{NoTls, error::SqlState};

const OLDEST_MAJOR: u32 = 13;
const USER: &str = "todo";
const DATABASE: &str = "todo";
const SOCKET_NAME: &str = ".s.PGSQL.5432";
/// The shortest `sun_path` of the systems we run on is macOS's: 104 bytes with the final NUL.
const SOCKET_PATH_LIMIT: usize = 103;
/// At a start, a longer log than this is set aside; two generations are kept.
const LOG_LIMIT: u64 = 16 << 20;

const INITDB_PATIENCE: Duration = Duration::from_secs(120);
/// Replaying the log after a crash is part of a start.
const START_PATIENCE: Duration = Duration::from_secs(120);
/// Children of a killed server notice its end within moments, unless they are deep in a query.
const LEFTOVER_PATIENCE: Duration = Duration::from_secs(30);
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// The kernel takes a moment to release what a killed service held.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(10);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A server that lived this long did not die of its start: the pauses begin anew.
const STEADY: Duration = Duration::from_secs(60);
/// Fast, then immediate (the next start replays the log, nothing is lost), then by force.
const SHUTDOWN: [(Signal, Duration); 3] = [
    (Signal::INT, Duration::from_secs(10)),
    (Signal::QUIT, Duration::from_secs(6)),
    (Signal::KILL, Duration::from_secs(2)),
];

/// Why there is no private PostgreSQL: one line for the operator.
#[derive(Debug)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// An operation on a path that failed, as a line that names both.
fn failed(what: &str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let what = format!("cannot {what} {}", path.display());
    move |error| Error(format!("{what}: {error}"))
}

/// A running private PostgreSQL.
pub struct Postgres {
    cluster: Cluster,
    /// Dropping it tells the supervisor to stop the server.
    stop: oneshot::Sender<()>,
    supervisor: JoinHandle<()>,
}

impl Postgres {
    /// Makes the cluster in `data_dir` if there is none, starts it and waits until it accepts connections.
    pub async fn start(data_dir: &Path) -> Result<Postgres, Error> {
        Postgres::start_with(data_dir, &[]).await
    }

    /// The same with settings of PostgreSQL's own, such as `("max_connections", "300")`.
    pub async fn start_with(data_dir: &Path, settings: &[(&str, &str)]) -> Result<Postgres, Error> {
        let (data_dir, account) = make_data_dir(data_dir)?;
        let lock = lock(&data_dir).await?;
        let cluster = Cluster::open(data_dir, account, settings).await?;
        info!(
            "starting private PostgreSQL {} in {}",
            cluster.programs.version,
            cluster.directory.display()
        );
        let server = cluster.launch().await?;
        let (stop, stopped) = oneshot::channel();
        let supervisor = tokio::spawn(supervise(cluster.clone(), server, stopped, lock));
        Ok(Postgres {
            cluster,
            stop,
            supervisor,
        })
    }

    /// How to connect: through the socket, without a password.
    pub fn config(&self) -> tokio_postgres::Config {
        self.cluster.config(DATABASE)
    }

    /// The directory of the socket.
    pub fn socket_dir(&self) -> &Path {
        &self.cluster.sockets
    }

    /// The directory that holds cluster, log and secret, as an absolute path.
    pub fn data_dir(&self) -> &Path {
        &self.cluster.data_dir
    }

    /// PostgreSQL's version, such as `15.8`.
    pub fn version(&self) -> &str {
        &self.cluster.programs.version
    }

    /// Shuts PostgreSQL down and waits for its end.
    pub async fn stop(self) {
        drop(self.stop);
        // A supervisor that panicked has dropped its server, and that has ended it.
        if let Err(error) = self.supervisor.await {
            error!("the supervisor of the private PostgreSQL failed: {error}");
        }
    }
}

/// Keeps PostgreSQL running until told to stop. Holds the lock until nothing runs any more.
async fn supervise(
    cluster: Cluster,
    mut server: Server,
    mut stop: oneshot::Receiver<()>,
    _lock: File,
) {
    let mut pause = FIRST_PAUSE;
    loop {
        let started = Instant::now();
        let status = tokio::select! {
            _ = &mut stop => break,
            status = server.child.wait() => status,
        };
        if started.elapsed() > STEADY {
            pause = FIRST_PAUSE;
        }
        error!(
            "private PostgreSQL ended unexpectedly ({}), starting it again",
            outcome(status)
        );
        server = tokio::select! {
            server = cluster.relaunch(&mut pause) => server,
            _ = &mut stop => {
                // The start that was given up has been told to end; this waits for it.
                if let Err(error) = cluster.end_leftover().await {
                    warn!("{error}");
                }
                return cluster.remove_foreign_sockets();
            }
        };
        info!("private PostgreSQL is back");
    }
    server.shut_down().await;
    cluster.remove_foreign_sockets();
}

fn outcome(status: io::Result<ExitStatus>) -> String {
    status.map_or_else(|error| error.to_string(), |status| status.to_string())
}

/// Where a cluster lies and what it is run with.
#[derive(Clone)]
struct Cluster {
    data_dir: PathBuf,
    directory: PathBuf,
    sockets: PathBuf,
    programs: Programs,
    account: Option<Account>,
    settings: Vec<String>,
}

impl Cluster {
    /// Finds the programs for the cluster, and makes what is missing.
    async fn open(
        data_dir: PathBuf,
        account: Option<Account>,
        settings: &[(&str, &str)],
    ) -> Result<Cluster, Error> {
        let directory = data_dir.join("cluster");
        let programs = Programs::find(&directory).await?;
        let sockets = make_socket_dir(&data_dir, account.as_ref())?;
        let cluster = Cluster {
            data_dir,
            directory,
            sockets,
            programs,
            account,
            settings: settings
                .iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect(),
        };
        if !cluster.directory.exists() {
            cluster.make().await?;
        }
        Ok(cluster)
    }

    /// Runs initdb beside the place and renames the result into it: one that was interrupted never counts.
    async fn make(&self) -> Result<(), Error> {
        info!(
            "making a new PostgreSQL {} cluster in {}",
            self.programs.version,
            self.directory.display()
        );
        self.remove_unfinished();
        let making = self
            .data_dir
            .join(format!("{UNFINISHED}{}", std::process::id()));
        // Not every system has C.UTF-8; plain C sorts the same way.
        let made = match self.initdb(&making, "--locale=C.UTF-8").await {
            Err(_) => self.initdb(&making, "--no-locale").await,
            made => made,
        };
        if made.is_err() {
            self.remove_unfinished();
        }
        made?;
        fs::rename(&making, &self.directory).map_err(failed("make", &self.directory))?;
        // The new name must survive a power cut as the files behind it do.
        File::open(&self.data_dir)
            .and_then(|directory| directory.sync_all())
            .map_err(failed("sync", &self.data_dir))
    }

    async fn initdb(&self, directory: &Path, locale: &str) -> Result<(), Error> {
        self.remove_unfinished();
        make_dir(directory, 0o700).map_err(failed("make", directory))?;
        give(directory, self.account.as_ref())?;
        let mut command = self.command("initdb");
        command.arg("--pgdata").arg(directory).args([
            "--encoding=UTF8",
            locale,
            // Who can reach the socket's directory is us.
            "--auth=trust",
            &format!("--username={USER}"),
        ]);
        let output = run(command, INITDB_PATIENCE)
            .await
            .map_err(failed("run", &self.programs.directory.join("initdb")))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Error(format!(
            "initdb failed in {}: {}",
            self.data_dir.display(),
            complaint(&said).unwrap_or_else(|| output.status.to_string())
        )))
    }

    /// Removes what interrupted attempts at making a cluster have left. One that cannot be removed
    /// harms nobody: the next has another name.
    fn remove_unfinished(&self) {
        for entry in fs::read_dir(&self.data_dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED)
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                warn!("cannot remove {}: {error}", entry.path().display());
            }
        }
    }

    /// Tries until the server runs, with a longer pause after each attempt.
    async fn relaunch(&self, pause: &mut Duration) -> Server {
        loop {
            sleep(*pause).await;
            *pause = (*pause * 2).min(LONGEST_PAUSE);
            match self.launch().await {
                Ok(server) => return server,
                Err(error) => warn!("{error}; trying again in {} ms", pause.as_millis()),
            }
        }
    }

    /// Starts the server and waits until it accepts connections.
    async fn launch(&self) -> Result<Server, Error> {
        self.end_leftover().await?;
        self.remove_socket()?;
        let deadline = Instant::now() + LEFTOVER_PATIENCE;
        let mut server = loop {
            let mut server = self.spawn()?;
            let Err(reason) = server.ready(&self.directory).await else {
                break server;
            };
            server.shut_down().await;
            // Processes of a server that was killed still hold its shared memory.
            let leftovers = reason.contains("shared memory block") || reason.contains("lock file");
            if !leftovers || Instant::now() > deadline {
                return Err(Error(format!(
                    "private PostgreSQL in {} does not start: {reason}",
                    self.data_dir.display()
                )));
            }
            sleep(FIRST_PAUSE).await;
        };
        let reason = match timeout(ANSWER_PATIENCE, self.make_database()).await {
            Ok(Ok(())) => return Ok(server),
            // By itself the error says no more than "db error".
            Ok(Err(error)) => std::error::Error::source(&error)
                .map_or_else(|| error.to_string(), |source| source.to_string()),
            Err(_) => "no answer".into(),
        };
        server.shut_down().await;
        Err(Error(format!(
            "private PostgreSQL in {} does not serve us: {reason}",
            self.data_dir.display()
        )))
    }

    fn spawn(&self) -> Result<Server, Error> {
        let log_path = self.data_dir.join("postgres.log");
        if fs::metadata(&log_path).is_ok_and(|log| log.len() > LOG_LIMIT) {
            let older = self.data_dir.join("postgres.log.1");
            fs::rename(&log_path, &older).map_err(failed("rename", &log_path))?;
        }
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&log_path)
            .map_err(failed("write", &log_path))?;
        let log_start = log.metadata().map_or(0, |log| log.len());

        let mut command = self.command("postgres");
        command.arg("-D").arg(&self.directory);
        // Quoted, because the setting is a list separated by commas.
        let sockets = format!("unix_socket_directories=\"{}\"", self.sockets.display());
        for setting in [
            "listen_addresses=",
            "port=5432",
            &sockets,
            "unix_socket_permissions=0700",
            "logging_collector=off",
            // Compiling wants memory that is writable and executable, which a hardened unit forbids:
            // a costly search would fail. None of our statements gains by it.
            "jit=off",
            // A line a checkpoint would fill the log with nothing.
            "log_checkpoints=off",
        ] {
            command.args(["-c", setting]);
        }
        for setting in &self.settings {
            command.args(["-c", setting]);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(failed("run", &self.programs.directory.join("postgres")))?;
        Ok(Server {
            child,
            log_path,
            log_start,
        })
    }

    /// One of PostgreSQL's programs, as the account that owns the cluster.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.directory.join(program));
        command
            // Our environment has secrets in it, and variables such as PGPORT would change what we ask for.
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .env("LC_ALL", "C")
            // Ours need not be a place where the account may be.
            .current_dir("/")
            // Ctrl-C on a terminal goes to a whole process group, and is for us alone.
            .process_group(0);
        if let Some(account) = &self.account {
            command.uid(account.uid).gid(account.gid);
        }
        command
    }

    /// Ends a server on this cluster that outlived the service that started it. Nobody uses it: we hold the lock.
    async fn end_leftover(&self) -> Result<(), Error> {
        let pid_file = self.directory.join("postmaster.pid");
        let Some(pid) = fs::read_to_string(&pid_file)
            .ok()
            .and_then(|text| Pid::from_raw(text.lines().next()?.trim().parse().ok()?))
        else {
            return Ok(());
        };
        if !self.is_served_by(pid).await {
            if test_kill_process(pid).is_ok() {
                // The number has gone to some other process since. PostgreSQL would believe the file;
                // what guards against real leftovers is the shared memory, and that stays.
                fs::remove_file(&pid_file).map_err(failed("remove", &pid_file))?;
            }
            return Ok(());
        }
        info!("stopping the PostgreSQL that an earlier run has left (process {pid})");
        for (signal, patience) in SHUTDOWN {
            // It may end between the look and the signal.
            let _ = kill_process(pid, signal);
            let deadline = Instant::now() + patience;
            while Instant::now() < deadline {
                if !self.is_served_by(pid).await {
                    return Ok(());
                }
                sleep(POLL).await;
            }
        }
        Err(Error(format!(
            "a PostgreSQL from an earlier run (process {pid}) still runs in {} and does not stop",
            self.data_dir.display()
        )))
    }

    /// Removes what a killed server has left where it listened: the lock there names a process,
    /// too, and the number may have gone to another.
    fn remove_socket(&self) -> Result<(), Error> {
        for name in [SOCKET_NAME.to_owned(), format!("{SOCKET_NAME}.lock")] {
            let path = self.sockets.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether this process is a PostgreSQL server on this cluster.
    async fn is_served_by(&self, pid: Pid) -> bool {
        if cfg!(target_os = "linux") {
            // It works in its data directory. A zombie has none, and no longer counts.
            let process = PathBuf::from(format!("/proc/{pid}"));
            return fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == self.directory)
                && fs::read_to_string(process.join("comm"))
                    .is_ok_and(|name| name.starts_with("postgres"));
        }
        let mut ps = Command::new("ps");
        ps.args(["-ww", "-o", "command=", "-p", &pid.to_string()]);
        run(ps, ANSWER_PATIENCE).await.is_ok_and(|output| {
            let command = String::from_utf8_lossy(&output.stdout);
            command.contains("postgres") && command.contains(&*self.directory.to_string_lossy())
        })
    }

    /// Makes the database where the cluster has none yet.
    async fn make_database(&self) -> Result<(), tokio_postgres::Error> {
        match self.config(DATABASE).connect(NoTls).await {
            Ok(_) => return Ok(()),
            Err(error) if error.code() == Some(&SqlState::INVALID_CATALOG_NAME) => {}
            Err(error) => return Err(error),
        }
        let (client, connection) = self.config("postgres").connect(NoTls).await?;
        let connection = tokio::spawn(connection);
        let made = client
            .batch_execute(&format!("create database {DATABASE}"))
            .await;
        drop(client);
        let _ = connection.await;
        made
    }

    fn config(&self, database: &str) -> tokio_postgres::Config {
        through(&self.sockets, database)
    }

    /// A socket directory outside of `DATA_DIR` goes with the server.
    fn remove_foreign_sockets(&self) {
        if !self.sockets.starts_with(&self.data_dir)
            && let Err(error) = fs::remove_dir(&self.sockets)
        {
            warn!("cannot remove {}: {error}", self.sockets.display());
        }
    }
}

/// How the names of directories begin in which initdb has not finished.
const UNFINISHED: &str = "cluster.unfinished-";

/// A server that was started here; dropped, it is told to shut down.
struct Server {
    child: Child,
    log_path: PathBuf,
    /// Where in the log its own words begin.
    log_start: u64,
}

impl Server {
    /// Waits until the server accepts connections, or says why it does not.
    async fn ready(&mut self, cluster: &Path) -> Result<(), String> {
        let pid = self.child.id().map(|pid| pid.to_string());
        let deadline = Instant::now() + START_PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().map_err(|error| error.to_string())? {
                return Err(self.last_words().unwrap_or_else(|| status.to_string()));
            }
            // PostgreSQL notes its state on the eighth line, as pg_ctl reads it: no connection is
            // spent on asking, and no refusal is logged.
            let text = fs::read_to_string(cluster.join("postmaster.pid")).unwrap_or_default();
            let mut lines = text.lines();
            if lines.next().map(str::trim) == pid.as_deref()
                && lines.nth(6).map(str::trim) == Some("ready")
            {
                return Ok(());
            }
            sleep(POLL).await;
        }
        Err(format!("not ready after {} s", START_PATIENCE.as_secs()))
    }

    /// What it wrote to the log about its failure.
    fn last_words(&self) -> Option<String> {
        let mut log = File::open(&self.log_path).ok()?;
        log.seek(SeekFrom::Start(self.log_start)).ok()?;
        let mut words = Vec::new();
        log.take(LOG_LIMIT).read_to_end(&mut words).ok()?;
        complaint(&String::from_utf8_lossy(&words))
    }

    async fn shut_down(&mut self) {
        for (signal, patience) in SHUTDOWN {
            self.signal(signal);
            if timeout(patience, self.child.wait()).await.is_ok() {
                return;
            }
            warn!("private PostgreSQL has not stopped after {patience:?}");
        }
    }

    fn signal(&self, signal: Signal) {
        // A child that was waited for has no id any more, so this never hits a stranger.
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

/// The last line in which a program of PostgreSQL says what is wrong.
fn complaint(text: &str) -> Option<String> {
    let lines = || text.lines().rev().filter(|line| !line.trim().is_empty());
    let line = lines()
        .find(|line| {
            ["FATAL:", "PANIC:", "error:"]
                .iter()
                .any(|word| line.contains(word))
        })
        .or_else(|| lines().next())?;
    // Without PostgreSQL's time and process id in front.
    let start = ["FATAL:", "PANIC:"]
        .iter()
        .find_map(|word| line.find(word))
        .unwrap_or(0);
    Some(line[start..].trim().to_owned())
}

/// PostgreSQL's programs of one version.
#[derive(Clone)]
struct Programs {
    directory: PathBuf,
    version: String,
}

/// Where distributions put PostgreSQL's programs: directories whose subdirectories, beginning
/// with the name, have a `bin`.
const PLACES: [(&str, &str); 8] = [
    ("/usr/lib/postgresql", ""),
    ("/usr", "pgsql-"),
    ("/usr/lib", "postgresql"),
    ("/usr/local", "pgsql"),
    ("/opt/homebrew/opt", "postgresql"),
    ("/usr/local/opt", "postgresql"),
    ("/home/linuxbrew/.linuxbrew/opt", "postgresql"),
    ("/Applications/Postgres.app/Contents/Versions", ""),
];

impl Programs {
    /// The newest on this machine that fits the cluster: any that we support for a new one,
    /// otherwise the one that made it.
    async fn find(cluster: &Path) -> Result<Programs, Error> {
        let wanted = match fs::read_to_string(cluster.join("PG_VERSION")) {
            Ok(version) => Some(major_minor(&version).0),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed("read", &cluster.join("PG_VERSION"))(error)),
        };
        let found = Programs::on_this_machine().await;
        let newest = found
            .iter()
            .filter(|programs| {
                let major = major_minor(&programs.version).0;
                wanted.map_or(major >= OLDEST_MAJOR, |wanted| major == wanted)
            })
            .max_by_key(|programs| major_minor(&programs.version));
        if let Some(programs) = newest {
            return Ok(programs.clone());
        }
        let mut versions: Vec<_> = found.iter().map(|p| p.version.as_str()).collect();
        versions.dedup();
        let there = match versions.join(", ") {
            none if none.is_empty() => String::new(),
            versions => format!(" (there is {versions})"),
        };
        Err(Error(match wanted {
            Some(major) => format!(
                "the data in {} was made by PostgreSQL {major}, which is not on this machine{there}: \
                 install it (Debian, Ubuntu: apt install postgresql-{major}; macOS: brew install postgresql@{major}) \
                 or take the data over with pg_upgrade",
                cluster.display()
            ),
            None => format!(
                "no PostgreSQL {OLDEST_MAJOR} or later on this machine{there}: install it \
                 (Debian, Ubuntu: apt install postgresql; macOS: brew install postgresql@17) or set DATABASE_URL"
            ),
        }))
    }

    async fn on_this_machine() -> Vec<Programs> {
        let mut directories: Vec<PathBuf> = env::var_os("PATH")
            .map(|path| env::split_paths(&path).collect())
            .unwrap_or_default();
        for (place, prefix) in PLACES {
            for entry in fs::read_dir(place).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().starts_with(prefix) {
                    directories.push(entry.path().join("bin"));
                }
            }
        }
        let mut found = Vec::new();
        for directory in directories {
            if directory.is_absolute()
                && directory.join("initdb").is_file()
                && let Some(version) = version_of(&directory.join("postgres")).await
            {
                found.push(Programs { directory, version });
            }
        }
        found
    }
}

/// `15.8` out of `postgres (PostgreSQL) 15.8 (Debian 15.8-0+deb12u1)`.
async fn version_of(postgres: &Path) -> Option<String> {
    let mut command = Command::new(postgres);
    command.arg("--version");
    let output = run(command, ANSWER_PATIENCE).await.ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.split_whitespace().nth(2).map(str::to_owned)
}

/// (15, 8) of `15.8`, (18, 0) of `18beta1`.
fn major_minor(version: &str) -> (u32, u32) {
    let mut numbers = version
        .trim()
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    let major = numbers.next().unwrap_or(0);
    let minor = if version.contains('.') {
        numbers.next()
    } else {
        None
    };
    (major, minor.unwrap_or(0))
}

/// Runs a program to its end, or kills it when its time is over.
async fn run(mut command: Command, patience: Duration) -> io::Result<Output> {
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    timeout(patience, output).await.map_err(|_| {
        let late = format!("no end after {} s", patience.as_secs());
        io::Error::new(io::ErrorKind::TimedOut, late)
    })?
}

/// Who runs PostgreSQL when we are root: it refuses to be.
#[derive(Clone)]
struct Account {
    name: String,
    uid: u32,
    gid: u32,
}

impl Account {
    /// The owner of the cluster, or of a cluster to be made. None unless we are root.
    fn for_cluster(cluster: &Path) -> Result<Option<Account>, Error> {
        if !geteuid().is_root() {
            return Ok(None);
        }
        if let Ok(owner) = fs::metadata(cluster)
            && owner.uid() != 0
        {
            return Ok(Some(Account {
                name: format!("with id {}", owner.uid()),
                uid: owner.uid(),
                gid: owner.gid(),
            }));
        }
        Account::unprivileged().map(Some).ok_or_else(|| {
            Error("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as".into())
        })
    }

    fn unprivileged() -> Option<Account> {
        ["postgres", "nobody"].into_iter().find_map(|name| {
            Some(Account {
                name: name.to_owned(),
                uid: id("-u", name)?,
                gid: id("-g", name)?,
            })
        })
    }

    /// PostgreSQL must get to its files: each directory on the way has to let it pass.
    fn check_reach(&self, directory: &Path) -> Result<(), Error> {
        match directory
            .ancestors()
            .find(|ancestor| !self.may_enter(ancestor))
        {
            None => Ok(()),
            Some(closed) => Err(Error(format!(
                "DATA_DIR {} cannot be reached by user {}, as whom PostgreSQL runs when we are root: \
                 {} is closed to it; set DATA_DIR to another place, such as /var/lib/todo-api",
                directory.display(),
                self.name,
                closed.display()
            ))),
        }
    }

    fn may_enter(&self, directory: &Path) -> bool {
        let Ok(directory) = fs::metadata(directory) else {
            // What is missing will be made, and open enough.
            return true;
        };
        // The first class that applies decides, as it does in the kernel.
        let needed = if directory.uid() == self.uid {
            0o100
        } else if directory.gid() == self.gid {
            0o010
        } else {
            0o001
        };
        directory.mode() & needed != 0
    }
}

fn id(which: &str, name: &str) -> Option<u32> {
    let output = std::process::Command::new("id")
        .args([which, name])
        .output()
        .ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

/// Where the data goes if nobody says otherwise: `.todo-api` in the current directory. Root's own
/// places are closed to the user that runs PostgreSQL, so under those `/var/lib/todo-api`.
pub fn default_data_dir() -> PathBuf {
    let closed = geteuid().is_root()
        && env::current_dir().is_ok_and(|here| {
            Account::unprivileged().is_some_and(|account| account.check_reach(&here).is_err())
        });
    PathBuf::from(if closed {
        "/var/lib/todo-api"
    } else {
        ".todo-api"
    })
}

/// Reads the secret that signs tokens, kept beside the cluster; makes it if there is none.
pub fn jwt_secret(data_dir: &Path) -> Result<String, Error> {
    let (data_dir, _) = make_data_dir(data_dir)?;
    let path = data_dir.join("jwt-secret");
    if !path.exists() {
        make_secret(&data_dir, &path).map_err(failed("make", &path))?;
    }
    let mode = fs::metadata(&path).map_err(failed("read", &path))?.mode();
    if mode & 0o077 != 0 {
        return Err(Error(format!(
            "{} can be read by others: close it (chmod 600), or remove it for a new one",
            path.display()
        )));
    }
    let secret = fs::read_to_string(&path).map_err(failed("read", &path))?;
    let secret = secret.trim();
    if secret.len() < 32 {
        return Err(Error(format!(
            "{} has fewer than 32 bytes: remove it for a new one",
            path.display()
        )));
    }
    Ok(secret.to_owned())
}

/// Writes it whole under another name first: half a secret must never be found.
fn make_secret(data_dir: &Path, path: &Path) -> io::Result<()> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();

    let unfinished = data_dir.join(format!("jwt-secret.unfinished-{}", std::process::id()));
    let written = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&unfinished)
        .and_then(|mut file| {
            writeln!(file, "{hex}")?;
            file.sync_all()
        })
        // A link, unlike a rename, leaves alone what another process has put there meanwhile.
        .and_then(|()| match fs::hard_link(&unfinished, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            linked => linked,
        });
    let removed = fs::remove_file(&unfinished);
    written.and(removed)
}

/// Makes `DATA_DIR` where it is missing, and gives its absolute path and who will run PostgreSQL there.
fn make_data_dir(data_dir: &Path) -> Result<(PathBuf, Option<Account>), Error> {
    let account = Account::for_cluster(&data_dir.join("cluster"))?;
    if !data_dir.exists() {
        if let Some(account) = &account {
            // Before anything is made where it could not be used.
            let absolute =
                std::path::absolute(data_dir).map_err(failed("find DATA_DIR", data_dir))?;
            account.check_reach(&absolute)?;
        }
        // The account that runs PostgreSQL has to pass through, and see nothing.
        let mode = if account.is_some() { 0o711 } else { 0o700 };
        make_dir(data_dir, mode).map_err(failed("make DATA_DIR", data_dir))?;
    }
    if !data_dir.is_dir() {
        return Err(Error(format!(
            "DATA_DIR {} is not a directory",
            data_dir.display()
        )));
    }
    let data_dir = data_dir
        .canonicalize()
        .map_err(failed("find DATA_DIR", data_dir))?;
    if let Some(account) = &account {
        // Once more, now that no link hides a part of the way and the umask has had its say.
        account.check_reach(&data_dir)?;
    }
    Ok((data_dir, account))
}

fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(path)?;
    // Whatever the umask took away.
    fs::set_permissions(path, Permissions::from_mode(mode))
}

fn give(path: &Path, account: Option<&Account>) -> Result<(), Error> {
    account.map_or(Ok(()), |account| {
        chown(path, Some(account.uid), Some(account.gid))
            .map_err(failed("change the owner of", path))
    })
}

/// Two services on one directory would stop each other's PostgreSQL.
async fn lock(data_dir: &Path) -> Result<File, Error> {
    let path = data_dir.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(failed("open", &path))?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(failed("lock", &path)(error)),
            Err(TryLockError::WouldBlock) if Instant::now() > deadline => {
                return Err(Error(format!(
                    "another todo-api runs on DATA_DIR {}",
                    data_dir.display()
                )));
            }
            Err(TryLockError::WouldBlock) => sleep(POLL).await,
        }
    }
}

fn through(sockets: &Path, database: &str) -> tokio_postgres::Config {
    let mut config = tokio_postgres::Config::new();
    config
        .host_path(sockets)
        .user(USER)
        .dbname(database)
        .application_name("todo-api");
    config
}

/// The version of the PostgreSQL that a start on `data_dir` would run; the error is what that start
/// would meet. Makes nothing.
pub async fn survey(data_dir: &Path) -> Result<String, Error> {
    let data_dir = std::path::absolute(data_dir).map_err(failed("find", data_dir))?;
    let cluster = data_dir.join("cluster");
    if let Some(account) = Account::for_cluster(&cluster)? {
        let made = data_dir.ancestors().find(|ancestor| ancestor.exists());
        account.check_reach(made.unwrap_or(&data_dir))?;
    }
    Ok(Programs::find(&cluster).await?.version)
}

/// How to reach the private PostgreSQL of a service that runs on `data_dir`; `None` where none runs.
pub fn running(data_dir: &Path) -> Option<tokio_postgres::Config> {
    let lock = OpenOptions::new().write(true).open(data_dir.join("lock"));
    if !matches!(lock.ok()?.try_lock(), Err(TryLockError::WouldBlock)) {
        return None;
    }
    let running = fs::read_to_string(data_dir.join("cluster/postmaster.pid")).ok()?;
    // The fifth line names the directory of the socket.
    let sockets = running.lines().nth(4)?;
    Some(through(Path::new(sockets), DATABASE))
}

/// Makes the directory for the socket: in `DATA_DIR`, or where the path becomes too long, in a temporary place.
fn make_socket_dir(data_dir: &Path, account: Option<&Account>) -> Result<PathBuf, Error> {
    let inside = data_dir.join("socket");
    if fits_a_socket(&inside) {
        make_dir(&inside, 0o700).map_err(failed("make", &inside))?;
        give(&inside, account)?;
        return Ok(inside);
    }
    let mut hash = DefaultHasher::new();
    data_dir.hash(&mut hash);
    let name = format!("todo-api-{:016x}", hash.finish());
    let outside = [env::temp_dir(), PathBuf::from("/tmp")]
        .into_iter()
        .map(|directory| directory.join(&name))
        .find(|path| fits_a_socket(path))
        .ok_or_else(|| {
            Error(format!(
                "the path of DATA_DIR {} is too long",
                data_dir.display()
            ))
        })?;
    // Anybody can make things there: a directory of somebody else's, or a link, is not taken.
    let made = DirBuilder::new().mode(0o700).create(&outside);
    let meta = made
        .or_else(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Ok(()),
            _ => Err(error),
        })
        .and_then(|()| fs::symlink_metadata(&outside))
        .map_err(failed("make", &outside))?;
    let us = geteuid().as_raw();
    let ours = [us, account.map_or(us, |account| account.uid)];
    if !meta.is_dir() || !ours.contains(&meta.uid()) || meta.mode() & 0o077 != 0 {
        return Err(Error(format!(
            "{} is needed for the socket (DATA_DIR is too long a path) and belongs to somebody else",
            outside.display()
        )));
    }
    give(&outside, account)?;
    Ok(outside)
}

/// Short enough, and nothing that the quotes around it cannot hold.
fn fits_a_socket(directory: &Path) -> bool {
    directory.join(SOCKET_NAME).as_os_str().len() <= SOCKET_PATH_LIMIT
        && directory.to_str().is_some_and(|path| !path.contains('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        assert!(major_minor("16.10") > major_minor("16.9"));
        assert!(major_minor("16.0") > major_minor("9.6"));
        assert_eq!(major_minor("18beta1"), (18, 0));
        assert_eq!(major_minor("15\n"), (15, 0));
        assert_eq!(major_minor("PostgreSQL"), (0, 0));
    }

    #[test]
    fn the_complaint_is_the_last_line_that_is_one() {
        let log = "2026-01-01 10:00:00.000 UTC [7] FATAL:  could not create shared memory\n\
                   2026-01-01 10:00:00.000 UTC [7] LOG:  database system is shut down\n";
        assert_eq!(
            complaint(log).as_deref(),
            Some("FATAL:  could not create shared memory")
        );
        assert_eq!(
            complaint("postgres: not found\n\n").as_deref(),
            Some("postgres: not found")
        );
        assert_eq!(complaint("\n"), None);
    }

    #[test]
    fn a_socket_path_has_its_limit() {
        let longest = SOCKET_PATH_LIMIT - "/".len() - SOCKET_NAME.len();
        assert!(fits_a_socket(Path::new(&"x".repeat(longest))));
        assert!(!fits_a_socket(Path::new(&"x".repeat(longest + 1))));
    }
}
