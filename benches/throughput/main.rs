//! `cargo bench`: compares the service with pgbench, PostgreSQL's own client, at the same work.
//!
//! Starts an embedded PostgreSQL with full durability and the release build, and creates 1,000 users
//! with 100 tasks each. In every round and for every kind of work, pgbench (20 clients, prepared
//! statements, TCP) and 64 keep-alive HTTP connections use the database one after the other. Only
//! the ratio within a round is meaningful, because the speed of a shared machine varies. Where the
//! service passes a parameter, pgbench's script has a constant, in pgbench's favour. pgbench reads
//! one task or one page per statement, because each of its clients is independent.
//!
//! Then it measures reads while 16 clients log in, memory, the start, and a user with a million
//! tasks. Every figure is printed and written to `target/throughput.json` as soon as it is measured;
//! the tables follow at the end, even after a failure or a signal.
//!
//! | option | variable | meaning |
//! |---|---|---|
//! | | `BENCH_SECONDS` | seconds per measurement (5) |
//! | | `BENCH_ROUNDS` | number of rounds (3); the table shows medians |
//! | `--quick` | | one round of one second, to check that everything works |
//! | `--growth` | | adds ten million tasks (minutes, and 4 GB of disk in `/var/tmp`) |
//! | `--only WORK` | | measures only this row of the table; can be repeated |
//! | `--against PATH` | | also measures another build of the service in every round, on the same database |
//!
//! CPU time and memory are read from `/proc`, so these columns are empty on systems other than Linux.

mod client;
mod interrupt;
mod processes;
mod report;
mod scenarios;
mod usage;
mod work;

use std::{
    cell::Cell,
    env, fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::json;

use client::{Load, load, serve_constant};
use processes::{Database, Process, await_response, free_address, start_server};
use report::{Pgbench, Report, Round, median};
use usage::{CpuSampler, resident};
use work::{BenchUser, TASKS, USERS, Work, count_remaining, insert_tasks, insert_users};

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
    outcome
}

struct Options {
    seconds: Duration,
    rounds: usize,
    quick: bool,
    growth: bool,
    /// Empty for all kinds of work and the scenarios.
    only: Vec<Work>,
    /// Another build of the service.
    against: Option<PathBuf>,
    /// Run as the server with the constant response; the benchmark starts itself with this option.
    bare: Option<SocketAddr>,
}

impl Options {
    fn read() -> Result<Self> {
        let given = |flag: &str| env::args().any(|argument| argument == flag);
        let quick = given("--quick");
        let arguments: Vec<String> = env::args().collect();
        let values = |flag: &str| {
            let pairs = arguments.windows(2).filter(|pair| pair[0] == flag);
            let values = pairs.map(|pair| match pair[1].starts_with("--") {
                true => Err(format!("{flag} needs a value")),
                false => Ok(pair[1].clone()),
            });
            values.collect::<std::result::Result<Vec<_>, _>>()
        };
        let only = values("--only")?.into_iter().map(|name| {
            let work = Work::ALL.into_iter().find(|work| work.name() == name);
            work.ok_or_else(|| format!("there is no work `{name}`"))
        });
        let number = |name: &str, default: u64| match env::var(name) {
            Ok(text) => text
                .parse()
                .map_err(|_| format!("{name} must be a whole number")),
            Err(_) => Ok(default),
        };
        Ok(Self {
            seconds: Duration::from_secs(
                number("BENCH_SECONDS", if quick { 1 } else { 5 })?.max(1),
            ),
            rounds: number("BENCH_ROUNDS", if quick { 1 } else { 3 })?.max(1) as usize,
            quick,
            growth: given("--growth"),
            only: only.collect::<std::result::Result<_, _>>()?,
            against: values("--against")?.pop().map(PathBuf::from),
            bare: values("--bare")?
                .pop()
                .map(|address| address.parse())
                .transpose()?,
        })
    }

    fn work(&self) -> Vec<Work> {
        match self.only.as_slice() {
            [] => Work::ALL.to_vec(),
            only => only.to_vec(),
        }
    }

    /// Returns the number of measurements planned.
    fn steps(&self) -> usize {
        let parts = if self.against.is_some() { 3 } else { 2 };
        let rounds = self.rounds * self.work().len() * parts;
        let scenarios = match (self.only.is_empty(), self.growth) {
            (false, _) => 0,
            (true, false) => 7,
            (true, true) => 8,
        };
        // Creating the data is the first step.
        1 + rounds + scenarios
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
    /// The number of the first task that has not been deleted.
    delete_range: u64,
    /// The number of tasks prepared for deletion per second; doubled whenever they run out.
    deletes_per_second: u64,
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
        // The first start migrates the database, so it is not measured.
        let ours = Path::new(env!("CARGO_BIN_EXE_todo-api"));
        drop(start_server(ours, &database, address, directory.path())?);
        let mut start_ups = Vec::new();
        let mut started = start_server(ours, &database, address, directory.path())?;
        for _ in 0..4 {
            start_ups.push(started.1);
            let (process, _) = started;
            drop(process);
            started = start_server(ours, &database, address, directory.path())?;
        }
        let (server, last) = started;
        start_ups.push(last);
        let other = match &options.against {
            None => None,
            Some(build) => {
                let address = free_address()?;
                let (process, _) = start_server(build, &database, address, directory.path())?;
                Some((process, address))
            }
        };
        let mut bench = Self {
            memory_idle: resident(server.id()),
            users: (0..USERS).map(BenchUser::new).collect::<Result<_>>()?,
            step: Cell::new(0),
            steps: options.steps(),
            delete_range: 1_000_000_000,
            deletes_per_second: 20_000,
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
        let hash = bcrypt::hash(PASSWORD, BCRYPT_COST)?;
        self.database.sql(&[
            &insert_users(&hash),
            &insert_tasks(0, TASKS),
            &format!(
                "update task_lists set revision = 1, tasks = {}",
                TASKS / USERS
            ),
            "vacuum analyze",
        ])?;
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        let all = self.options.only.is_empty();
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

    fn watched(&self) -> CpuSampler {
        CpuSampler {
            server: Some(self.server.id()),
            postmaster: self.database.postmaster,
        }
    }

    /// Measures the client against the server with the constant response.
    fn constant(&mut self) -> Result<()> {
        self.step("a constant response");
        let address = free_address()?;
        let mut command = Command::new(env::current_exe()?);
        let process = Process::spawn(command.arg("--bare").arg(address.to_string()))?;
        await_response(address)?;
        let watched = CpuSampler {
            server: Some(process.id()),
            postmaster: None,
        };
        let users = &self.users;
        let seen = load(
            address,
            CONNECTIONS,
            self.options.seconds,
            0,
            &watched,
            &|rng, out| Work::Read.request(users, 0, rng, out),
        )?;
        self.report.record(
            "constant_response",
            json!({
                "requests_per_second": seen.rate(),
                "server_us": seen.cost(seen.cpu.server),
                "client_us": seen.cost(seen.cpu.client),
            }),
        )
    }

    /// Measures one kind of work with every program; `first` selects the order.
    fn round(&mut self, work: Work, first: usize) -> Result<()> {
        let mut round = Round::default();
        let outcome = self.measure(work, first, &mut round);
        self.report.record_round(work, &round)?;
        outcome
    }

    fn measure(&mut self, work: Work, first: usize, round: &mut Round) -> Result<()> {
        let other = self.other.as_ref();
        let other = other.map(|(process, address)| (process.id(), *address));
        let parts = if other.is_some() { 3 } else { 2 };
        for turn in first..first + parts {
            match turn % parts {
                0 => round.service = Some(self.service(work, self.server.id(), self.address)?),
                1 => round.pgbench = Some(self.pgbench(work)?),
                _ => {
                    if let Some((process, address)) = other {
                        round.other = Some(self.service(work, process, address)?);
                    }
                }
            }
        }
        Ok(())
    }

    /// Prepares the database, so that every measurement starts from the same state. Returns the number of
    /// tasks that each of `clients` can delete.
    fn prepare(&mut self, work: Work, clients: u64, length: Duration) -> Result<u64> {
        let mut share = 0;
        if work == Work::Delete {
            share = (length.as_secs() + 1) * self.deletes_per_second / clients;
            self.delete_range += 1_000_000_000;
            self.database
                .sql(&[&insert_tasks(self.delete_range, share * clients)])?;
        }
        if !matches!(work, Work::Read | Work::List) {
            self.database.sql(&["vacuum analyze tasks", "checkpoint"])?;
        }
        Ok(share)
    }

    /// Measures one kind of work with the server of this process id.
    fn service(&mut self, work: Work, server: u32, address: SocketAddr) -> Result<Load> {
        self.step(&format!("{}: the service", work.name()));
        loop {
            let length = self.options.seconds;
            let share = self.prepare(work, CONNECTIONS as u64, length)?;
            let (users, delete_range) = (&self.users, self.delete_range);
            let watched = CpuSampler {
                server: Some(server),
                postmaster: self.database.postmaster,
            };
            let load = load(
                address,
                CONNECTIONS,
                length,
                share,
                &watched,
                &|rng, out| work.request(users, delete_range, rng, out),
            )?;
            if !load.ran_out {
                return Ok(load);
            }
            self.deletes_per_second *= 2;
        }
    }

    fn pgbench(&mut self, work: Work) -> Result<Pgbench> {
        self.step(&format!("{}: pgbench", work.name()));
        let mix = if work == Work::Mix {
            Work::MIX.to_vec()
        } else {
            vec![(work, 1)]
        };
        loop {
            let length = self.options.seconds;
            let share = self.prepare(work, 20, length)?;
            let mut scripts = Vec::new();
            for (work, weight) in &mix {
                let path = self.directory.path().join(format!("{}.sql", work.name()));
                fs::write(&path, work.script(self.delete_range, share)?)?;
                scripts.push((path, *weight));
            }
            let before = self.watched().cpu();
            let (rate, done) = self.database.pgbench(&scripts, length)?;
            let cpu = self.watched().settled().since(&before).postgres;
            if work == Work::Delete {
                let left = self.database.sql(&[&count_remaining(self.delete_range)])?;
                // Some deletes found no task.
                if share as f64 * 20.0 - left.trim().parse::<f64>()? < done {
                    self.deletes_per_second *= 2;
                    continue;
                }
            }
            let postgres_us = cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / done);
            return Ok(Pgbench { rate, postgres_us });
        }
    }
}
