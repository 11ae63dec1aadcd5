//! Clients that send requests continuously, and a log of the outcomes.
//!
//! A client keeps its connection alive, as browsers and connection pools do. It retries a failed
//! creation with the same `Idempotency-Key`, as the API tells clients to.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, client::conn::http1::SendRequest, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::harness::User;

/// Longer than any timeout of the service.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(20);
/// The pause between a client's requests, so that the load does not saturate the machine.
const THINK_TIME: Duration = Duration::from_millis(15);
/// The pause before a client retries.
const RETRY_BACKOFF: Duration = Duration::from_millis(40);

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Outcome {
    /// A response with this status.
    Status(u16),
    /// Nothing was sent, because no connection could be opened.
    NotConnected,
    /// The connection ended after the request was sent and before the response was complete.
    ConnectionLost,
    /// No response within [`CLIENT_TIMEOUT`].
    TimedOut,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Status(status) => write!(f, "{status}"),
            outcome => write!(f, "{outcome:?}"),
        }
    }
}

/// The kind of request that a client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Reads one task.
    Read,
    /// Creates a task.
    Write,
}

/// A finished request.
#[derive(Clone, Debug)]
pub(super) struct RequestRecord {
    pub(super) sent_at: Instant,
    pub(super) duration: Duration,
    pub(super) outcome: Outcome,
    pub(super) work: Work,
    /// The problem code of an error response, otherwise empty.
    pub(super) code: String,
    pub(super) has_retry_after: bool,
}

impl RequestRecord {
    pub(super) fn is_success(&self) -> bool {
        matches!(self.outcome, Outcome::Status(200..=299))
    }

    /// Whether the response was a 503 with this problem code and `Retry-After`.
    pub(super) fn is_retryable_503(&self, code: &str) -> bool {
        self.outcome == Outcome::Status(503) && self.has_retry_after && self.code == code
    }

    fn finished_at(&self) -> Instant {
        self.sent_at + self.duration
    }
}

/// An outcome, with the parts of the response that the tests check.
pub(super) struct WireResponse {
    pub(super) outcome: Outcome,
    pub(super) has_retry_after: bool,
    pub(super) body: Bytes,
}

impl WireResponse {
    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

/// The addresses of the service's instances, shared by all clients. They change at a restart.
#[derive(Clone)]
pub(super) struct Addresses(Arc<Mutex<Vec<SocketAddr>>>);

impl Addresses {
    pub(super) fn new(addresses: &[SocketAddr]) -> Addresses {
        Addresses(Arc::new(Mutex::new(addresses.to_vec())))
    }

    pub(super) fn set(&self, addresses: &[SocketAddr]) {
        *self.0.lock().unwrap() = addresses.to_vec();
    }

    /// Returns the address at this index, modulo the number of addresses.
    fn get(&self, index: usize) -> Option<SocketAddr> {
        let addresses = self.0.lock().unwrap();
        (!addresses.is_empty()).then(|| addresses[index % addresses.len()])
    }
}

/// A client with at most one connection.
pub(super) struct Client {
    addresses: Addresses,
    address_index: usize,
    connection: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    pub(super) fn new(addresses: Addresses, address_index: usize) -> Client {
        Client {
            addresses,
            address_index,
            connection: None,
        }
    }

    pub(super) fn at(address: SocketAddr) -> Client {
        Client::new(Addresses::new(&[address]), 0)
    }

    /// Takes the open connection, or opens one.
    async fn take_connection(&mut self) -> Option<SendRequest<Full<Bytes>>> {
        if let Some(mut connection) = self.connection.take()
            && connection.ready().await.is_ok()
        {
            return Some(connection);
        }
        let address = self.addresses.get(self.address_index)?;
        let stream = TcpStream::connect(address).await.ok()?;
        stream.set_nodelay(true).ok()?;
        let (connection, io_task) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .ok()?;
        tokio::spawn(io_task);
        Some(connection)
    }

    /// Connects unless there is a connection; returns whether there is one now.
    pub(super) async fn connect(&mut self) -> bool {
        self.connection = self.take_connection().await;
        self.connection.is_some()
    }

    pub(super) async fn send(&mut self, request: Request<Full<Bytes>>) -> WireResponse {
        let response = match timeout(CLIENT_TIMEOUT, self.exchange(request)).await {
            Ok(response) => response,
            Err(_) => Err(Outcome::TimedOut),
        };
        response.unwrap_or_else(|outcome| {
            // Fail over to the next instance, as a load balancer does.
            self.address_index += 1;
            WireResponse {
                outcome,
                has_retry_after: false,
                body: Bytes::new(),
            }
        })
    }

    async fn exchange(&mut self, request: Request<Full<Bytes>>) -> Result<WireResponse, Outcome> {
        let mut unsent = Some(request);
        let (connection, response) = loop {
            let mut connection = self.take_connection().await.ok_or(Outcome::NotConnected)?;
            let Some(request) = unsent.take() else {
                return Err(Outcome::ConnectionLost);
            };
            match connection.try_send_request(request).await {
                Ok(response) => break (connection, response),
                // hyper returns the request if the idle connection closed before it was sent.
                Err(mut error) => unsent = error.take_message(),
            }
        };
        let outcome = Outcome::Status(response.status().as_u16());
        let has_retry_after = response.headers().contains_key(header::RETRY_AFTER);
        let body = response.into_body().collect().await;
        let body = body.map_err(|_| Outcome::ConnectionLost)?.to_bytes();
        self.connection = Some(connection);
        Ok(WireResponse {
            outcome,
            has_retry_after,
            body,
        })
    }

    /// Creates a task and records the outcome; returns whether it was created.
    pub(super) async fn create(
        &mut self,
        credentials: &Credentials,
        title: &str,
        requests: &RequestLog,
    ) -> bool {
        let sent_at = Instant::now();
        let response = self.send(credentials.create(title)).await;
        let created = requests.record(Work::Write, sent_at, &response);
        if created {
            requests.record_created(title, &response);
        }
        created
    }

    /// Reads a task and records the outcome; returns whether it succeeded.
    pub(super) async fn read(
        &mut self,
        credentials: &Credentials,
        task: &str,
        requests: &RequestLog,
    ) -> bool {
        let sent_at = Instant::now();
        let response = self.send(credentials.read(task)).await;
        requests.record(Work::Read, sent_at, &response)
    }
}

/// A user's id and access token.
#[derive(Clone)]
pub(super) struct Credentials {
    pub(super) id: String,
    token: String,
}

impl From<&User> for Credentials {
    fn from(user: &User) -> Credentials {
        Credentials {
            id: user.id.clone(),
            token: user.access_token.clone(),
        }
    }
}

impl Credentials {
    /// Reads the credentials from the response to a registration.
    pub(super) fn from_tokens(tokens: &Value) -> Credentials {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        Credentials {
            id: text(&tokens["user"]["id"]),
            token: text(&tokens["access_token"]),
        }
    }

    fn request(&self, method: Method, path: &str) -> hyper::http::request::Builder {
        Request::builder()
            .method(method)
            .uri(format!("/api/v1/{}/tasks{path}", self.id))
            .header(header::HOST, "todo.example")
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token))
    }

    pub(super) fn read(&self, task: &str) -> Request<Full<Bytes>> {
        let request = self.request(Method::GET, &format!("/{task}"));
        request.body(Full::default()).unwrap()
    }

    /// Builds a request that creates a task, with an idempotency key derived from the title.
    pub(super) fn create(&self, title: &str) -> Request<Full<Bytes>> {
        let request = self
            .request(Method::POST, "")
            .header("idempotency-key", title.replace(' ', "-"))
            .header(header::CONTENT_TYPE, "application/json");
        let body = json!({ "title": title }).to_string();
        request.body(Full::from(body)).unwrap()
    }
}

/// The outcomes of all requests of a load.
#[derive(Default)]
pub(super) struct RequestLog {
    records: Mutex<Vec<RequestRecord>>,
    /// The ids of the tasks that the service reported as created, by title.
    created: Mutex<HashMap<String, String>>,
    retries: AtomicU64,
}

impl RequestLog {
    /// Records an outcome; returns whether it is a success.
    fn record(&self, work: Work, sent_at: Instant, response: &WireResponse) -> bool {
        let code = match response.outcome {
            Outcome::Status(400..) => response.json()["code"]
                .as_str()
                .unwrap_or("none")
                .to_owned(),
            _ => String::new(),
        };
        let record = RequestRecord {
            sent_at,
            duration: sent_at.elapsed(),
            outcome: response.outcome,
            work,
            code,
            has_retry_after: response.has_retry_after,
        };
        let success = record.is_success();
        self.records.lock().unwrap().push(record);
        success
    }

    fn record_created(&self, title: &str, response: &WireResponse) {
        let id = response.json()["id"].as_str().unwrap().to_owned();
        self.created.lock().unwrap().insert(title.to_owned(), id);
    }

    /// The finished requests that were sent in this period.
    pub(super) fn sent_between(&self, from: Instant, to: Instant) -> Vec<RequestRecord> {
        let records = self.records.lock().unwrap();
        let in_period = |record: &&RequestRecord| record.sent_at >= from && record.sent_at < to;
        records.iter().filter(in_period).cloned().collect()
    }

    pub(super) fn all(&self) -> Vec<RequestRecord> {
        self.records.lock().unwrap().clone()
    }

    /// Returns the number of requests of this kind that were sent since `from` and succeeded.
    pub(super) fn successes_since(&self, from: Instant, work: Work) -> usize {
        let records = self.records.lock().unwrap();
        let is_counted = |record: &&RequestRecord| {
            record.sent_at >= from && record.is_success() && record.work == work
        };
        records.iter().filter(is_counted).count()
    }

    /// Returns whether the last `count` requests sent since `since` all succeeded.
    pub(super) fn has_recovered(&self, count: usize, since: Instant) -> bool {
        let mut records = self.sent_between(since, Instant::now());
        records.sort_by_key(RequestRecord::finished_at);
        let mut last = records.iter().rev().take(count);
        records.len() >= count && last.all(RequestRecord::is_success)
    }

    /// Asserts that every acknowledged task is stored exactly once under its title and id.
    /// Returns how many there are.
    pub(super) async fn assert_durable(&self, sql: &tokio_postgres::Client) -> usize {
        let rows = sql
            .query("select id::text, title from tasks", &[])
            .await
            .unwrap();
        let mut stored: HashMap<String, Vec<String>> = HashMap::new();
        for row in &rows {
            stored.entry(row.get(1)).or_default().push(row.get(0));
        }
        let duplicates: Vec<_> = stored.iter().filter(|(_, ids)| ids.len() > 1).collect();
        assert!(duplicates.is_empty(), "created twice: {duplicates:?}");
        let created = self.created.lock().unwrap();
        let lost: Vec<_> = created
            .iter()
            .filter(|(title, id)| stored.get(*title).is_none_or(|ids| ids[0] != **id))
            .collect();
        assert!(
            lost.is_empty(),
            "{} of {} acknowledged tasks are lost: {lost:?}",
            lost.len(),
            created.len()
        );
        created.len()
    }

    /// Asserts that every request got a response within the limit.
    pub(super) fn assert_all_responded_within(&self, limit: Duration) {
        let late: Vec<_> = self
            .all()
            .into_iter()
            .filter(|record| {
                !matches!(record.outcome, Outcome::Status(_)) || record.duration > limit
            })
            .collect();
        assert!(
            late.is_empty(),
            "{} without a response within {limit:?}, such as {:?}",
            late.len(),
            &late[..late.len().min(3)]
        );
    }

    /// Formats the counts as one line.
    pub(super) fn summary(&self) -> String {
        format!(
            "{}; {} tasks acknowledged, {} retries",
            summary(&self.all()),
            self.created.lock().unwrap().len(),
            self.retries.load(Ordering::Relaxed)
        )
    }
}

/// Formats the outcomes, the 95th percentile and the maximum of the response times.
pub(super) fn summary(records: &[RequestRecord]) -> String {
    let mut outcomes: BTreeMap<(Outcome, &str), usize> = BTreeMap::new();
    for record in records {
        *outcomes.entry((record.outcome, &record.code)).or_default() += 1;
    }
    let outcomes: Vec<String> = outcomes
        .iter()
        .map(|((outcome, code), count)| format!("{count} × {outcome} {code}").trim_end().to_owned())
        .collect();
    format!(
        "{} requests ({}), p95 {:.0?}, slowest {:.0?}",
        records.len(),
        outcomes.join(", "),
        percentile(records, 95),
        percentile(records, 100)
    )
}

pub(super) fn percentile(records: &[RequestRecord], percent: usize) -> Duration {
    let mut times: Vec<Duration> = records.iter().map(|record| record.duration).collect();
    times.sort();
    let index = (times.len() * percent).div_ceil(100);
    times
        .get(index.saturating_sub(1))
        .copied()
        .unwrap_or_default()
}

/// A set of running clients. Dropping it stops them.
pub(super) struct Load {
    pub(super) requests: Arc<RequestLog>,
    addresses: Addresses,
    stop: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

impl Load {
    pub(super) fn new(addresses: &Addresses) -> Load {
        Load {
            requests: Arc::default(),
            addresses: addresses.clone(),
            stop: Arc::default(),
            clients: JoinSet::new(),
        }
    }

    /// Adds clients that read this task continuously.
    pub(super) fn reading(mut self, clients: usize, credentials: &Credentials, task: &str) -> Load {
        for _ in 0..clients {
            let mut client = Client::new(self.addresses.clone(), self.clients.len());
            let (requests, stop) = (self.requests.clone(), self.stop.clone());
            let (credentials, task) = (credentials.clone(), task.to_owned());
            self.clients.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let success = client.read(&credentials, &task, &requests).await;
                    sleep(if success { THINK_TIME } else { RETRY_BACKOFF }).await;
                }
            });
        }
        self
    }

    /// Adds clients that create one task after another, and retry each until it succeeds.
    pub(super) fn writing(mut self, clients: usize, credentials: &Credentials) -> Load {
        for _ in 0..clients {
            let client_number = self.clients.len();
            let mut client = Client::new(self.addresses.clone(), client_number);
            let (requests, stop) = (self.requests.clone(), self.stop.clone());
            let credentials = credentials.clone();
            self.clients.spawn(async move {
                for task_number in 0.. {
                    let title = format!("task {task_number} of client {client_number}");
                    loop {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        if client.create(&credentials, &title, &requests).await {
                            break;
                        }
                        requests.retries.fetch_add(1, Ordering::Relaxed);
                        sleep(RETRY_BACKOFF).await;
                    }
                    sleep(THINK_TIME).await;
                }
            });
        }
        self
    }

    /// Stops the clients once their outstanding requests have finished.
    pub(super) async fn finish(mut self) -> Arc<RequestLog> {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(client) = self.clients.join_next().await {
            client.unwrap();
        }
        self.requests.clone()
    }
}
