//! Password hashing. It is slow by design, so it runs on a dedicated thread pool, whose bounded
//! queue is shared fairly between the networks of the clients.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;
use tokio::time::timeout_at;

use crate::auth::password::{check_length, check_strength, normalize};
use crate::db::Deadline;
use crate::error::{Error, Result};
use crate::telemetry::logging::catch_panic;
use crate::telemetry::metrics::{GaugeGuard, Metrics};

/// The queue capacity per thread at a cost of 12. A hash takes a quarter of a second at that cost,
/// so a full queue drains in 4 s. Each increment of the cost halves the capacity.
const QUEUE_PER_THREAD: usize = 16;
/// How many threads work for one network at a time.
const MAX_RUNNING_PER_NETWORK: usize = 2;
/// How much later a job is due for each job that its network added recently. With half the time in
/// which a full queue drains, a client of a quiet network is served before all busy ones.
const DELAY_PER_JOB: Duration = Duration::from_secs(2);
/// The time in which a network's count of jobs halves.
const HALF_LIFE: Duration = Duration::from_secs(60);
/// The number of counts. Networks may share one by chance.
const COUNTS: usize = 1 << 16;

/// A pool of threads that hash passwords.
pub(crate) struct PasswordHasher {
    cost: u32,
    pool: Arc<Pool>,
    metrics: Arc<Metrics>,
}

/// The result of verifying a password.
pub(crate) struct Verification {
    pub(crate) matches: bool,
    /// The new hash of a matching password whose stored hash has an outdated cost.
    pub(crate) rehashed: Option<String>,
}

impl PasswordHasher {
    /// Starts one thread fewer than there are cores, leaving one core for all other work.
    pub(crate) fn new(cost: u32, metrics: Arc<Metrics>) -> std::io::Result<Self> {
        let threads = thread::available_parallelism()
            .map_or(1, |cores| cores.get() - 1)
            .max(1);
        let capacity = threads * (QUEUE_PER_THREAD >> cost.saturating_sub(12));
        let pool = Arc::new(Pool {
            queue: Mutex::new(JobQueue::new(capacity)),
            job_added: Condvar::new(),
        });
        for number in 0..threads {
            let pool = pool.clone();
            thread::Builder::new()
                .name(format!("hash-{number}"))
                .spawn(move || pool.run_jobs())?;
        }
        Ok(Self {
            cost,
            pool,
            metrics,
        })
    }

    /// Hashes a new password that is not easy to guess.
    pub(crate) async fn hash(
        &self,
        password: String,
        email: &str,
        pointer: &'static str,
        network: IpAddr,
        deadline: Deadline,
    ) -> Result<String> {
        let (cost, email) = (self.cost, email.to_owned());
        self.run(network, deadline, move || {
            check_strength(&password, &email, pointer)
                .map_err(|error| Error::Validation(vec![error]))?;
            bcrypt_hash(&password, cost)
        })
        .await
    }

    /// Verifies a password. If there is no hash, or no account can have this password, verifies a
    /// dummy hash instead, which takes just as long.
    pub(crate) async fn verify(
        &self,
        password: &str,
        hash: Option<&str>,
        network: IpAddr,
        deadline: Deadline,
    ) -> Result<Verification> {
        let cost = self.cost;
        let password = normalize(password);
        let (password, hash) = match hash {
            Some(hash) if check_length(&password, "").is_ok() => (password, hash.to_owned()),
            _ => ("does not match".to_owned(), dummy_hash(cost)),
        };
        let work = move || verify_blocking(&password, &hash, cost);
        self.run(network, deadline, work).await
    }

    /// Runs a job on one of the threads. Fails if the queue has no room for it, or loses its room
    /// to another network.
    async fn run<T: Send + 'static>(
        &self,
        network: IpAddr,
        deadline: Deadline,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let started = Instant::now();
        let (sender, receiver) = oneshot::channel();
        let caller = Arc::new(self.metrics.hash_queued());
        let job = Job {
            network,
            caller: Arc::downgrade(&caller),
            work: Box::new(move || {
                let result = catch_panic(work);
                let result = result.unwrap_or_else(|panic| Err(Error::Internal(panic)));
                sender.send(result).ok();
            }),
        };
        self.pool.add(job)?;
        let result = timeout_at(deadline.at(), receiver).await;
        self.metrics
            .hash_duration
            .observe(started.elapsed().as_secs_f64());
        match result {
            Ok(Ok(result)) => result,
            _ => Err(Error::Overloaded),
        }
    }
}

struct Pool {
    queue: Mutex<JobQueue>,
    job_added: Condvar,
}

impl Pool {
    fn add(&self, job: Job) -> Result<()> {
        self.queue.lock().add(job, Instant::now())?;
        self.job_added.notify_one();
        Ok(())
    }

    /// Runs jobs until the process ends.
    fn run_jobs(&self) {
        loop {
            let mut queue = self.queue.lock();
            let job = loop {
                match queue.start_next() {
                    Some(job) => break job,
                    None => self.job_added.wait(&mut queue),
                }
            };
            drop(queue);
            (job.work)();
            // No other thread needs to be notified: this one takes the next job of the network.
            self.queue.lock().finish(job.network);
        }
    }
}

struct Job {
    network: IpAddr,
    /// Gone when the caller no longer waits for the result.
    caller: Weak<GaugeGuard>,
    work: Box<dyn FnOnce() + Send>,
}

/// Jobs that wait for a thread. A job is due the later, the more jobs its network added recently, so a
/// client of a quiet network is next, however many jobs of busy ones are waiting.
struct JobQueue {
    capacity: usize,
    /// In the order of their arrival, with the times at which they are due.
    waiting: Vec<(Instant, Job)>,
    /// The networks of the jobs that are running.
    running: Vec<IpAddr>,
    recent: RecentJobs,
}

impl JobQueue {
    fn new(capacity: usize) -> Self {
        Self {
            capacity,
            waiting: Vec::new(),
            running: Vec::new(),
            recent: RecentJobs::default(),
        }
    }

    /// Adds a job. If the queue is full, the job takes the place of the job of another network that
    /// is due last, if that is due after it.
    fn add(&mut self, job: Job, now: Instant) -> Result<()> {
        let due = now + DELAY_PER_JOB * self.recent.count(job.network, now);
        self.remove_abandoned();
        if self.waiting.len() >= self.capacity {
            let others = self.waiting.iter().enumerate();
            let others = others.filter(|(_, (_, other))| other.network != job.network);
            match others.max_by_key(|(_, (due, _))| *due) {
                Some((index, (last, _))) if *last > due => self.waiting.remove(index),
                _ => return Err(Error::Overloaded),
            };
        }
        self.waiting.push((due, job));
        Ok(())
    }

    /// Takes the next job out of the queue: the oldest of the network whose job is due first, among
    /// those for which fewer threads work than may.
    fn start_next(&mut self) -> Option<Job> {
        self.remove_abandoned();
        let running = |network: IpAddr| self.running.iter().filter(|n| **n == network).count();
        let may_start = |job: &Job| running(job.network) < MAX_RUNNING_PER_NETWORK;
        let candidates = self.waiting.iter().filter(|(_, job)| may_start(job));
        let network = candidates.min_by_key(|(due, _)| *due)?.1.network;
        let mut jobs = self.waiting.iter();
        let index = jobs.position(|(_, job)| job.network == network)?;
        self.running.push(network);
        Some(self.waiting.remove(index).1)
    }

    /// Records that a job of this network has ended.
    fn finish(&mut self, network: IpAddr) {
        if let Some(index) = self.running.iter().position(|other| *other == network) {
            self.running.swap_remove(index);
        }
    }

    fn remove_abandoned(&mut self) {
        self.waiting
            .retain(|(_, job)| job.caller.strong_count() > 0);
    }
}

/// How many jobs the networks added recently, refused ones included: counts that halve every minute.
struct RecentJobs {
    /// Each count, and when it was updated, in seconds since `start`. The hash of a network is its
    /// index: memory is bounded, and a flood of new networks raises the counts of all.
    counts: Vec<(f64, f64)>,
    hasher: RandomState,
    start: Instant,
}

impl Default for RecentJobs {
    fn default() -> Self {
        Self {
            // The operating system provides the memory when it is first used.
            counts: vec![(0.0, 0.0); COUNTS],
            hasher: RandomState::new(),
            start: Instant::now(),
        }
    }
}

impl RecentJobs {
    /// Counts a job. Returns how many there were before, rounded so that a single one is forgotten
    /// after a minute.
    fn count(&mut self, network: IpAddr, now: Instant) -> u32 {
        let index = self.hasher.hash_one(network) as usize % COUNTS;
        let (count, updated) = &mut self.counts[index];
        let seconds = now.duration_since(self.start).as_secs_f64();
        let before = *count * (-(seconds - *updated) / HALF_LIFE.as_secs_f64()).exp2();
        (*count, *updated) = (before + 1.0, seconds);
        before.round() as u32
    }
}

/// Hashes a new password on the current thread, for commands that run without a server.
pub(crate) fn hash_new_password(password: &str, email: &str, cost: u32) -> Result<String, String> {
    let password = normalize(password);
    check_length(&password, "")
        .and_then(|()| check_strength(&password, email, ""))
        .map_err(|error| error.detail().to_owned())?;
    bcrypt::hash(&password, cost).map_err(|error| error.to_string())
}

fn verify_blocking(password: &str, hash: &str, cost: u32) -> Result<Verification> {
    let matches = bcrypt_verify(password, hash)?;
    let stored_cost = cost_of(hash).unwrap_or(cost);
    if !matches {
        // A failed attempt takes as long on an older, cheaper hash: each increment of the cost
        // doubles the work, so these add up to the difference.
        for cost in stored_cost..cost {
            bcrypt_verify(password, &dummy_hash(cost))?;
        }
    }
    let outdated = matches && stored_cost != cost;
    let rehashed = outdated.then(|| bcrypt_hash(password, cost)).transpose()?;
    Ok(Verification { matches, rehashed })
}

/// A hash that matches no known password but takes as long to verify: a made-up salt (22 characters)
/// and digest (31 characters) in bcrypt's alphabet.
fn dummy_hash(cost: u32) -> String {
    format!("$2b${cost:02}$abcdefghijklmnopqrstuuAbCdEfGhIjKlMnOpQrStUvWxYz01232")
}

fn bcrypt_verify(password: &str, hash: &str) -> Result<bool> {
    bcrypt::verify(password, hash)
        .map_err(|error| Error::Internal(format!("cannot verify a password: {error}")))
}

fn bcrypt_hash(password: &str, cost: u32) -> Result<String> {
    bcrypt::hash(password, cost)
        .map_err(|error| Error::Internal(format!("cannot hash a password: {error}")))
}

/// The cost of a hash such as `$2b$12$…`.
fn cost_of(hash: &str) -> Option<u32> {
    hash.split('$').nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dummy_hash_matches_nothing() {
        assert_eq!(dummy_hash(10).len(), 60);
        assert!(
            !verify_blocking("does not match", &dummy_hash(10), 10)
                .unwrap()
                .matches
        );
    }

    fn network(number: u32) -> IpAddr {
        IpAddr::from(number.to_be_bytes())
    }

    /// A queue to which callers add jobs.
    struct Fixture {
        queue: JobQueue,
        callers: Vec<(IpAddr, Option<Arc<GaugeGuard>>)>,
        now: Instant,
    }

    impl Fixture {
        fn new(capacity: usize) -> Self {
            Self {
                queue: JobQueue::new(capacity),
                callers: Vec::new(),
                now: Instant::now(),
            }
        }

        /// Whether the queue accepts a job of this network.
        fn add(&mut self, number: u32) -> bool {
            let caller = Arc::new(Metrics::new().hash_queued());
            let job = Job {
                network: network(number),
                caller: Arc::downgrade(&caller),
                work: Box::new(|| ()),
            };
            self.callers.push((job.network, Some(caller)));
            self.queue.add(job, self.now).is_ok()
        }

        /// Runs all jobs one after another. Returns their networks.
        fn run(&mut self) -> Vec<u32> {
            let mut order = Vec::new();
            while let Some(job) = self.queue.start_next() {
                let IpAddr::V4(address) = job.network else {
                    unreachable!("not IPv4");
                };
                order.push(address.to_bits());
                self.queue.finish(job.network);
            }
            order
        }
    }

    #[test]
    fn a_quiet_network_is_served_before_the_next_job_of_a_busy_one() {
        let mut fixture = Fixture::new(10);
        for number in [1, 1, 1, 2, 2, 3] {
            assert!(fixture.add(number));
        }
        assert_eq!(fixture.run(), [1, 2, 3, 1, 2, 1]);
        // Networks 1 to 3 have a history, network 4 has none.
        for number in [3, 2, 1, 4] {
            assert!(fixture.add(number));
        }
        assert_eq!(fixture.run(), [4, 3, 2, 1]);
    }

    #[test]
    fn jobs_of_one_network_are_served_in_order_of_arrival_and_two_at_a_time() {
        let mut fixture = Fixture::new(10);
        assert!((0..4).all(|_| fixture.add(1)));
        fixture.now += HALF_LIFE * 4;
        assert!(fixture.add(1) && fixture.add(2));
        let callers: Vec<_> = (fixture.queue.waiting.iter())
            .map(|(_, job)| job.caller.clone())
            .collect();
        let mut next = || fixture.queue.start_next().map(|job| job.caller);
        for expected in [&callers[0], &callers[1], &callers[5]] {
            assert!(next().is_some_and(|caller| caller.ptr_eq(expected)));
        }
        assert!(next().is_none());
        fixture.queue.finish(network(1));
        let third = fixture.queue.start_next().unwrap();
        assert!(third.caller.ptr_eq(&callers[2]));
    }

    #[test]
    fn a_full_queue_makes_room_for_a_quiet_network_only() {
        let mut fixture = Fixture::new(4);
        for number in [1, 1, 2, 2] {
            assert!(fixture.add(number));
        }
        assert!(!fixture.add(1) && !fixture.add(2));
        assert!(fixture.add(3));
        assert_eq!(fixture.run(), [1, 2, 3, 1]);
    }

    #[test]
    fn a_hundred_busy_networks_do_not_keep_a_quiet_one_out() {
        let mut fixture = Fixture::new(32);
        let attack = |fixture: &mut Fixture| {
            for number in 1..=100 {
                fixture.add(number);
            }
            assert_eq!(fixture.queue.waiting.len(), 32);
        };
        attack(&mut fixture);
        fixture.run();
        for quiet in [201, 202, 203] {
            attack(&mut fixture);
            assert!(fixture.add(quiet));
        }
        assert_eq!(fixture.run()[..3], [201, 202, 203]);
    }

    #[test]
    fn a_job_whose_caller_has_left_frees_its_place() {
        let mut fixture = Fixture::new(1);
        assert!(fixture.add(1) && !fixture.add(1));
        fixture.callers[0].1 = None;
        assert!(fixture.add(1));
    }

    #[test]
    fn counts_halve_every_minute() {
        let mut recent = RecentJobs::default();
        let mut now = Instant::now();
        let counts: Vec<u32> = (0..9).map(|_| recent.count(network(1), now)).collect();
        assert_eq!(counts, (0..9).collect::<Vec<u32>>());
        now += HALF_LIFE;
        assert_eq!(recent.count(network(1), now), 5);
        now += HALF_LIFE * 10;
        assert_eq!(recent.count(network(1), now), 0);
    }
}
