//! Tracks whether the database responds. While it is down, requests fail fast and one task probes
//! it until it is up again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use log::{info, warn};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::connect::{ConnectError, Endpoint};
use super::deadline::REQUEST_TIMEOUT;
use super::error::error_message;
use super::inspect::ServerInfo;
use super::sockets::{CONNECT_TIMEOUT, Sockets};

/// How long a probe waits for a free socket. The pool leaves one for it, so a longer wait means
/// that closed connections linger.
const PROBE_SOCKET_TIMEOUT: Duration = Duration::from_secs(1);
/// The time between attempts to reach a database that is down.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(250);
/// The interval of log messages while waiting for the database at startup.
const WAIT_LOG_INTERVAL: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// The database has not been reached or not been migrated yet.
    Starting,
    Up,
    Down,
}

/// The known state of the database, and the probe that updates it.
pub(super) struct Health {
    pub(super) endpoint: Endpoint,
    pub(super) sockets: Sockets,
    state: watch::Sender<State>,
    probing: AtomicBool,
    last_response: Mutex<Instant>,
}

impl Health {
    pub(super) fn new(endpoint: Endpoint, sockets: Sockets) -> Self {
        Self {
            endpoint,
            sockets,
            state: watch::Sender::new(State::Starting),
            probing: AtomicBool::new(false),
            last_response: Mutex::new(Instant::now()),
        }
    }

    pub(super) fn is_up(&self) -> bool {
        *self.state.borrow() == State::Up
    }

    pub(super) fn record_response(&self) {
        *self.last_response.lock() = Instant::now();
    }

    pub(super) fn has_responded_within(&self, time: Duration) -> bool {
        self.is_up() && self.last_response.lock().elapsed() < time
    }

    /// Whether the database is up. During startup, waits until this is known, so that requests
    /// accepted before then do not fail.
    pub(super) async fn is_up_after_startup(&self, until: Instant) -> bool {
        let mut state = self.state.subscribe();
        let known = state.wait_for(|state| *state != State::Starting);
        timeout_at(until, known).await.is_ok() && self.is_up()
    }

    /// Waits until the database is up; returns false if it is not up by then.
    pub(super) async fn wait_until_up(&self, until: Instant) -> bool {
        let mut state = self.state.subscribe();
        let up = state.wait_for(|state| *state == State::Up);
        timeout_at(until, up).await.is_ok()
    }

    /// Runs `work` for as long as the database is up; returns `None` if it goes down.
    pub(super) async fn while_up<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let mut state = self.state.subscribe();
        tokio::select! {
            biased;
            value = work => Some(value),
            _ = state.wait_for(|state| *state == State::Down) => None,
        }
    }

    /// Connects and migrates, retrying for as long as `give_up_after` allows. Fails immediately if
    /// waiting cannot help.
    pub(super) async fn wait_until_ready(
        &self,
        give_up_after: Option<Duration>,
    ) -> Result<ServerInfo, String> {
        let started = Instant::now();
        let mut last_logged: Option<Instant> = None;
        loop {
            let reason = match self.endpoint.inspect(true).await {
                Ok(info) => {
                    self.record_response();
                    self.state.send_replace(State::Up);
                    return Ok(info);
                }
                Err(ConnectError::Fatal(error)) => return Err(error),
                Err(ConnectError::Transient(reason)) => reason,
            };
            self.state.send_replace(State::Down);
            let location = &self.endpoint.location;
            if give_up_after.is_some_and(|limit| started.elapsed() > limit) {
                return Err(format!("cannot use the database at {location}: {reason}"));
            }
            if last_logged.is_none_or(|at| at.elapsed() > WAIT_LOG_INTERVAL) {
                warn!("waiting for the database at {location}: {reason}");
                last_logged = Some(Instant::now());
            }
            sleep(RECONNECT_INTERVAL).await;
        }
    }

    /// Starts a task that checks whether the database responds, unless one is running. If it does
    /// not, the task marks it as down and probes it until it is up again.
    pub(super) fn start_probe(self: &Arc<Self>, reason: String) {
        if !self.is_up() || self.probing.swap(true, Ordering::AcqRel) {
            return;
        }
        let health = self.clone();
        tokio::spawn(async move {
            match health.confirm_down().await {
                Ok(()) => health.probing.store(false, Ordering::Release),
                Err(cause) => {
                    health
                        .wait_for_recovery(&format!("{cause} ({reason})"))
                        .await
                }
            }
        });
    }

    /// Fails if the database does not respond: after one probe that hangs, or three that fail while
    /// no other statement gets a response.
    async fn confirm_down(&self) -> Result<(), String> {
        let started = Instant::now();
        let mut cause = String::new();
        for _ in 0..3 {
            match timeout(CONNECT_TIMEOUT, self.probe()).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => cause = error,
                Err(_) => return Err("no response within 2 s".into()),
            }
            if *self.last_response.lock() > started {
                return Ok(());
            }
            sleep(Duration::from_millis(50)).await;
        }
        Err(cause)
    }

    /// Opens a connection outside the pool and makes one round trip. Succeeds if no socket is free,
    /// because that says nothing about the database.
    async fn probe(&self) -> Result<(), String> {
        let Ok(_socket) = timeout(PROBE_SOCKET_TIMEOUT, self.sockets.acquire()).await else {
            return Ok(());
        };
        let ping = self.endpoint.ping().await;
        ping.map_err(|error| error_message(&error))
    }

    async fn wait_for_recovery(&self, reason: &str) {
        let started = Instant::now();
        warn!("database lost: {reason}");
        self.state.send_replace(State::Down);
        self.sockets.close_all();
        while !matches!(timeout(REQUEST_TIMEOUT, self.probe()).await, Ok(Ok(()))) {
            sleep(RECONNECT_INTERVAL).await;
        }
        self.record_response();
        // Reset before the state changes, so that the next failure can start a probe.
        self.probing.store(false, Ordering::Release);
        self.state.send_replace(State::Up);
        let seconds = started.elapsed().as_secs_f64();
        info!("database recovered after {seconds:.1} s");
    }
}
