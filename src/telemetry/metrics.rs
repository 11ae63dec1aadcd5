//! Prometheus metrics. Labels have only values that this code defines, never text from a client.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper::Method;
use prometheus::core::Collector;
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use super::labels::{AuthFailure, LoginFailure, MailOutcome, RevocationReason, TokenRejection};

/// The metrics of the service, which their help texts explain.
pub(crate) struct Metrics {
    registry: Registry,
    start_time: f64,
    requests: IntCounterVec,
    request_duration: HistogramVec,
    pub(crate) db_acquire_duration: Histogram,
    pub(crate) db_query_duration: Histogram,
    database_up: IntGauge,
    db_pool_waiters: IntGauge,
    db_connections: IntGaugeVec,
    hash_queue: IntGauge,
    pub(crate) hash_duration: Histogram,
    logins: IntCounterVec,
    tokens_rejected: IntCounterVec,
    sessions_revoked: IntCounterVec,
    mails: IntCounterVec,
    mail_queue: IntGauge,
    pub(crate) open_connections: IntGauge,
    waiting_requests: IntGauge,
}

/// The histogram buckets of durations, up to the longest graceful shutdown (10 s). Requests should
/// take less than 1 s.
const SECONDS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// The route label of an unmatched path.
pub(crate) const UNMATCHED_ROUTE: &str = "none";
const LOGIN_SUCCESS: &str = "success";
const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
const OTHER_METHOD: &str = "other";

impl Metrics {
    pub(crate) fn new() -> Arc<Self> {
        let registry = Registry::new();
        let histogram = |name, help| register(&registry, Histogram::with_opts(buckets(name, help)));
        let gauge = |name, help| register(&registry, IntGauge::with_opts(opts(name, help)));
        let counter = |name, help, labels: &[&str]| {
            register(&registry, IntCounterVec::new(opts(name, help), labels))
        };
        let build = opts("build_info", "Always 1; the labels say what is running")
            .const_label("version", env!("CARGO_PKG_VERSION"))
            .const_label("commit", env!("COMMIT"));
        register(&registry, IntGauge::with_opts(build)).set(1);
        #[cfg(target_os = "linux")]
        registry
            .register(Box::new(
                prometheus::process_collector::ProcessCollector::for_self(),
            ))
            .expect("unique metric names");
        let db_connections = opts("db_connections", "Connections to the database");
        let request_duration = buckets(
            "http_request_duration_seconds",
            "Seconds from a request's head to its response",
        );
        #[rustfmt::skip]
        let metrics = Self {
            start_time: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0.0, |since| since.as_secs_f64()),
            requests: counter("http_requests_total", "Requests that got a response", &["route", "method", "status"]),
            request_duration: register(&registry, HistogramVec::new(request_duration, &["route"])),
            db_acquire_duration: histogram("db_pool_acquire_duration_seconds", "Seconds spent waiting for a database connection, failures included"),
            db_query_duration: histogram("db_query_duration_seconds", "Seconds until a statement completed or was abandoned"),
            database_up: gauge("database_up", "1 if the database responded when it was last used, else 0"),
            db_pool_waiters: gauge("db_pool_waiters", "Statements waiting for a database connection"),
            db_connections: register(&registry, IntGaugeVec::new(db_connections, &["state"])),
            hash_queue: gauge("password_hash_queue_length", "Password hashes queued or being computed"),
            hash_duration: histogram("password_hash_duration_seconds", "Seconds that a password hash took, queueing included"),
            logins: counter("logins_total", "Login attempts, by result", &["result"]),
            tokens_rejected: counter("tokens_rejected_total", "Rejected tokens, by reason", &["reason"]),
            sessions_revoked: counter("sessions_revoked_total", "Revoked sessions, by reason", &["reason"]),
            mails: counter("mails_total", "Mails that were sent or given up, by result", &["result"]),
            mail_queue: gauge("mail_queue_length", "Mails being sent or waiting for their next attempt"),
            open_connections: gauge("http_open_connections", "Open client connections"),
            waiting_requests: gauge("http_waiting_requests", "Requests waiting for a list to change"),
            registry,
        };
        // Creates all series at zero. A series that first appears with an event has no rate, and is
        // missing from sums.
        for method in METHODS.into_iter().chain([OTHER_METHOD]) {
            metrics.declare_response(UNMATCHED_ROUTE, method, "404");
        }
        for (counters, labels) in [
            (&metrics.logins, &[LOGIN_SUCCESS][..]),
            (&metrics.logins, LoginFailure::LABELS),
            (&metrics.tokens_rejected, TokenRejection::LABELS),
            (&metrics.sessions_revoked, RevocationReason::LABELS),
            (&metrics.mails, MailOutcome::LABELS),
        ] {
            for label in labels {
                counters.with_label_values(&[*label]);
            }
        }
        Arc::new(metrics)
    }

    /// Creates the series of a response at zero.
    pub(crate) fn declare_response(&self, route: &str, method: &str, status: &str) {
        self.requests.with_label_values(&[route, method, status]);
        self.request_duration.with_label_values(&[route]);
    }

    /// Counts a request and its response. Methods that HTTP does not define share one label.
    pub(crate) fn record_request(
        &self,
        route: &str,
        method: &Method,
        status: &str,
        duration: Duration,
    ) {
        let known = METHODS.into_iter().find(|known| *known == method.as_str());
        let labels = [route, known.unwrap_or(OTHER_METHOD), status];
        self.requests.with_label_values(&labels).inc();
        let durations = self.request_duration.with_label_values(&[route]);
        durations.observe(duration.as_secs_f64());
    }

    pub(crate) fn record_login(&self) {
        self.logins.with_label_values(&[LOGIN_SUCCESS]).inc();
    }

    /// Counts a rejected token or a failed login.
    pub(crate) fn record_auth_failure(&self, failure: AuthFailure) {
        let counters = match failure {
            AuthFailure::Token(_) => &self.tokens_rejected,
            AuthFailure::Login(_) => &self.logins,
        };
        counters.with_label_values(&[failure.label()]).inc();
    }

    pub(crate) fn record_revoked(&self, reason: RevocationReason, sessions: usize) {
        let counter = self.sessions_revoked.with_label_values(&[reason.label()]);
        counter.inc_by(sessions as u64);
    }

    /// Counts a mail that was sent or given up.
    pub(crate) fn record_mail(&self, outcome: MailOutcome) {
        self.mails.with_label_values(&[outcome.label()]).inc();
    }

    /// Counts a mail as queued until the guard is dropped.
    pub(crate) fn mail_queued(&self) -> GaugeGuard {
        GaugeGuard::new(&self.mail_queue)
    }

    /// Counts a statement as waiting until the guard is dropped.
    pub(crate) fn db_pool_waiter(&self) -> GaugeGuard {
        GaugeGuard::new(&self.db_pool_waiters)
    }

    /// Counts a request as waiting for a change until the guard is dropped.
    pub(crate) fn waiting_request(&self) -> GaugeGuard {
        GaugeGuard::new(&self.waiting_requests)
    }

    /// Counts a password hash as queued until the guard is dropped.
    pub(crate) fn hash_queued(&self) -> GaugeGuard {
        GaugeGuard::new(&self.hash_queue)
    }

    /// Encodes all metrics as Prometheus text, with the current state of the database, the number of
    /// connections in the pool and the number of idle ones.
    pub(crate) fn encode(&self, is_up: bool, (connections, idle): (u32, u32)) -> Vec<u8> {
        self.database_up.set(is_up.into());
        for (state, count) in [("idle", idle), ("in_use", connections.saturating_sub(idle))] {
            let gauge = self.db_connections.with_label_values(&[state]);
            gauge.set(count.into());
        }
        let mut families = self.registry.gather();
        // The process collector computes the start time from the boot time, which systemd's
        // ProcSubset=pid hides.
        let mut start_time = prometheus::proto::Gauge::default();
        start_time.set_value(self.start_time);
        for family in &mut families {
            if family.name() == "process_start_time_seconds" {
                for metric in family.mut_metric() {
                    metric.set_gauge(start_time.clone());
                }
            }
        }
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&families, &mut text) {
            log::error!("cannot encode the metrics: {error}");
        }
        text
    }
}

/// Raises a gauge by one while it exists.
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

fn register<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: prometheus::Result<C>,
) -> C {
    let collector = collector.expect("a valid metric name");
    let registered = registry.register(Box::new(collector.clone()));
    registered.expect("a unique metric name");
    collector
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(format!("todo_api_{name}"), help)
}

fn buckets(name: &str, help: &str) -> HistogramOpts {
    HistogramOpts::from(opts(name, help)).buckets(SECONDS.to_vec())
}
