//! Clients that never stop asking, and a ledger of what they were told.
//!
//! A client keeps its connection as browsers and pools do. When a task could not be made it tries
//! again under the same `Idempotency-Key`, as the contract tells it to.

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

/// Longer than any bound of the service: who waits this long was forgotten.
const FORGOTTEN: Duration = Duration::from_secs(20);
/// Between two requests of a client: load, but not all that the machine can give.
const BREATH: Duration = Duration::from_millis(4);
/// Before a client tries again.
const PAUSE: Duration = Duration::from_millis(25);

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Outcome {
    /// It was answered with this status.
    Status(u16),
    /// No connection was to be had, or the one there was had been closed before anything was sent.
    Refused,
    /// It was sent, and the connection ended without an answer.
    Lost,
    /// It was sent, and nothing happened any more.
    Forgotten,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Status(status) => write!(f, "{status}"),
            fate => write!(f, "{fate:?}"),
        }
    }
}

/// What a client does all the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Reads one task.
    Read,
    /// Makes tasks.
    Write,
}

/// One request and what became of it.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) asked: Instant,
    pub(super) took: Duration,
    pub(super) fate: Outcome,
    pub(super) work: Work,
    /// The problem's code, where the answer is one.
    pub(super) code: String,
    pub(super) retry_after: bool,
}

impl Answer {
    pub(super) fn is_good(&self) -> bool {
        matches!(self.fate, Outcome::Status(200..=299))
    }

    /// A refusal as the contract has it: nothing was changed, and when to come again.
    pub(super) fn is_refusal(&self, code: &str) -> bool {
        self.fate == Outcome::Status(503) && self.retry_after && self.code == code
    }

    fn ended(&self) -> Instant {
        self.asked + self.took
    }
}

/// An answer on the wire.
pub(super) struct WireResponse {
    pub(super) fate: Outcome,
    pub(super) retry_after: bool,
    pub(super) body: Bytes,
}

impl WireResponse {
    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

/// Where the service is; it may move.
#[derive(Clone)]
pub(super) struct Addresses(Arc<Mutex<Vec<SocketAddr>>>);

impl Addresses {
    pub(super) fn of(addresses: &[SocketAddr]) -> Addresses {
        Addresses(Arc::new(Mutex::new(addresses.to_vec())))
    }

    pub(super) fn set(&self, addresses: &[SocketAddr]) {
        *self.0.lock().unwrap() = addresses.to_vec();
    }

    fn at(&self, turn: usize) -> Option<SocketAddr> {
        let addresses = self.0.lock().unwrap();
        (!addresses.is_empty()).then(|| addresses[turn % addresses.len()])
    }
}

/// A client with one connection at a time.
pub(super) struct Client {
    addresses: Addresses,
    turn: usize,
    connection: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    pub(super) fn new(addresses: Addresses, turn: usize) -> Client {
        Client {
            addresses,
            turn,
            connection: None,
        }
    }

    pub(super) fn at(address: SocketAddr) -> Client {
        Client::new(Addresses::of(&[address]), 0)
    }

    async fn connected(&mut self) -> Option<SendRequest<Full<Bytes>>> {
        if let Some(mut connection) = self.connection.take()
            && connection.ready().await.is_ok()
        {
            return Some(connection);
        }
        let address = self.addresses.at(self.turn)?;
        let stream = TcpStream::connect(address).await.ok()?;
        stream.set_nodelay(true).ok()?;
        let (connection, driver) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .ok()?;
        tokio::spawn(driver);
        Some(connection)
    }

    /// Connects, if it is not connected.
    pub(super) async fn connect(&mut self) -> bool {
        self.connection = self.connected().await;
        self.connection.is_some()
    }

    pub(super) async fn ask(&mut self, request: Request<Full<Bytes>>) -> WireResponse {
        let heard = timeout(FORGOTTEN, self.exchange(request)).await;
        let (fate, retry_after, body) = match heard {
            Ok(Ok((status, retry_after, body))) => (Outcome::Status(status), retry_after, body),
            Ok(Err(fate)) => (fate, false, Bytes::new()),
            Err(_) => (Outcome::Forgotten, false, Bytes::new()),
        };
        if !matches!(fate, Outcome::Status(_)) {
            // As a balancer does: the next instance, if there is another.
            self.turn += 1;
        }
        WireResponse {
            fate,
            retry_after,
            body,
        }
    }

    async fn exchange(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<(u16, bool, Bytes), Outcome> {
        let mut request = Some(request);
        let (connection, answer) = loop {
            let mut connection = self.connected().await.ok_or(Outcome::Refused)?;
            let Some(next) = request.take() else {
                return Err(Outcome::Lost);
            };
            match connection.try_send_request(next).await {
                Ok(answer) => break (connection, answer),
                // Closed between two requests: nothing was sent, as any client knows.
                Err(mut error) => request = error.take_message(),
            }
        };
        let status = answer.status().as_u16();
        let retry_after = answer.headers().contains_key(header::RETRY_AFTER);
        let body = answer.into_body().collect().await;
        let body = body.map_err(|_| Outcome::Lost)?.to_bytes();
        self.connection = Some(connection);
        Ok((status, retry_after, body))
    }
}

/// Who asks, and for what.
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
    /// Out of the answer to a registration.
    pub(super) fn from_tokens(tokens: &Value) -> Credentials {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        Credentials {
            id: text(&tokens["user"]["id"]),
            token: text(&tokens["access_token"]),
        }
    }

    fn request(&self, method: Method, rest: &str) -> hyper::http::request::Builder {
        Request::builder()
            .method(method)
            .uri(format!("/api/v1/{}/tasks{rest}", self.id))
            .header(header::HOST, "todo.example")
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token))
    }

    /// A read of this task, or with a query of the list.
    pub(super) fn read(&self, rest: &str) -> Request<Full<Bytes>> {
        let request = self.request(Method::GET, rest);
        request.body(Full::default()).unwrap()
    }

    pub(super) fn create(&self, title: &str, key: &str) -> Request<Full<Bytes>> {
        let request = self
            .request(Method::POST, "")
            .header("idempotency-key", key)
            .header(header::CONTENT_TYPE, "application/json");
        let body = json!({ "title": title }).to_string();
        request.body(Full::from(body)).unwrap()
    }
}

/// Everything that the clients of a load were told.
#[derive(Default)]
pub(super) struct RequestLog {
    answers: Mutex<Vec<Answer>>,
    /// Task id by title.
    acknowledged: Mutex<HashMap<String, String>>,
    repeated: AtomicU64,
}

impl RequestLog {
    pub(super) fn note(&self, work: Work, asked: Instant, heard: &WireResponse) -> bool {
        let code = match heard.fate {
            Outcome::Status(400..) => heard.json()["code"].as_str().unwrap_or("none").to_owned(),
            _ => String::new(),
        };
        let answer = Answer {
            asked,
            took: asked.elapsed(),
            fate: heard.fate,
            work,
            code,
            retry_after: heard.retry_after,
        };
        let good = answer.is_good();
        self.answers.lock().unwrap().push(answer);
        good
    }

    pub(super) fn acknowledge(&self, title: String, heard: &WireResponse) {
        let id = heard.json()["id"].as_str().unwrap().to_owned();
        self.acknowledged.lock().unwrap().insert(title, id);
    }

    /// The answers to what was asked in this time and has been answered since.
    pub(super) fn asked(&self, from: Instant, to: Instant) -> Vec<Answer> {
        let answers = self.answers.lock().unwrap();
        let within = |answer: &&Answer| answer.asked >= from && answer.asked < to;
        answers.iter().filter(within).cloned().collect()
    }

    pub(super) fn all(&self) -> Vec<Answer> {
        self.answers.lock().unwrap().clone()
    }

    pub(super) fn acknowledged(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }

    /// How many answers since then were good.
    pub(super) fn good_since(&self, from: Instant, work: Work) -> usize {
        let answers = self.answers.lock().unwrap();
        let good =
            |answer: &&Answer| answer.asked >= from && answer.is_good() && answer.work == work;
        answers.iter().filter(good).count()
    }

    /// Whether the last so many answers were all good.
    pub(super) fn is_well(&self, last: usize, since: Instant) -> bool {
        let mut answers = self.asked(since, Instant::now());
        answers.sort_by_key(Answer::ended);
        answers.len() >= last && answers.iter().rev().take(last).all(Answer::is_good)
    }

    /// Every acknowledged task is there, under its title and once, and no retry has made a second.
    /// Gives how many were compared.
    pub(super) async fn assert_kept(&self, sql: &tokio_postgres::Client) -> usize {
        let rows = sql
            .query("select id::text, title from tasks", &[])
            .await
            .unwrap();
        let mut titles: HashMap<String, Vec<String>> = HashMap::new();
        for row in &rows {
            titles.entry(row.get(1)).or_default().push(row.get(0));
        }
        let doubled: Vec<_> = titles.iter().filter(|(_, ids)| ids.len() > 1).collect();
        assert!(doubled.is_empty(), "made twice: {doubled:?}");
        let acknowledged = self.acknowledged.lock().unwrap();
        let lost: Vec<_> = acknowledged
            .iter()
            .filter(|(title, id)| titles.get(*title).is_none_or(|ids| ids[0] != **id))
            .collect();
        assert!(
            lost.is_empty(),
            "{} of {} acknowledged tasks are lost: {lost:?}",
            lost.len(),
            acknowledged.len()
        );
        acknowledged.len()
    }

    /// No request was left without an answer, and none waited longer than the bound.
    pub(super) fn assert_all_answered_within(&self, bound: Duration) {
        let bad: Vec<_> = self
            .all()
            .into_iter()
            .filter(|answer| !matches!(answer.fate, Outcome::Status(_)) || answer.took > bound)
            .collect();
        assert!(
            bad.is_empty(),
            "{} without an answer within {bound:?}, such as {:?}",
            bad.len(),
            &bad[..bad.len().min(3)]
        );
    }

    /// What was counted, in a line.
    pub(super) fn summary(&self) -> String {
        format!(
            "{}; {} tasks acknowledged, {} requests repeated",
            summary(&self.all()),
            self.acknowledged(),
            self.repeated.load(Ordering::Relaxed)
        )
    }
}

/// What became of requests, and how long the slowest and the 95th of a hundred took.
pub(super) fn summary(answers: &[Answer]) -> String {
    let mut fates: BTreeMap<(Outcome, &str), usize> = BTreeMap::new();
    for answer in answers {
        *fates.entry((answer.fate, &answer.code)).or_default() += 1;
    }
    let fates: Vec<String> = fates
        .iter()
        .map(|((fate, code), count)| format!("{count} × {fate} {code}").trim_end().to_owned())
        .collect();
    format!(
        "{} requests ({}), p95 {:.0?}, slowest {:.0?}",
        answers.len(),
        fates.join(", "),
        percentile(answers, 95),
        percentile(answers, 100)
    )
}

pub(super) fn percentile(answers: &[Answer], percent: usize) -> Duration {
    let mut times: Vec<Duration> = answers.iter().map(|answer| answer.took).collect();
    times.sort();
    let index = (times.len() * percent).div_ceil(100);
    times
        .get(index.saturating_sub(1))
        .copied()
        .unwrap_or_default()
}

/// Clients at work; they end when it is dropped.
pub(super) struct Load {
    pub(super) ledger: Arc<RequestLog>,
    addresses: Addresses,
    stop: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

impl Load {
    pub(super) fn on(addresses: &Addresses) -> Load {
        Load {
            ledger: Arc::default(),
            addresses: addresses.clone(),
            stop: Arc::default(),
            clients: JoinSet::new(),
        }
    }

    /// So many clients that read this task all the time.
    pub(super) fn reading(mut self, clients: usize, asker: &Credentials, task: &str) -> Load {
        for _ in 0..clients {
            let mut client = Client::new(self.addresses.clone(), self.clients.len());
            let (ledger, stop) = (self.ledger.clone(), self.stop.clone());
            let (asker, rest) = (asker.clone(), format!("/{task}"));
            self.clients.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let asked = Instant::now();
                    let heard = client.ask(asker.read(&rest)).await;
                    let good = ledger.note(Work::Read, asked, &heard);
                    sleep(if good { BREATH } else { PAUSE }).await;
                }
            });
        }
        self
    }

    /// So many clients that make tasks, each until it is acknowledged.
    pub(super) fn writing(mut self, clients: usize, asker: &Credentials) -> Load {
        for _ in 0..clients {
            let number = self.clients.len();
            let mut client = Client::new(self.addresses.clone(), number);
            let (ledger, stop) = (self.ledger.clone(), self.stop.clone());
            let asker = asker.clone();
            self.clients.spawn(async move {
                for task in 0.. {
                    let title = format!("task {task} of client {number}");
                    let key = title.replace(' ', "-");
                    loop {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        let asked = Instant::now();
                        let heard = client.ask(asker.create(&title, &key)).await;
                        if ledger.note(Work::Write, asked, &heard) {
                            ledger.acknowledge(title, &heard);
                            break;
                        }
                        ledger.repeated.fetch_add(1, Ordering::Relaxed);
                        sleep(PAUSE).await;
                    }
                    sleep(BREATH).await;
                }
            });
        }
        self
    }

    /// Waits for the answers under way and ends.
    pub(super) async fn end(mut self) -> Arc<RequestLog> {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(client) = self.clients.join_next().await {
            client.unwrap();
        }
        self.ledger.clone()
    }
}
