//! `cargo bench`: compares the service with pgbench, PostgreSQL's own client, at the same work.
//!
//! Starts an embedded PostgreSQL with full durability and the release build, and creates 1,000 users
//! with 100 tasks each. In every round and for every kind of work, pgbench (20 clients, prepared
//! statements, TCP) and 64 keep-alive HTTP connections use the database one after the other. Only
//! the ratio within a round is meaningful, because the speed of a shared machine varies. Where the
//! service passes a parameter, pgbench's script has a constant, in pgbench's favour. pgbench reads
//! one task or one page per statement, because each of its clients is independent.
//!
//! An unchanged list is compared with a read of one row, which is all that the service reads for it,
//! and a page of changes with a query of 20 tasks by revision. A create with an `Idempotency-Key` is
//! compared with an insert of the task alone.
//!
//! Then it measures reads while 16 clients log in, memory, the start, and a user with a million
//! tasks. Every figure is printed and written to `target/throughput.json` as soon as it is measured;
//! the tables follow at the end, even after a failure or a signal.
//!
//! | option | variable | meaning |
//! |---|---|---|
//! | | `BENCH_SECONDS` | seconds per measurement (5) |
//! | | `BENCH_ROUNDS` | number of rounds (3); the table shows medians, and the lowest and highest ratio |
//! | `--quick` | | one round of one second, to check that everything works |
//! | `--growth` | | adds ten million tasks (minutes, and 4 GB of disk in `/var/tmp`) |
//! | `--only WORK` | | measures only this row of the table; can be repeated |
//! | `--against PATH` | | also measures another build of the service in every round, on the same database |
//! | `--floors` | | fails if a ratio is far below what is reached; without the scenarios |
//! | `--peers PATH` | | instead compares the service with PocketBase, whose program is at this path |
//!
//! CPU time and memory are read from `/proc`, so these columns are empty on systems other than Linux.

mod client;
mod data;
mod interrupt;
mod options;
mod peers;
mod processes;
mod report;
mod rounds;
mod scenarios;
mod usage;
mod work;

use std::{cell::Cell, fs, net::SocketAddr, os::unix::fs::PermissionsExt, path::Path};

use client::serve_constant;
use data::{BenchUser, TASKS, USERS, insert_tasks, insert_users};
use options::Options;
use processes::{Database, Process, free_address, start_server};
use report::{Report, median};
use usage::resident;
use work::Work;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

const CONNECTIONS: usize = 64;
const LOGIN_CLIENTS: usize = 16;
const IDLE_CONNECTIONS: usize = 2_000;
const PASSWORD: &str = "correct horse battery staple";
const BCRYPT_COST: u32 = 12;
const SECRET: &str = "the benchmark's secret, at least 32 bytes long";

fn main() -> Result<()> {
    let options = Options::read()?;
    if let Some(address) = options.bare {
        return serve_constant(address);
    }
    interrupt::watch()?;
    let mut bench = Bench::set_up(options)?;
    let outcome = bench.run();
    eprint!("\r\x1b[K");
    bench.report.finish(outcome.as_ref().err())?;
    outcome?;
    match bench.below_floor.as_slice() {
        [] => Ok(()),
        rows => Err(format!("below the floor: {}", rows.join("; ")).into()),
    }
}

struct Bench {
    options: Options,
    users: Vec<BenchUser>,
    address: SocketAddr,
    start_ups: Vec<f64>,
    memory_idle: Option<f64>,
    /// The number of measurements done.
    step: Cell<usize>,
    /// The number of measurements planned.
    steps: usize,
    /// The number of the first task to delete, also a part of idempotency keys.
    range: u64,
    /// The number of tasks prepared for deletion per second; doubled whenever they run out.
    deletes_per_second: u64,
    /// The rows that are lower than their floor.
    below_floor: Vec<String>,
    report: Report,
    // Fields are dropped in this order.
    server: Process,
    other: Option<(Process, SocketAddr)>,
    database: Database,
    directory: tempfile::TempDir,
}

impl Bench {
    fn set_up(options: Options) -> Result<Self> {
        // Fail early if a statement has changed.
        for (work, _) in Work::MIX.into_iter().chain([(Work::Delete, 0)]) {
            work.script(0, 0)?;
        }
        // /tmp may be in memory. PostgreSQL's user must be able to enter the directory.
        let directory = tempfile::Builder::new()
            .prefix("todo-api-bench-")
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in("/var/tmp")?;
        eprint!("starting PostgreSQL and the service…");
        let database = Database::start(&directory.path().join("data"))?;
        let address = free_address()?;
        let cost = options.bcrypt_cost();
        let start =
            |build: &Path, address| start_server(build, &database, address, directory.path(), cost);
        // The first start migrates the database, so it is not measured.
        let ours = Path::new(env!("CARGO_BIN_EXE_todo-api"));
        drop(start(ours, address)?);
        let mut start_ups = Vec::new();
        let mut started = start(ours, address)?;
        for _ in 0..4 {
            start_ups.push(started.1);
            let (process, _) = started;
            drop(process);
            started = start(ours, address)?;
        }
        let (server, last) = started;
        start_ups.push(last);
        let other = match &options.against {
            None => None,
            Some(build) => {
                let address = free_address()?;
                let (process, _) = start(build, address)?;
                Some((process, address))
            }
        };
        let mut bench = Self {
            memory_idle: resident(server.id()),
            users: (0..USERS).map(BenchUser::new).collect::<Result<_>>()?,
            step: Cell::new(0),
            steps: options.steps(),
            range: 1_000_000_000,
            deletes_per_second: 20_000,
            below_floor: Vec::new(),
            report: Report::new(&options, database.version()),
            options,
            address,
            start_ups,
            server,
            other,
            database,
            directory,
        };
        bench.fill()?;
        Ok(bench)
    }

    fn fill(&mut self) -> Result<()> {
        self.step("creating 1,000 users with 100 tasks each");
        let hash = bcrypt::hash(PASSWORD, self.options.bcrypt_cost())?;
        self.database.sql(&[
            &insert_users(&hash),
            &insert_tasks(0, TASKS),
            &format!(
                "update task_lists set revision = {0}, tasks = {0}",
                TASKS / USERS
            ),
            "vacuum analyze users, sessions, task_lists, tasks",
        ])?;
        if self.options.against.is_some() {
            // These triggers do for an earlier release what the present statements do themselves.
            // With its own schema, an earlier build does not pay for them.
            self.database
                .sql(&["alter table tasks disable trigger user"])?;
        }
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        if let Some(program) = self.options.peers.clone() {
            return self.compare_with_pocketbase(&program);
        }
        let all = self.options.has_scenarios();
        if all {
            self.report.record("start_up_ms", median(&self.start_ups))?;
            self.report.record("memory_mib.idle", self.memory_idle)?;
            self.constant()?;
        }
        for round in 0..self.options.rounds {
            for (at, work) in self.options.work().into_iter().enumerate() {
                // Alternate which program comes first.
                self.round(work, round + at)?;
            }
        }
        if self.options.floors {
            self.check_floors()?;
        }
        if all {
            let loaded = resident(self.server.id());
            self.report.record("memory_mib.after_the_load", loaded)?;
            self.logins()?;
            let connected = self.idle_connections()?;
            self.report
                .record("memory_mib.idle_connections_2000", connected)?;
            self.growth()?;
        }
        Ok(())
    }

    /// Updates the progress line.
    fn step(&self, what: &str) {
        self.step.set(self.step.get() + 1);
        eprint!("\r\x1b[K[{}/{}] {what}", self.step.get(), self.steps);
    }
}
