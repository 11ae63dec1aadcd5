//! A running instance of the service.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::Path,
    process::ExitStatus,
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::Method;
use rustix::process::Signal;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{OnceCell, Semaphore},
    time::{sleep, timeout},
};
use tokio_postgres::Client;

use super::{
    Database, PASSWORD, POLL_INTERVAL, Process, Request, SECRET, User, WAIT_TIMEOUT,
    database::{Lock, connect},
    request::request_methods,
    scratch::socket_url,
    unique,
};

request_methods!(Server);

/// A running server and its own database. Both are removed when this is dropped.
pub(crate) struct Server {
    // Dropped before the database: fields are dropped in the order of declaration.
    process: Process,
    addr: SocketAddr,
    database: Option<Arc<Database>>,
    variables: HashMap<String, String>,
}

impl Server {
    pub(crate) async fn start() -> Server {
        Server::with(&[]).await
    }

    /// Returns a server with the default settings that tests share. For tests that use only their own
    /// users and do not inspect the log, the metrics or the database.
    pub(crate) async fn shared() -> &'static Server {
        static SHARED: OnceCell<Server> = OnceCell::const_new();
        // Requests of many tests must not compete for the connections.
        SHARED
            .get_or_init(|| Server::with(&[("DB_POOL_SIZE", "20")]))
            .await
    }

    /// Starts a server with these variables, which extend or override the defaults. Creates no
    /// database if they name one; with `DATA_DIR` the server starts an embedded PostgreSQL.
    pub(crate) async fn with(variables: &[(&str, &str)]) -> Server {
        let server = Server::listening(variables).await;
        server.wait_until_ready().await;
        server
    }

    /// Starts a server and waits until it listens; it may not be ready yet.
    pub(crate) async fn listening(variables: &[(&str, &str)]) -> Server {
        let names_database = |(name, _): &(&str, &str)| {
            ["DATABASE_URL", "DATABASE_URL_FILE", "DATA_DIR"].contains(name)
        };
        let database = if variables.iter().any(names_database) {
            None
        } else {
            Some(Arc::new(Database::create_migrated().await))
        };
        let mut all = HashMap::from(
            [
                ("LISTEN_ADDR", "127.0.0.1:0"),
                ("BCRYPT_COST", "10"),
                ("AUTH_RATE_PER_MINUTE", "0"),
                ("WRITES_PER_MINUTE", "0"),
                ("DB_POOL_SIZE", "5"),
                // Includes the lines that exceed the limit of lines per second.
                ("RUST_LOG", "info,todo_api::telemetry::log_limiter=debug"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
        if let Some(database) = &database {
            all.insert("DATABASE_URL".into(), database.url());
        }
        // With an embedded PostgreSQL, the server also creates its own secret.
        if !variables.iter().any(|(name, _)| *name == "DATA_DIR") {
            all.insert("JWT_SECRET".into(), SECRET.into());
        }
        Server::launch(database, all, variables).await
    }

    async fn launch(
        database: Option<Arc<Database>>,
        mut all: HashMap<String, String>,
        variables: &[(&str, &str)],
    ) -> Server {
        all.extend(
            variables
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        );
        let list: Vec<(&str, &str)> = all
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        let process = Process::spawn(&[], &list);
        let addr = process.listening().await;
        Server {
            process,
            addr,
            database,
            variables: all,
        }
    }

    async fn wait_until_ready(&self) {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        while self.get("/readyz").await.status != 200 {
            assert!(Instant::now() < deadline, "not ready:\n{}", self.log());
            sleep(POLL_INTERVAL).await;
        }
    }

    /// Starts a second instance on the same database, with these variables changed.
    pub(crate) async fn sibling(&self, variables: &[(&str, &str)]) -> Server {
        let server = Server::launch(self.database.clone(), self.variables.clone(), variables).await;
        server.wait_until_ready().await;
        server
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub(crate) fn secret(&self) -> &str {
        self.variables
            .get("JWT_SECRET")
            .map_or(SECRET, String::as_str)
    }

    pub(crate) fn database_url(&self) -> String {
        self.variables
            .get("DATABASE_URL")
            .cloned()
            .unwrap_or_else(|| socket_url(&Path::new(&self.variables["DATA_DIR"]).join("socket")))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid().as_raw_nonzero().get() as u32
    }

    /// Connects to this server's database.
    pub(crate) async fn sql(&self) -> Client {
        connect(&self.database_url()).await
    }

    /// Executes a statement that acquires a lock in this server's database.
    pub(crate) async fn lock(&self, statement: &str) -> Lock {
        Lock::acquire(&self.database_url(), statement).await
    }

    /// Returns what the server has written to stderr.
    pub(crate) fn log(&self) -> String {
        self.process.log()
    }

    pub(crate) async fn wait_for_log(&self, text: &str) {
        self.process.wait_for_log(text).await;
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits until the server exits.
    pub(crate) async fn ended(&self) -> ExitStatus {
        self.process.ended().await
    }

    /// Stops the server gracefully, with SIGTERM.
    pub(crate) async fn stop(&self) -> ExitStatus {
        self.process.stop().await
    }

    /// Kills the server with SIGKILL.
    pub(crate) fn kill(&self) {
        self.process.kill();
    }

    /// Registers this e-mail address with the password [`PASSWORD`].
    pub(crate) async fn register(&self, email: &str) -> User {
        // The queue of a server with one hashing thread has room for 16 passwords, and tests share
        // a server.
        static REGISTRATIONS: Semaphore = Semaphore::const_new(8);
        let _permit = REGISTRATIONS.acquire().await.unwrap();
        let response = self
            .post("/api/v1/auth/register")
            .json(json!({"email": email, "password": PASSWORD}))
            .await
            .expect(201);
        User::from_tokens(self.addr, &response.json(), PASSWORD)
    }

    /// Creates a user. Inserts it into the database, because hashing a password is slow, unless the
    /// server's settings affect users.
    pub(crate) async fn user(&self) -> User {
        const HARMLESS: [&str; 9] = [
            "LISTEN_ADDR",
            "METRICS_ADDR",
            "WRITES_PER_MINUTE",
            "DB_POOL_SIZE",
            "RUST_LOG",
            "DATABASE_URL",
            "TRUSTED_PROXIES",
            "MAX_TASKS_PER_USER",
            "WAIT_MAX",
        ];
        let is_harmless = |(name, value): (&String, &String)| match name.as_str() {
            "AUTH_RATE_PER_MINUTE" => value == "0",
            "BCRYPT_COST" => value == "10",
            "JWT_SECRET" => value == SECRET,
            name => HARMLESS.contains(&name),
        };
        if self.database.is_some() && self.variables.iter().all(is_harmless) {
            return self.users(1).await.remove(0);
        }
        self.register(&format!("user{}@example.com", unique()))
            .await
    }

    /// Inserts this many users into the database.
    pub(crate) async fn users(&self, count: usize) -> Vec<User> {
        match &self.database {
            Some(database) => User::insert(self, &*database.shared_sql().await, count).await,
            None => User::insert(self, &self.sql().await, count).await,
        }
    }

    /// Logs in, which starts another session.
    pub(crate) async fn login(&self, email: &str, password: &str) -> User {
        let response = self
            .post("/api/v1/auth/login")
            .json(json!({"email": email, "password": password}))
            .await
            .expect(200);
        User::from_tokens(self.addr, &response.json(), password)
    }

    pub(crate) fn request(&self, method: Method, path: impl Into<String>) -> Request {
        Request::new(self.addr, method, path)
    }

    /// Writes these bytes to a new connection and returns the bytes that are received until it
    /// closes, for at most 5 seconds.
    pub(crate) async fn raw(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut stream = TcpStream::connect(self.addr).await.unwrap();
        let mut response = Vec::new();
        let exchange = async {
            // The server may have responded and closed the connection already.
            let _ = stream.write_all(bytes.as_ref()).await;
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                response.extend_from_slice(&buffer[..length]);
            }
        };
        let _ = timeout(Duration::from_secs(5), exchange).await;
        String::from_utf8_lossy(&response).into_owned()
    }
}
