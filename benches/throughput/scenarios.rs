//! Further scenarios: logins during reads, idle connections, a user with a million tasks.

use std::{
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, net::TcpStream, runtime};

use crate::{
    BCRYPT_COST, Bench, CONNECTIONS, IDLE_CONNECTIONS, LOGIN_CLIENTS, PASSWORD, Result,
    client::{Load, Writer, fetch, header, load, read_response},
    data::{BenchUser, id, insert_tasks, insert_tasks_of},
    interrupt::check,
    usage::resident,
    work::{Rng, Work},
};

impl Bench {
    /// Measures logins against bare bcrypt, and reads during logins.
    pub(crate) fn logins(&mut self) -> Result<()> {
        let length = self.options.seconds.max(Duration::from_secs(3));
        let cores = thread::available_parallelism()?.get();
        self.step("bare bcrypt");
        let bare = bare_bcrypt(cores, length)?;
        self.report.record("logins.bcrypt_cost", BCRYPT_COST)?;
        self.report.record("logins.bare_bcrypt_threads", cores)?;
        self.report.record("logins.bare_bcrypt_per_second", bare)?;
        let (users, address, watched) = (&self.users, self.address, self.watched());
        let log_in = |rng: &mut Rng, out: &mut Vec<u8>| Work::Login.request(users, 0, rng, out);
        let logging_in = || load(address, LOGIN_CLIENTS, length, 0, &watched, &log_in);
        let reading = |work: Work| {
            let read = move |rng: &mut Rng, out: &mut Vec<u8>| work.request(users, 0, rng, out);
            load(address, CONNECTIONS, length, 0, &watched, &read)
        };
        self.step("logins alone");
        let alone = logging_in()?;
        self.report
            .record("logins.alone_per_second", alone.rate())?;
        self.report
            .record("logins.alone_to_bare_bcrypt", alone.rate() / bare)?;
        self.report.record("logins.alone_failed", alone.failed)?;
        for work in [Work::Read, Work::List] {
            let name = work.name();
            self.step(&format!("{name} alone"));
            let quiet = reading(work)?;
            self.step(&format!("{name} while {LOGIN_CLIENTS} clients log in"));
            let (beside, during) = thread::scope(|scope| {
                let beside = scope.spawn(logging_in);
                let during = reading(work);
                (beside.join(), during)
            });
            let (beside, during) = (beside.map_err(|_| "the login clients panicked")??, during?);
            let figures = json!({
                "logins_per_second": beside.rate(), "logins_failed": beside.failed,
                "quiet": reads(&quiet), "beside": reads(&during),
                "to_quiet": during.rate() / quiet.rate(),
            });
            self.report.record(&format!("logins.{name}"), figures)?;
        }
        Ok(())
    }

    /// Measures resident memory with 2,000 open connections that have each received one response.
    pub(crate) fn idle_connections(&self) -> Result<Option<f64>> {
        self.step("2,000 idle connections");
        let limit = getrlimit(Resource::Nofile);
        let raised = Rlimit {
            current: limit.maximum,
            ..limit
        };
        setrlimit(Resource::Nofile, raised)?;
        let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(async {
            let (mut open, mut response) = (Vec::new(), Vec::new());
            for n in 0..IDLE_CONNECTIONS {
                let mut stream = TcpStream::connect(self.address).await?;
                let mut request = Vec::new();
                let user = &self.users[n % self.users.len()];
                user.request(&mut request, "GET", "?limit=20", None, 200);
                stream.write_all(&request).await?;
                read_response(&mut stream, &mut response).await?;
                open.push(stream);
            }
            Ok(resident(self.server.id()))
        })
    }

    /// Compares a user with a million tasks with a user with a thousand.
    pub(crate) fn growth(&mut self) -> Result<()> {
        let many = if self.options.quick {
            100_000
        } else {
            1_000_000
        };
        self.step(&format!("a user with {many} tasks"));
        // Two of the users, whose tasks have numbers that no other task has.
        let (small, large) = (1, 2);
        self.database.sql(&[
            &insert_tasks_of(small, 300_000_000, 1_000),
            &insert_tasks_of(large, 400_000_000, many),
            // Not lower than the revision of any task.
            "update task_lists set revision = 1000000000000",
            "vacuum analyze tasks",
            "checkpoint",
        ])?;
        self.grown("a user with 1,000 tasks", small, 300_000_000, 1_000)?;
        let what = format!("a user with {many} tasks");
        self.grown(&what, large, 400_000_000, many)?;
        if self.options.growth {
            self.step("adding ten million tasks");
            self.database.sql(&[
                &insert_tasks(50_000_000_000_000, 10_000_000),
                "vacuum analyze tasks",
                "checkpoint",
            ])?;
            let what = "the same with 10,000,000 tasks of other users";
            self.grown(what, large, 400_000_000, many)?;
        }
        Ok(())
    }

    /// Measures reads, first pages, pages from the middle of a user's tasks, and changes.
    fn grown(&mut self, what: &str, user: usize, first: u64, count: u64) -> Result<()> {
        self.users[user].read_list_state(self.address)?;
        let user = &self.users[user];
        let middle = self.middle(user, count)?;
        let watched = self.watched();
        let length = self.options.seconds.min(Duration::from_secs(3));
        let run = |writer: &Writer| load(self.address, CONNECTIONS, length, 0, &watched, writer);
        let read = run(&|rng, out| {
            user.request(
                out,
                "GET",
                &format!("/{}", id(first + rng.below(count))),
                None,
                200,
            )
        })?;
        let list = run(&|_, out| user.request(out, "GET", "?limit=20", None, 200))?;
        let deep = run(&|_, out| user.request(out, "GET", &middle, None, 200))?;
        let changes = run(&|_, out| user.request_changes(out))?;
        let figures = json!({
            "failed": read.failed + list.failed + deep.failed + changes.failed,
            "read_per_second": read.rate(), "read_p50_ms": read.percentile(50),
            "list_per_second": list.rate(), "list_p50_ms": list.percentile(50),
            "middle_page_per_second": deep.rate(), "middle_page_p50_ms": deep.percentile(50),
            "changes_per_second": changes.rate(), "changes_p50_ms": changes.percentile(50),
        });
        self.report.record(&format!("growth.{what}"), figures)
    }

    /// Returns the query for a page in the middle of a user's tasks, found by following `Link`.
    fn middle(&self, user: &BenchUser, count: u64) -> Result<String> {
        let mut query = "?limit=1000".to_owned();
        let mut seen = 0;
        while seen < count / 2 {
            let mut request = Vec::new();
            user.request(&mut request, "GET", &query, None, 200);
            let (status, response) = fetch(self.address, &request)?;
            let link =
                header(&response, "link").and_then(|link| link.split_once('<')?.1.split_once('>'));
            let next = link.and_then(|(target, _)| target.split_once('?'));
            let Some((_, next)) = next.filter(|_| status == 200) else {
                break;
            };
            query = format!("?{next}");
            seen += response.matches(r#""completed":"#).count() as u64;
        }
        Ok(query.replace("limit=1000", "limit=20"))
    }
}

fn reads(load: &Load) -> Value {
    json!({
        "requests_per_second": load.rate(),
        "p95_ms": load.percentile(95),
        "p99_ms": load.percentile(99),
        "failed": load.failed,
    })
}

/// Measures verifications per second of bcrypt alone.
fn bare_bcrypt(threads: usize, length: Duration) -> Result<f64> {
    let hash = bcrypt::hash(PASSWORD, BCRYPT_COST)?;
    let begin = Instant::now();
    let counts = thread::scope(|scope| {
        let verify = || {
            let mut count = 0.0;
            while begin.elapsed() < length {
                check()?;
                bcrypt::verify(PASSWORD, &hash)?;
                count += 1.0;
            }
            Ok(count / begin.elapsed().as_secs_f64())
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(verify)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| "a hashing thread panicked")?)
            .collect::<Result<Vec<f64>>>()
    })?;
    Ok(counts.iter().sum())
}
