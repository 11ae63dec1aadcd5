//! Sends mail over SMTP: a bounded queue in this process, one connection, and retries with backoff.
//!
//! Mails are composed and sent after the response, so that its duration does not depend on them.

mod content;
mod smtp;

use std::sync::Arc;
use std::time::{Duration, Instant};

use lettre::Message;
use lettre::transport::smtp::client::AsyncSmtpConnection;
use log::warn;
use secrecy::SecretString;
use tokio::sync::{Mutex, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::mail_token::MailTokens;
use crate::config::MailConfig;
use crate::error::Result;
use crate::telemetry::labels::MailOutcome;
use crate::telemetry::logging::logfmt_value;
use crate::telemetry::metrics::Metrics;

pub(crate) use content::Mail;
use smtp::classify;
pub(crate) use smtp::{SmtpServer, quit};

/// A mail in the queue takes a few kilobytes.
const QUEUE_CAPACITY: usize = 1000;
/// How long one attempt may take. RFC 5321 allows minutes for each reply, but all mails wait for a
/// server that hangs.
pub(crate) const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);
/// The pauses between the three attempts: one for a restart of the server, one for greylisting.
const BACKOFFS: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(30)];
/// How long a mail may wait for others and for its attempts. A link is good for 30 minutes.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// How long a mail waits before its first attempt, so that composing it does not slow down the response.
const RESPONSE_TIME: Duration = Duration::from_millis(20);
/// How long an idle connection is kept.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Sends mails.
pub(crate) struct Mailer {
    config: MailConfig,
    pub(crate) tokens: MailTokens,
    queue: Arc<Semaphore>,
    /// The connection, if it is open, and the time of its last mail. Attempts run one at a time.
    connection: Mutex<Option<(AsyncSmtpConnection, Instant)>>,
    deliveries: TaskTracker,
    /// Cancelled during shutdown: mails that wait for their next attempt are sent at once.
    closing: CancellationToken,
    metrics: Arc<Metrics>,
}

impl Mailer {
    pub(crate) fn new(
        config: MailConfig,
        secret: &SecretString,
        previous_secret: Option<&SecretString>,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            config,
            tokens: MailTokens::new(secret, previous_secret)?,
            queue: Arc::new(Semaphore::new(QUEUE_CAPACITY)),
            connection: Mutex::default(),
            deliveries: TaskTracker::new(),
            closing: CancellationToken::new(),
            metrics,
        }))
    }

    /// Adds a mail to the queue, or drops it if the queue is full. Takes just as long without a mail.
    pub(crate) fn send(self: &Arc<Self>, mail: Option<Mail>) {
        let Ok(permit) = self.queue.clone().try_acquire_owned() else {
            return self.give_up(MailOutcome::QueueFull, "the queue is full", 0);
        };
        let (mailer, queued) = (self.clone(), self.metrics.mail_queued());
        self.deliveries.spawn(async move {
            let wait = sleep(RESPONSE_TIME);
            mailer.closing.run_until_cancelled(wait).await;
            if let Some(mail) = mail
                && let Err(elapsed) = timeout(DELIVERY_TIMEOUT, mailer.clone().deliver(mail)).await
            {
                mailer.give_up(MailOutcome::Unreachable, &elapsed.to_string(), 0);
            }
            drop((permit, queued));
        });
    }

    /// Sends the mails in the queue before the deadline, and closes the connection.
    pub(crate) async fn drain(&self, deadline: tokio::time::Instant) {
        self.closing.cancel();
        self.deliveries.close();
        let drained = async {
            self.deliveries.wait().await;
            if let Some((connection, _)) = self.connection.lock().await.take() {
                quit(connection).await;
            }
        };
        if tokio::time::timeout_at(deadline, drained).await.is_err() {
            warn!("mails lost at shutdown count={}", self.deliveries.len());
        }
    }

    async fn deliver(self: Arc<Self>, mail: Mail) {
        let message = match mail.compose(&self.config, &self.tokens) {
            Ok(message) => message,
            Err(cause) => return self.give_up(MailOutcome::Unsupported, &cause, 0),
        };
        for attempt in 0.. {
            let Err((outcome, cause)) = self.clone().try_send(&message).await else {
                return self.metrics.record_mail(MailOutcome::Sent);
            };
            let is_transient = matches!(outcome, MailOutcome::Deferred | MailOutcome::Unreachable);
            let Some(backoff) = BACKOFFS.get(attempt).filter(|_| is_transient) else {
                return self.give_up(outcome, &cause, attempt + 1);
            };
            // Jitter keeps mails that failed together from being retried together.
            let pause = backoff.mul_f64(0.5 + fastrand::f64() / 2.0);
            self.closing.run_until_cancelled(sleep(pause)).await;
        }
    }

    /// Sends a message on the open connection or a new one, and keeps the connection for a while.
    async fn try_send(self: Arc<Self>, message: &Message) -> Result<(), (MailOutcome, String)> {
        let mut slot = self.connection.lock().await;
        let open = slot.take();
        let attempt = async {
            // After an error or a timeout, the connection is dropped: it may be in the middle of a command.
            let mut connection = match reusable(open).await {
                Some(connection) => connection,
                None => self.config.server.connect().await?,
            };
            let (envelope, bytes) = (message.envelope(), message.formatted());
            connection.send(envelope, &bytes).await?;
            Ok(connection)
        };
        let connection = match timeout(ATTEMPT_TIMEOUT, attempt).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return Err((classify(&error), error.to_string())),
            Err(_) => return Err((MailOutcome::Unreachable, "timed out".into())),
        };
        *slot = Some((connection, Instant::now()));
        drop(slot);
        tokio::spawn(self.close_when_idle());
        Ok(())
    }

    async fn close_when_idle(self: Arc<Self>) {
        sleep(IDLE_TIMEOUT).await;
        let is_idle = |(_, used_at): &mut (_, Instant)| used_at.elapsed() >= IDLE_TIMEOUT;
        let idle = self.connection.lock().await.take_if(is_idle);
        if let Some((connection, _)) = idle {
            quit(connection).await;
        }
    }

    /// Counts and logs a mail that is not sent.
    pub(crate) fn give_up(&self, outcome: MailOutcome, cause: &str, attempts: usize) {
        self.metrics.record_mail(outcome);
        let (reason, cause) = (outcome.label(), logfmt_value(cause));
        warn!("mail not sent reason={reason} attempts={attempts} cause={cause}");
    }
}

/// Returns the connection if the server still responds on it.
async fn reusable(open: Option<(AsyncSmtpConnection, Instant)>) -> Option<AsyncSmtpConnection> {
    let (mut connection, _) = open?;
    connection.test_connected().await.then_some(connection)
}
