//! Counters and histograms; `server::serve_metrics` shows them on a listener of their own.
//!
//! A label has only values that this code names: nothing that a client sends becomes one.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper::Method;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

use crate::telemetry::labels::{AuthFailure, LoginFailure, RevocationCause, TokenRejection};

/// What the service counts.
pub struct Metrics {
    registry: Registry,
    /// Seconds since 1970 at the start.
    started: f64,
    /// Requests answered, by route pattern, method and status.
    requests: IntCounterVec,
    /// Seconds from a request's head to its answer, by route pattern.
    duration: HistogramVec,
    /// Seconds waited for a connection to the database, in vain or not.
    pub(crate) db_wait: Histogram,
    /// Seconds until a statement was answered or given up.
    pub(crate) db_query: Histogram,
    db_pool_waiters: IntGauge,
    db_connections: IntGaugeVec,
    hash_queue: IntGauge,
    /// Seconds that a hash took, waiting included.
    pub(crate) hash_time: Histogram,
    /// Logins by their outcome.
    logins: IntCounterVec,
    /// Access and refresh tokens rejected, by reason.
    rejected: IntCounterVec,
    /// Sessions revoked, by cause.
    revoked: IntCounterVec,
    /// Sockets of clients.
    pub(crate) connections: IntGauge,
}

/// From half a millisecond to the ten seconds of a drain, with the target of 1 s among them.
const SECONDS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// The route of a path that the router does not know.
pub(crate) const UNMATCHED_ROUTE: &str = "none";
const LOGIN_SUCCESS: &str = "success";
const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
const OTHER_METHOD: &str = "other";

impl Metrics {
    /// A registry with everything at zero.
    ///
    /// # Panics
    /// If two metrics have one name: a bug that every start would show.
    #[allow(clippy::expect_used)]
    pub fn new() -> Arc<Self> {
        let registry = Registry::new();
        let build = Gauge::with_opts(
            Opts::new("todo_api_build_info", "1, with the version of the service")
                .const_label("version", env!("CARGO_PKG_VERSION")),
        );
        let metrics = Self {
            requests: IntCounterVec::new(
                Opts::new("todo_api_http_requests_total", "Requests answered"),
                &["route", "method", "status"],
            )
            .expect("a well-formed name"),
            duration: HistogramVec::new(
                histogram_opts(
                    "http_request_duration_seconds",
                    "Seconds from a request's head to its answer",
                ),
                &["route"],
            )
            .expect("a well-formed name"),
            db_wait: histogram(
                "db_pool_acquire_duration_seconds",
                "Seconds waited for a database connection",
            ),
            db_query: histogram(
                "db_query_duration_seconds",
                "Seconds until a statement was answered",
            ),
            db_pool_waiters: gauge(
                "db_pool_waiters",
                "Statements that wait for a database connection",
            ),
            db_connections: IntGaugeVec::new(
                Opts::new("todo_api_db_connections", "Connections to the database"),
                &["state"],
            )
            .expect("a well-formed name"),
            hash_queue: gauge(
                "password_hash_queue_length",
                "Password hashes waiting or being computed",
            ),
            hash_time: histogram(
                "password_hash_duration_seconds",
                "Seconds that a password hash took, waiting included",
            ),
            logins: counters(
                "logins_total",
                "Sign-ins by outcome",
                "outcome",
                &[&[LOGIN_SUCCESS], LoginFailure::LABELS].concat(),
            ),
            rejected: counters(
                "tokens_rejected_total",
                "Tokens refused by reason",
                "reason",
                TokenRejection::LABELS,
            ),
            revoked: counters(
                "sessions_revoked_total",
                "Sessions ended by cause",
                "cause",
                RevocationCause::LABELS,
            ),
            connections: gauge("http_open_connections", "Open connections of clients"),
            registry,
            started: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0.0, |since| since.as_secs_f64()),
        };
        for method in METHODS.into_iter().chain([OTHER_METHOD]) {
            metrics.declare_response(UNMATCHED_ROUTE, method, "404");
        }
        let build = build.expect("a well-formed name");
        build.set(1.0);
        let all: [Box<dyn prometheus::core::Collector>; 13] = [
            Box::new(build),
            Box::new(metrics.requests.clone()),
            Box::new(metrics.duration.clone()),
            Box::new(metrics.db_wait.clone()),
            Box::new(metrics.db_query.clone()),
            Box::new(metrics.db_pool_waiters.clone()),
            Box::new(metrics.db_connections.clone()),
            Box::new(metrics.hash_queue.clone()),
            Box::new(metrics.hash_time.clone()),
            Box::new(metrics.logins.clone()),
            Box::new(metrics.rejected.clone()),
            Box::new(metrics.revoked.clone()),
            Box::new(metrics.connections.clone()),
        ];
        for collector in all {
            metrics
                .registry
                .register(collector)
                .expect("every metric has a name of its own");
        }
        #[cfg(target_os = "linux")]
        metrics
            .registry
            .register(Box::new(
                prometheus::process_collector::ProcessCollector::for_self(),
            ))
            .expect("the process is registered once");
        Arc::new(metrics)
    }

    /// Creates the series of a documented response at zero.
    pub(crate) fn declare_response(&self, route: &str, method: &str, status: &str) {
        self.requests.with_label_values(&[route, method, status]);
        self.duration.with_label_values(&[route]);
    }

    /// Counts an answered request. A method of a client's own making has no label of its own.
    pub(crate) fn record_request(
        &self,
        route: &str,
        method: &Method,
        status: &str,
        took: Duration,
    ) {
        let method = METHODS
            .into_iter()
            .find(|known| *known == method.as_str())
            .unwrap_or(OTHER_METHOD);
        self.requests
            .with_label_values(&[route, method, status])
            .inc();
        self.duration
            .with_label_values(&[route])
            .observe(took.as_secs_f64());
    }

    /// Counts a login.
    pub(crate) fn count_login(&self) {
        self.logins.with_label_values(&[LOGIN_SUCCESS]).inc();
    }

    /// Counts a token that was rejected, or a login that failed.
    pub(crate) fn count_auth_failure(&self, failure: AuthFailure) {
        let counters = match failure {
            AuthFailure::Token(_) => &self.rejected,
            AuthFailure::Login(_) => &self.logins,
        };
        counters.with_label_values(&[failure.label()]).inc();
    }

    /// Counts sessions that were revoked.
    pub(crate) fn count_revoked(&self, cause: RevocationCause, sessions: usize) {
        self.revoked
            .with_label_values(&[cause.label()])
            .inc_by(sessions as u64);
    }

    /// Counts somebody who waits for a connection, until it is dropped.
    pub(crate) fn db_pool_waiters(&self) -> GaugeGuard {
        GaugeGuard::new(&self.db_pool_waiters)
    }

    /// Counts a hash that waits for a thread or has one, until it is dropped.
    pub(crate) fn hash_queued(&self) -> GaugeGuard {
        GaugeGuard::new(&self.hash_queue)
    }

    /// Everything as Prometheus text, with the state of the pool as it is now.
    pub(crate) fn text(&self, (connections, idle): (u32, u32)) -> Vec<u8> {
        self.db_connections
            .with_label_values(&["idle"])
            .set(idle.into());
        self.db_connections
            .with_label_values(&["in_use"])
            .set(connections.saturating_sub(idle).into());
        let mut families = self.registry.gather();
        // The collector reckons from the boot time, which systemd's ProcSubset=pid hides.
        let mut started = prometheus::proto::Gauge::default();
        started.set_value(self.started);
        for family in &mut families {
            if family.name() == "process_start_time_seconds" {
                for metric in family.mut_metric() {
                    metric.set_gauge(started.clone());
                }
            }
        }
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&families, &mut text) {
            log::error!("cannot write the metrics: {error}");
        }
        text
    }
}

/// One of those that a gauge counts.
pub(crate) struct GaugeGuard(IntGauge);

impl GaugeGuard {
    fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn histogram_opts(name: &str, help: &str) -> HistogramOpts {
    HistogramOpts::new(format!("todo_api_{name}"), help).buckets(SECONDS.to_vec())
}

#[allow(clippy::expect_used)]
fn histogram(name: &str, help: &str) -> Histogram {
    Histogram::with_opts(histogram_opts(name, help)).expect("a well-formed name")
}

/// A counter with all values of its label at zero: a series that appears with its first event has
/// no rate then, and what adds it to others has no value at all.
#[allow(clippy::expect_used)]
fn counters(name: &str, help: &str, label: &str, values: &[&str]) -> IntCounterVec {
    let counters = IntCounterVec::new(Opts::new(format!("todo_api_{name}"), help), &[label])
        .expect("a well-formed name");
    for value in values {
        counters.with_label_values(&[*value]);
    }
    counters
}

#[allow(clippy::expect_used)]
fn gauge(name: &str, help: &str) -> IntGauge {
    IntGauge::new(format!("todo_api_{name}"), help).expect("a well-formed name")
}
