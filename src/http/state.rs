//! The state shared by all requests.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use secrecy::SecretString;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::auth::hasher::PasswordHasher;
use crate::auth::list_signer::ListSigner;
use crate::auth::rate_limiter::RateLimiter;
use crate::auth::revocations::Revocations;
use crate::auth::token::TokenIssuer;
use crate::config::Config;
use crate::db::Database;
use crate::db::keyed_semaphore::KeyedSemaphore;
use crate::db::purge::Purger;
use crate::db::sessions::{ALL_EPOCHS, Revocation};
use crate::db::users::LockoutKey;
use crate::error::{Error, Result};
use crate::http::client_ip::{client_network, network_prefix};
use crate::http::cors::Cors;
use crate::http::large_responses::LargeResponses;
use crate::mail::Mailer;
use crate::telemetry::labels::{LoginFailure, RevocationReason};
use crate::telemetry::log_limiter::LogLimiter;
use crate::telemetry::metrics::Metrics;

/// Old rows are purged only if the database responded this recently, so that a suspended database
/// is not woken up.
const RECENTLY_RESPONDED: Duration = Duration::from_secs(1);

/// The maximum number of concurrent login attempts on one account from one network. Prevents them
/// from filling the hash queue.
const MAX_CONCURRENT_LOGINS: usize = 5;

/// How many changes of the address a user may request at once. Each sends a notice to the present
/// address, which may belong to someone else if it is not verified. Another one is allowed each minute.
const MAX_ADDRESS_CHANGES: u32 = 10;

/// The state shared by all handlers.
pub(crate) struct AppState {
    pub(crate) config: Config,
    pub(crate) database: Database,
    pub(crate) tokens: TokenIssuer,
    pub(crate) list_signer: ListSigner,
    pub(crate) revocations: Arc<Revocations>,
    pub(crate) passwords: PasswordHasher,
    pub(crate) login_slots: KeyedSemaphore<LockoutKey>,
    /// Changes of a user's password or address, and deletions, run one after another.
    pub(crate) account_changes: KeyedSemaphore<Uuid>,
    attempt_limiter: RateLimiter<IpAddr>,
    write_limiter: RateLimiter<Uuid>,
    address_change_limiter: RateLimiter<Uuid>,
    /// `None` if no mail server is configured.
    pub(crate) mail: Option<Arc<Mailer>>,
    pub(crate) cors: Cors,
    pub(crate) large_responses: LargeResponses,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) limited_log: LogLimiter,
    purger: Arc<Purger>,
    /// Cancelled when the service begins to shut down. Then all responses close their connections,
    /// requests that wait for changes return, and `/readyz` reports that the service is stopping.
    pub(crate) shutdown: CancellationToken,
}

impl AppState {
    /// Creates the state. Errors are a single line for the operator.
    pub(crate) fn new(
        mut config: Config,
        secret: &SecretString,
        database: Database,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, String> {
        let previous_secret = config.jwt_secret_previous.as_ref();
        let unusable = |error: Error| format!("cannot use the JWT secret: {error:?}");
        let tokens = TokenIssuer::new(secret, previous_secret, config.lifetimes.access);
        let tokens = tokens.map_err(unusable)?;
        let list_signer = ListSigner::new(secret, previous_secret).map_err(unusable)?;
        let mail = config.mail.take();
        let mail = mail.map(|mail| Mailer::new(mail, secret, previous_secret, metrics.clone()));
        let mail = mail.transpose().map_err(unusable)?;
        let passwords = PasswordHasher::new(config.bcrypt_cost, metrics.clone())
            .map_err(|error| format!("cannot start the hashing threads: {error}"))?;
        let (attempts, writes) = (config.auth_rate_per_minute, config.writes_per_minute);
        Ok(Arc::new(Self {
            tokens,
            list_signer,
            passwords,
            revocations: Arc::default(),
            login_slots: KeyedSemaphore::new(MAX_CONCURRENT_LOGINS),
            account_changes: KeyedSemaphore::new(1),
            attempt_limiter: RateLimiter::new(attempts, attempts),
            // A burst of five seconds' worth.
            write_limiter: RateLimiter::new(writes, writes / 12),
            address_change_limiter: RateLimiter::new(1, MAX_ADDRESS_CHANGES),
            mail,
            cors: Cors::new(&config.cors_origins),
            limited_log: LogLimiter::default(),
            purger: Arc::default(),
            large_responses: LargeResponses::new(),
            shutdown: CancellationToken::new(),
            database,
            metrics,
            config,
        }))
    }

    /// Counts an attempt to authenticate. Fails if the client's network makes too many.
    pub(crate) fn count_attempt(&self, client: IpAddr) -> Result<()> {
        let (network, shared) = (client_network(client), network_prefix(client, 16, 32));
        let counted = self.attempt_limiter.check(&network, &shared);
        counted.map_err(too_many_attempts)
    }

    /// Counts a request to change a user's address. Fails if there are too many.
    pub(crate) fn count_address_change(&self, user_id: Uuid) -> Result<()> {
        let counted = self.address_change_limiter.check(&user_id, &user_id);
        counted.map_err(too_many_attempts)
    }

    /// Counts a write of tasks. Fails if the user writes too fast.
    pub(crate) fn count_write(&self, user_id: Uuid) -> Result<()> {
        let counted = self.write_limiter.check(&user_id, &user_id);
        counted.map_err(|retry_after| Error::TooManyRequests { retry_after })
    }

    /// Records sessions that this instance has revoked, so that it rejects their access tokens
    /// immediately.
    pub(crate) fn record_revoked(&self, reason: RevocationReason, sessions: &[Uuid]) {
        let revocations = sessions.iter().map(|session_id| Revocation {
            session_id: *session_id,
            before_epoch: ALL_EPOCHS,
        });
        self.revocations.insert(revocations);
        self.metrics.record_revoked(reason, sessions.len());
    }

    /// Purges old rows in the background if a purge is due and the database is awake.
    pub(crate) fn spawn_purge_if_due(&self) {
        if !self.database.has_responded_within(RECENTLY_RESPONDED) || !self.purger.is_due() {
            return;
        }
        let (purger, database) = (self.purger.clone(), self.database.clone());
        tokio::spawn(async move { purger.purge(&database).await });
    }
}

fn too_many_attempts(retry_after: u64) -> Error {
    Error::TooManyAttempts {
        retry_after,
        reason: LoginFailure::RateLimited,
    }
}
