//! Password hashing. It is slow by design, so it runs on a dedicated thread pool, whose bounded
//! queue is shared fairly between the networks of the clients.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::oneshot;
use tokio::time::timeout_at;

use crate::auth::job_queue::{Job, JobQueue};
use crate::auth::password::{NewPassword, check_length, check_strength, normalize};
use crate::db::Deadline;
use crate::error::{Error, Result};
use crate::telemetry::logging::catch_panic;
use crate::telemetry::metrics::Metrics;

/// The queue capacity per thread at a cost of 12. A hash takes a quarter of a second at that cost,
/// so a full queue drains in 4 s. Each increment of the cost halves the capacity.
const QUEUE_PER_THREAD: usize = 16;
/// The nice value of the threads, with a third of the usual weight: idle cores hash, and hashing
/// delays requests little. At a lower priority, logins would time out while requests keep all cores
/// busy.
#[cfg(target_os = "linux")]
const NICE: i32 = 5;

/// A pool of threads that hash passwords.
pub(crate) struct PasswordHasher {
    cost: u32,
    pool: Arc<Pool>,
    metrics: Arc<Metrics>,
}

/// The client for which a password is hashed.
#[derive(Clone, Copy)]
pub(crate) struct HashClient {
    pub(crate) network: IpAddr,
    /// When the client stops waiting for the result.
    pub(crate) deadline: Deadline,
}

/// The result of verifying a password.
pub(crate) struct Verification {
    pub(crate) matches: bool,
    /// The new hash to store, if the password matches and the stored hash has an outdated cost.
    pub(crate) rehashed: Option<String>,
}

impl PasswordHasher {
    /// Starts one thread per core, with a low priority.
    pub(crate) fn new(cost: u32, metrics: Arc<Metrics>) -> io::Result<Self> {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let capacity = threads * (QUEUE_PER_THREAD >> cost.saturating_sub(12));
        let pool = Arc::new(Pool {
            queue: Mutex::new(JobQueue::new(capacity)),
            job_added: Condvar::new(),
        });
        for number in 0..threads {
            let pool = pool.clone();
            thread::Builder::new()
                .name(format!("hash-{number}"))
                .spawn(move || {
                    lower_priority();
                    pool.run_jobs();
                })?;
        }
        Ok(Self {
            cost,
            pool,
            metrics,
        })
    }

    /// Hashes a new password. Fails if it is easy to guess.
    pub(crate) async fn hash(
        &self,
        password: NewPassword,
        email: &str,
        client: HashClient,
    ) -> Result<String> {
        let (cost, email) = (self.cost, email.to_owned());
        self.run(client, move || {
            check_strength(&password.text, &email, password.pointer)
                .map_err(|error| Error::Validation(vec![error]))?;
            bcrypt_hash(&password.text, cost)
        })
        .await
    }

    /// Verifies a password. If there is no hash, or no account can have this password, verifies a
    /// dummy hash instead, which takes just as long.
    pub(crate) async fn verify(
        &self,
        password: &str,
        hash: Option<&str>,
        client: HashClient,
    ) -> Result<Verification> {
        let cost = self.cost;
        let password = normalize(password);
        let (password, hash) = match hash {
            Some(hash) if check_length(&password, "").is_ok() => (password, hash.to_owned()),
            _ => ("does not match".to_owned(), dummy_hash(cost)),
        };
        let work = move || verify_blocking(&password, &hash, cost);
        self.run(client, work).await
    }

    /// Runs a job on one of the threads. Fails if the queue is full, or if a job of another network
    /// displaces this one.
    async fn run<T: Send + 'static>(
        &self,
        client: HashClient,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let started = Instant::now();
        let (sender, receiver) = oneshot::channel();
        let _queued = self.metrics.hash_queued();
        let caller = Arc::new(());
        let job = Job {
            network: client.network,
            caller: Arc::downgrade(&caller),
            work: Box::new(move || {
                let result = catch_panic(work);
                let result = result.unwrap_or_else(|panic| Err(Error::Internal(panic)));
                sender.send(result).ok();
            }),
        };
        self.pool.queue.lock().add(job, started)?;
        self.pool.job_added.notify_one();
        let result = timeout_at(client.deadline.at(), receiver).await;
        let seconds = started.elapsed().as_secs_f64();
        self.metrics.hash_duration.observe(seconds);
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
    /// Runs jobs until the process ends.
    fn run_jobs(&self) {
        let mut queue = self.queue.lock();
        loop {
            let Some(job) = queue.start_next() else {
                self.job_added.wait(&mut queue);
                continue;
            };
            MutexGuard::unlocked(&mut queue, job.work);
            // No other thread needs to be notified: this one takes the next job of the network.
            queue.finish(job.network);
        }
    }
}

/// Lowers the priority of the current thread. Does nothing on systems other than Linux, where the
/// priority is that of the process.
fn lower_priority() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        log::warn!("password hashing competes with requests: cannot lower its priority: {error}");
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
        // A failed attempt must take as long for an older, cheaper hash. Each increment of the cost
        // doubles the work, so these verifications add up to the difference.
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
        let verified = verify_blocking("does not match", &dummy_hash(10), 10);
        assert!(!verified.unwrap().matches);
    }
}
