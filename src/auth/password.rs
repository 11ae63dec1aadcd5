//! Password rules and hashing. Hashing is slow by design, so it runs on a dedicated thread pool
//! with a bounded queue.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::timeout_at;
use unicode_normalization::UnicodeNormalization;

use crate::db::Deadline;
use crate::error::{Error, FieldError};
use crate::telemetry::logging::catch_panic;
use crate::telemetry::metrics::Metrics;

/// Counted in code points. OWASP ASVS 5.0, 6.2.1, requires at least 8.
const MIN_CHARACTERS: usize = 8;
/// bcrypt ignores everything after 72 bytes; longer passwords are rejected instead of truncated.
const MAX_BYTES: usize = 72;
/// The queue capacity per thread at a cost of 12. A hash takes a quarter of a second at that cost,
/// so a full queue drains in 8 s. Each increment of the cost halves the capacity.
const QUEUE_PER_THREAD: usize = 32;

/// Normalizes a password to NFC (RFC 8265, section 4.2.2), because keyboards differ in how they
/// compose accented letters.
pub(crate) fn normalize(password: &str) -> String {
    password.nfc().collect()
}

/// Checks the length of a normalized password, and that it does not contain NUL.
pub(crate) fn check_length(password: &str, pointer: &'static str) -> Result<(), FieldError> {
    let (code, detail) = if password.chars().count() < MIN_CHARACTERS {
        ("too_short", "the password must have at least 8 characters")
    } else if password.len() > MAX_BYTES {
        (
            "too_long",
            "the password must have at most 72 bytes in UTF-8",
        )
    } else if password.contains('\0') {
        (
            "invalid_character",
            "the password must not contain the character NUL",
        )
    } else {
        return Ok(());
    };
    Err(FieldError::at(pointer, code, detail))
}

/// Rejects a password that is easy to guess, in particular from the user's e-mail address. The
/// error includes advice.
fn check_strength(password: &str, email: &str, pointer: &'static str) -> Result<(), FieldError> {
    let local_part = email.split('@').next().unwrap_or_default();
    let estimate = zxcvbn::zxcvbn(password, &[email, local_part]);
    if estimate.score() >= zxcvbn::Score::Two {
        return Ok(());
    }
    let mut detail = String::from("the password is too easy to guess");
    if let Some(feedback) = estimate.feedback() {
        if let Some(warning) = feedback.warning() {
            detail = format!("{detail}: {}", warning.to_string().trim_end_matches('.'));
        }
        for suggestion in feedback.suggestions() {
            detail = format!("{detail}. {}", suggestion.to_string().trim_end_matches('.'));
        }
    }
    Err(FieldError::at(pointer, "too_guessable", detail))
}

type Job = Box<dyn FnOnce() + Send>;

/// A pool of threads that hash passwords.
pub(crate) struct PasswordHasher {
    cost: u32,
    queue: SyncSender<Job>,
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
        let (queue, jobs) =
            sync_channel::<Job>(threads * (QUEUE_PER_THREAD >> cost.saturating_sub(12)));
        let jobs = Arc::new(Mutex::new(jobs));
        for number in 0..threads {
            let jobs = jobs.clone();
            thread::Builder::new()
                .name(format!("hash-{number}"))
                .spawn(move || worker_loop(&jobs))?;
        }
        Ok(Self {
            cost,
            queue,
            metrics,
        })
    }

    /// Hashes a new password that is not easy to guess.
    pub(crate) async fn hash(
        &self,
        password: String,
        email: &str,
        pointer: &'static str,
        deadline: Deadline,
    ) -> Result<String, Error> {
        let (cost, email) = (self.cost, email.to_owned());
        self.run(deadline, move || {
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
        deadline: Deadline,
    ) -> Result<Verification, Error> {
        let cost = self.cost;
        let password = normalize(password);
        let (password, hash) = match hash {
            Some(hash) if check_length(&password, "").is_ok() => (password, hash.to_owned()),
            _ => ("does not match".to_owned(), dummy_hash(cost)),
        };
        self.run(deadline, move || verify_blocking(&password, &hash, cost))
            .await
    }

    /// Runs a job on one of the threads. Fails at once if the queue is full.
    async fn run<T: Send + 'static>(
        &self,
        deadline: Deadline,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let started = Instant::now();
        let (sender, receiver) = oneshot::channel();
        let queued = self.metrics.hash_queued();
        let job = Box::new(move || {
            // Skips the work if the caller timed out or was cancelled while the job was queued.
            if !sender.is_closed() {
                let result = catch_panic(work);
                let result = result.unwrap_or_else(|panic| Err(Error::Internal(panic)));
                sender.send(result).ok();
            }
            drop(queued);
        });
        self.queue.try_send(job).map_err(|_| Error::Overloaded)?;
        let result = timeout_at(deadline.at(), receiver).await;
        self.metrics
            .hash_duration
            .observe(started.elapsed().as_secs_f64());
        result
            .map_err(|_| Error::Overloaded)?
            .map_err(|_| Error::Internal("a hashing job was dropped".into()))?
    }
}

/// Runs jobs until the [`PasswordHasher`] is dropped.
fn worker_loop(jobs: &Mutex<Receiver<Job>>) {
    loop {
        // A separate statement, so that the lock is released before the job runs.
        let job = jobs.lock().recv();
        let Ok(job) = job else { return };
        job();
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

fn verify_blocking(password: &str, hash: &str, cost: u32) -> Result<Verification, Error> {
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

fn bcrypt_verify(password: &str, hash: &str) -> Result<bool, Error> {
    bcrypt::verify(password, hash)
        .map_err(|error| Error::Internal(format!("cannot verify a password: {error}")))
}

fn bcrypt_hash(password: &str, cost: u32) -> Result<String, Error> {
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
    fn requires_8_characters_and_at_most_72_bytes() {
        let accepts = |password: &str| check_length(password, "").is_ok();
        assert!(!accepts("1234567"));
        assert!(accepts("éééééééé"));
        assert!(accepts(&"é".repeat(36)));
        assert!(!accepts(&format!("{}x", "é".repeat(36))));
        assert!(!accepts("nul\0 inside"));
    }

    #[test]
    fn the_dummy_hash_matches_nothing() {
        assert_eq!(dummy_hash(10).len(), 60);
        assert!(
            !verify_blocking("does not match", &dummy_hash(10), 10)
                .unwrap()
                .matches
        );
    }

    #[test]
    fn rejects_passwords_that_are_easy_to_guess() {
        let is_strong = |password: &str, email: &str| check_strength(password, email, "").is_ok();
        assert!(!is_strong("ann.smith@example.com", "ann.smith@example.com"));
        assert!(!is_strong("password", "ann@example.com"));
        assert!(is_strong("correct horse battery staple", "ann@example.com"));
    }
}
