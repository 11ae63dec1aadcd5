//! Passwords: what makes one acceptable, and the few threads that hash them. Hashing is slow on
//! purpose; on threads of its own and behind a bounded queue it slows nobody else down.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use log::error;
use tokio::sync::oneshot;
use tokio::time::timeout_at;
use unicode_normalization::UnicodeNormalization;

use crate::db::Deadline;
use crate::error::{Error, FieldError};
use crate::telemetry::logging::catch_panic;
use crate::telemetry::metrics::Metrics;

/// OWASP ASVS 5.0, 6.2.1: eight at least. Counted in code points.
const MIN_CHARACTERS: usize = 8;
/// bcrypt reads no more; a longer one is refused rather than cut.
const MAX_BYTES: usize = 72;
/// What waits for a thread at most, by the number of threads, at a cost of 12: at a quarter of a
/// second each the last of them is served within 8 s. Each step of the cost doubles that.
const QUEUE_PER_THREAD: usize = 32;

/// NFC, as RFC 8265 section 4.2.2 has it: keyboards differ in how they compose an accent. Everything
/// below works on normalized passwords.
pub(crate) fn normalize(password: &str) -> String {
    password.nfc().collect()
}

/// The rules that need no thought: length and NUL.
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

/// Whether a password can be anybody's at all; if not, it is merely a wrong one.
fn length_ok(password: &str) -> bool {
    check_length(password, "").is_ok()
}

/// Refuses what is easily guessed, with advice; the user's own address is guessed first.
fn check_strength(password: &str, email: &str) -> Result<(), (&'static str, String)> {
    let estimate = zxcvbn::zxcvbn(
        password,
        &[email, email.split('@').next().unwrap_or_default()],
    );
    if estimate.score() >= zxcvbn::Score::Two {
        return Ok(());
    }
    let mut detail = String::from("the password is too easily guessed");
    if let Some(feedback) = estimate.feedback() {
        if let Some(warning) = feedback.warning() {
            detail = format!("{detail}: {}", warning.to_string().trim_end_matches('.'));
        }
        for suggestion in feedback.suggestions() {
            detail = format!("{detail}. {}", suggestion.to_string().trim_end_matches('.'));
        }
    }
    Err(("too_guessable", detail))
}

type Job = Box<dyn FnOnce() + Send>;

/// The threads that hash.
pub(crate) struct PasswordHasher {
    cost: u32,
    queue: SyncSender<Job>,
    metrics: Arc<Metrics>,
}

/// What verifying a password said.
pub(crate) struct Verification {
    pub(crate) matches: bool,
    /// The hash of the same password at today's cost, where the stored one has another.
    pub(crate) rehashed: Option<String>,
}

impl PasswordHasher {
    /// One thread less than there are cores, so that one is always left to everybody else.
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

    /// The hash of a new password, once it has shown not to be easily guessed.
    pub(crate) async fn hash(
        &self,
        password: String,
        email: &str,
        pointer: &'static str,
        deadline: Deadline,
    ) -> Result<String, Error> {
        let (cost, email) = (self.cost, email.to_owned());
        self.run(deadline, move || {
            check_strength(&password, &email).map_err(|(code, detail)| {
                Error::Validation(vec![FieldError::at(pointer, code, detail)])
            })?;
            bcrypt_hash(&password, cost)
        })
        .await?
    }

    /// Whether a password belongs to a hash. Without one the same work is done for nothing, and
    /// so it is for what no password can be.
    pub(crate) async fn verify(
        &self,
        password: &str,
        hash: Option<&str>,
        deadline: Deadline,
    ) -> Result<Verification, Error> {
        let password = normalize(password);
        let known = hash.is_some() && length_ok(&password);
        let hash = hash
            .filter(|_| known)
            .map_or_else(|| dummy_hash(self.cost), str::to_owned);
        let password = if length_ok(&password) {
            password
        } else {
            "impossible".into()
        };
        let cost = self.cost;
        self.run(deadline, move || {
            let matches = bcrypt_verify(&password, &hash)? && known;
            let stored_cost = cost_of(&hash).unwrap_or(cost);
            if !matches {
                // A guess at an old, cheaper hash takes as long as any: each step of the cost
                // doubles the work, so these add up to what is missing.
                for cost in stored_cost..cost {
                    bcrypt_verify(&password, &dummy_hash(cost))?;
                }
            }
            let rehashed = if matches && stored_cost != cost {
                Some(bcrypt_hash(&password, cost)?)
            } else {
                None
            };
            Ok(Verification { matches, rehashed })
        })
        .await?
    }

    /// Runs something slow on one of the threads; refuses it at once where too much waits.
    async fn run<T: Send + 'static>(
        &self,
        deadline: Deadline,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let started = Instant::now();
        let (sender, receiver) = oneshot::channel();
        let queued = self.metrics.hash_queued();
        let job = Box::new(move || {
            // Whoever asked may have gone, or waited too long.
            if !sender.is_closed() {
                let result = work();
                // The receiver may be gone by now; nobody is left to tell.
                sender.send(result).ok();
            }
            drop(queued);
        });
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = self.queue.try_send(job)
        {
            return Err(Error::Overloaded);
        }
        let result = match timeout_at(deadline.at(), receiver).await {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(_)) => Err(Error::Internal("a hashing thread dropped its work".into())),
            Err(_) => Err(Error::Overloaded),
        };
        self.metrics
            .hash_duration
            .observe(started.elapsed().as_secs_f64());
        result
    }
}

fn worker_loop(jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else {
            return;
        };
        if let Err(panic) = catch_panic(job) {
            error!("hashing a password failed: {panic}");
        }
    }
}

/// A new hash, for who sets a password without a server running.
pub(crate) fn hash_new_password(password: &str, email: &str, cost: u32) -> Result<String, String> {
    let password = normalize(password);
    check_length(&password, "").map_err(|fault| fault.detail().to_owned())?;
    check_strength(&password, email).map_err(|(_, detail)| detail)?;
    bcrypt::hash(&password, cost).map_err(|error| error.to_string())
}

/// A hash of no password, as costly as a real one: a salt and a digest that nobody made, 22 and 31
/// characters of bcrypt's alphabet.
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

/// The cost that a hash was made with: `$2b$12$…`.
fn cost_of(hash: &str) -> Option<u32> {
    hash.split('$').nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_are_eight_characters_and_seventy_two_bytes() {
        assert!(!length_ok("1234567"));
        assert!(length_ok("éééééééé"));
        assert!(length_ok(&"é".repeat(36)));
        assert!(!length_ok(&format!("{}x", "é".repeat(36))));
        assert!(!length_ok("nul\0 inside"));
    }

    #[test]
    fn the_decoy_is_a_hash_that_verifies_to_no() {
        assert!(!bcrypt_verify("impossible", &dummy_hash(10)).unwrap());
        assert_eq!(dummy_hash(10).len(), 60);
    }

    #[test]
    fn the_users_own_address_is_guessed_first() {
        assert!(check_strength("ann.smith@example.com", "ann.smith@example.com").is_err());
        assert!(check_strength("password", "ann@example.com").is_err());
        assert!(check_strength("correct horse battery staple", "ann@example.com").is_ok());
    }
}
