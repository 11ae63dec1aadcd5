//! Fault tolerance: faults of the database, the network and the service, overload, and several
//! instances.
//!
//! Each test asserts how many requests are served during and after a fault, so that a service that
//! rejects everything fails. Each prints its counts, which `--nocapture` shows. The short form of a
//! test takes seconds; the environment variable `FAULTS=full` selects longer tests with more clients.
//! The timeouts allow for a busy machine.

mod conflicts;
mod fair_logins;
mod fairness;
mod load;
mod neon;
mod network;
mod overload;
mod pool;
mod postgres;
mod proxy;
mod replicas;
mod service;
mod writes;

use std::{
    env, fs,
    sync::OnceLock,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use todo_api::embedded_postgres::Postgres;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::sleep,
};
use tokio_postgres::{Client as Sql, NoTls};

use crate::harness::{DataDir, SECRET, Server, User, until};
use load::{Addresses, Credentials, Load, RequestLog, Work, percentile, summary};
use proxy::Proxy;

/// The service's deadline for database work is 5 s; the additional time allows for a busy machine.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(8);
/// The service recovers within 5 s of the database; the additional time allows for a busy machine.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(8);

/// Selects a parameter for the short form or the full form of the tests.
pub(crate) fn short_or_full<T>(short: T, full: T) -> T {
    if env::var("FAULTS").is_ok_and(|value| value == "full") {
        full
    } else {
        short
    }
}

/// The number of tests with a light load that run at the same time.
const CONCURRENT_LOADS: u32 = 8;

static LOADS: Semaphore = Semaphore::const_new(CONCURRENT_LOADS as usize);

/// Waits until a test with a light load may run.
async fn start_light_load() -> SemaphorePermit<'static> {
    LOADS.acquire().await.unwrap()
}

/// Waits until a test whose load uses a core may run. Two of them never run at the same time.
async fn start_heavy_load() -> SemaphorePermit<'static> {
    LOADS.acquire_many(CONCURRENT_LOADS / 2 + 1).await.unwrap()
}

fn report(test: &str, counts: impl AsRef<str>) {
    println!("faults: {test}: {}", counts.as_ref());
}

/// A server and its own PostgreSQL, optionally with a [`Proxy`] between them.
struct Cluster {
    server: Server,
    user: User,
    /// The id of a task of this user.
    task: String,
    proxy: Option<Proxy>,
    postgres: Option<Postgres>,
    directory: DataDir,
}

impl Cluster {
    /// Starts a server that connects to the Unix socket of its PostgreSQL.
    async fn direct(variables: &[(&str, &str)]) -> Cluster {
        Cluster::build(false, variables).await
    }

    /// Starts a server that connects through a proxy.
    async fn proxied(variables: &[(&str, &str)]) -> Cluster {
        Cluster::build(true, variables).await
    }

    async fn build(proxied: bool, variables: &[(&str, &str)]) -> Cluster {
        let directory = DataDir::initialized().await;
        let postgres = Postgres::start(directory.path()).await.unwrap();
        let proxy = match proxied {
            true => Some(Proxy::start(postgres.socket_dir()).await),
            false => None,
        };
        let url = match &proxy {
            Some(proxy) => proxy.url(),
            None => directory.database_url(),
        };
        let mut all = vec![("DATABASE_URL", url.as_str()), ("JWT_SECRET", SECRET)];
        all.extend(variables);
        let server = Server::with(&all).await;
        let user = server.user().await;
        let task = user.create_task("created at the start").await;
        Cluster {
            server,
            user,
            task: task["id"].as_str().unwrap().to_owned(),
            proxy,
            postgres: Some(postgres),
            directory,
        }
    }

    fn credentials(&self) -> Credentials {
        Credentials::from(&self.user)
    }

    fn proxy(&self) -> &Proxy {
        self.proxy.as_ref().unwrap()
    }

    /// Starts clients that read the task and clients that create tasks.
    fn load(&self, readers: usize, writers: usize) -> Load {
        Load::new(&Addresses::new(&[self.server.addr()]))
            .reading(readers, &self.credentials(), &self.task)
            .writing(writers, &self.credentials())
    }

    /// Connects to the database, bypassing the proxy.
    async fn sql(&self) -> Sql {
        connect_when_ready(self.postgres.as_ref().unwrap()).await
    }

    /// Stops the server and its database, and asserts that the server exits successfully.
    async fn stop(mut self) {
        assert_eq!(
            self.server.stop().await.code(),
            Some(0),
            "{}",
            self.server.log()
        );
        if let Some(postgres) = self.postgres.take() {
            postgres.stop().await;
        }
    }
}

/// Connects as soon as PostgreSQL accepts connections.
async fn connect_when_ready(postgres: &Postgres) -> Sql {
    let mut config = postgres.config();
    config.application_name("a test");
    let mut sql = None;
    until("PostgreSQL accepts connections", async || {
        let Ok((client, connection)) = config.connect(NoTls).await else {
            return false;
        };
        tokio::spawn(connection);
        sql = Some(client);
        true
    })
    .await;
    sql.unwrap()
}

/// Returns the process ids of the service's backends.
async fn backends(sql: &Sql) -> Vec<i32> {
    let rows = sql
        .query(
            "select pid from pg_stat_activity
             where application_name = 'todo-api' and backend_type = 'client backend'",
            &[],
        )
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Waits until this many reads and writes succeed.
async fn until_served(requests: &RequestLog, reads: usize, writes: usize) {
    let start = Instant::now();
    until("requests are served", async || {
        requests.successes_since(start, Work::Read) >= reads
            && requests.successes_since(start, Work::Write) >= writes
    })
    .await;
}

/// Waits until 20 requests in a row have succeeded, and asserts that this took no longer than the
/// limit. Returns the time since `since`.
async fn until_recovered(requests: &RequestLog, since: Instant, limit: Duration) -> Duration {
    until("requests succeed again", async || {
        requests.has_recovered(20, since)
    })
    .await;
    let recovered = since.elapsed();
    assert!(recovered < limit, "recovered only after {recovered:?}");
    recovered
}

/// Makes the database unreachable under load and restores it. Asserts that the service detects the
/// outage, then rejects requests immediately, and recovers. Returns a summary.
async fn assert_outage_is_survived(
    cluster: &Cluster,
    requests: &RequestLog,
    start_outage: impl FnOnce(),
    end_outage: impl FnOnce(),
) -> String {
    let losses = || cluster.server.log().matches("database lost").count();
    let losses_before = losses();
    let start = Instant::now();
    start_outage();
    until("the outage is detected", async || losses() > losses_before).await;
    let detected = start.elapsed();
    assert!(detected < RESPONSE_TIMEOUT, "detected after {detected:?}");

    let detected_at = Instant::now();
    sleep(short_or_full(Duration::ZERO, Duration::from_secs(10))).await;
    until("requests are rejected", async || {
        requests.sent_between(detected_at, Instant::now()).len() > 50
    })
    .await;
    cluster.server.get("/healthz").await.expect(200);
    let unready = cluster.server.get("/readyz").await;
    unready.problem(503, "database_unavailable");
    unready.header("retry-after");
    let during = requests.sent_between(detected_at, Instant::now());
    let counts = summary(&during);
    assert!(
        during
            .iter()
            .all(|request| request.is_retryable_503("database_unavailable")),
        "{counts}"
    );
    let p95 = percentile(&during, 95);
    assert!(p95 < Duration::from_secs(1), "slow rejections: {counts}");

    let end = Instant::now();
    end_outage();
    let recovered = until_recovered(requests, end, RECOVERY_TIMEOUT).await;
    format!("detected after {detected:.1?}; during: {counts}; recovered after {recovered:.1?}")
}

/// Returns a process and its children, the parent first. Each PostgreSQL backend leads its own process
/// group, so a signal to the postmaster's group does not reach it.
pub(crate) fn process_and_children(parent: Pid) -> Vec<Pid> {
    let parent_of = |entry: fs::DirEntry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // The name in parentheses is followed by the state and the parent.
        let rest = &stat[stat.rfind(')')? + 2..];
        let ppid: i32 = rest.split(' ').nth(1)?.parse().ok()?;
        Some((Pid::from_raw(pid)?, ppid))
    };
    let children = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(parent_of)
        .filter(|(_, ppid)| *ppid == parent.as_raw_nonzero().get())
        .map(|(pid, _)| pid);
    std::iter::once(parent).chain(children).collect()
}

fn signal_all(processes: &[Pid], signal: Signal) {
    for process in processes {
        // The process may have ended already.
        let _ = kill_process(*process, signal);
    }
}

/// Returns the current and the peak resident memory of a process, in KiB.
fn memory(pid: u32) -> (u64, u64) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (field("VmRSS:"), field("VmHWM:"))
}

/// Raises the limit on open files to the maximum, for tests with thousands of connections.
pub(crate) fn raise_file_limit() {
    static RAISED: OnceLock<()> = OnceLock::new();
    RAISED.get_or_init(|| {
        use rustix::process::{Resource, getrlimit, setrlimit};
        let mut limit = getrlimit(Resource::Nofile);
        limit.current = limit.maximum;
        let _ = setrlimit(Resource::Nofile, limit);
    });
}
