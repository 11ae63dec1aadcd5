//! Nothing lost, nobody stuck: faults of the database, the network and the service, overload, and
//! several instances.
//!
//! Each test has a PostgreSQL of its own and states the least that must be served during a fault
//! and after it: a row of 503s alone passes nothing. It prints what it counted, to be seen with
//! `--nocapture`. The short form takes seconds a test; with `FAULTS=full` in the environment there
//! are more rounds, more clients and more time.
//!
//! The contract's bounds are checked with room for a machine that has other things to do.

mod conflicts;
mod load;
mod neon;
mod network;
mod overload;
mod pool;
mod postgres;
mod proxy;
mod service;
mod writes;

use std::{
    env, fs,
    sync::OnceLock,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use todo_api::embedded_postgres::Postgres;
use tokio::sync::{Mutex, MutexGuard};
use tokio_postgres::{Client as Sql, NoTls};

use crate::harness::{DataDir, SECRET, Server, User, until};
use load::{Addresses, Credentials, Load, RequestLog};
use proxy::Proxy;

/// A request has its answer from the database within 5 s; the rest is for a busy machine.
const ANSWERED: Duration = Duration::from_secs(8);
/// The service is well 5 s after the database is; likewise.
const HEALED: Duration = Duration::from_secs(8);

/// The short or the whole form of a test.
pub(crate) fn short_or_full<T>(short: T, full: T) -> T {
    if env::var("FAULTS").is_ok_and(|form| form == "full") {
        full
    } else {
        short
    }
}

/// Tests that measure time under load go one after another.
async fn serialize() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::const_new(());
    TURN.lock().await
}

fn report(test: &str, counted: impl AsRef<str>) {
    println!("faults: {test}: {}", counted.as_ref());
}

/// A service, its PostgreSQL, and perhaps a network between them.
struct Cluster {
    server: Server,
    user: User,
    /// The id of a task that is there from the beginning.
    task: String,
    proxy: Option<Proxy>,
    postgres: Option<Postgres>,
    directory: DataDir,
}

impl Cluster {
    /// The service on the socket of a PostgreSQL of the test's own.
    async fn direct(variables: &[(&str, &str)]) -> Cluster {
        Cluster::build(false, variables).await
    }

    /// The same with a proxy in between.
    async fn proxied(variables: &[(&str, &str)]) -> Cluster {
        Cluster::build(true, variables).await
    }

    async fn build(proxied: bool, variables: &[(&str, &str)]) -> Cluster {
        let directory = DataDir::initialized().await;
        let postgres = Postgres::start(directory.path()).await.unwrap();
        let proxy = match proxied {
            true => Some(Proxy::before(postgres.socket_dir()).await),
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
        let task = user.create_task("there from the beginning").await;
        Cluster {
            server,
            user,
            task: task["id"].as_str().unwrap().to_owned(),
            proxy,
            postgres: Some(postgres),
            directory,
        }
    }

    fn asker(&self) -> Credentials {
        Credentials::from(&self.user)
    }

    fn addresses(&self) -> Addresses {
        Addresses::of(&[self.server.addr()])
    }

    fn proxy(&self) -> &Proxy {
        self.proxy.as_ref().unwrap()
    }

    /// Clients at work on the service.
    fn load(&self, readers: usize, writers: usize) -> Load {
        Load::on(&self.addresses())
            .reading(readers, &self.asker(), &self.task)
            .writing(writers, &self.asker())
    }

    /// A connection of the test's own, past the proxy.
    async fn sql(&self) -> Sql {
        until_connected(self.postgres.as_ref().unwrap()).await
    }

    /// The service and its database end well.
    async fn end(mut self) {
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

/// A connection, as soon as one is to be had.
async fn until_connected(postgres: &Postgres) -> Sql {
    let mut config = postgres.config();
    config.application_name("a test");
    let mut sql = None;
    until("PostgreSQL takes connections", async || {
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

/// The backends of the service, and how many there are.
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

/// Waits until so many answers in a row are good; gives the time since then.
async fn until_well(ledger: &RequestLog, since: Instant) -> Duration {
    until("requests are answered again", async || {
        ledger.is_well(20, since)
    })
    .await;
    since.elapsed()
}

/// A process and all its children, the parent first: PostgreSQL's are each a group of their own.
pub(crate) fn family(parent: Pid) -> Vec<Pid> {
    let parent_of = |entry: fs::DirEntry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // After the name in parentheses: the state, then the parent.
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
        // One that has ended meanwhile needs no signal.
        let _ = kill_process(*process, signal);
    }
}

/// Resident memory of a process now, in KiB, and the most that it has had.
fn memory(pid: u32) -> (u64, u64) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (field("VmRSS:"), field("VmHWM:"))
}

/// As many open files as this process may have: tests of a thousand clients need them.
fn raise_file_limit() {
    static RAISED: OnceLock<()> = OnceLock::new();
    RAISED.get_or_init(|| {
        use rustix::process::{Resource, getrlimit, setrlimit};
        let mut limit = getrlimit(Resource::Nofile);
        limit.current = limit.maximum;
        let _ = setrlimit(Resource::Nofile, limit);
    });
}
