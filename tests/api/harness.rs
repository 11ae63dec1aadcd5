//! What every test stands on: a server of its own, a client that drives its socket, and nothing left behind.
//!
//! Servers are child processes of the real binary on ports that the system chooses. All that
//! tests put on the disk lies in one directory. A watcher, a shell that reads a pipe from this
//! process, kills and removes what is left when the process ends, however it ends.

use std::{
    collections::HashMap,
    env,
    fs::{self, File, Permissions},
    io::{BufRead, BufReader, Read, Write, pipe},
    net::SocketAddr,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{MetadataExt, PermissionsExt},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{HeaderMap, Method, header};
use hyper_util::rt::TokioIo;
use jsonwebtoken::{Algorithm, EncodingKey, crypto, dangerous};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use todo_api::embedded_postgres::Postgres;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};
use tokio_postgres::{Client, NoTls};

/// What a server signs tokens with, unless a test says otherwise.
pub(crate) const SECRET: &str = "a secret of the tests, and 32 bytes or more of it";
/// The password of every user that the harness registers.
pub(crate) const PASSWORD: &str = "mossy-Lantern-42-harbour";

const PATIENCE: Duration = Duration::from_secs(30);
const LOG_PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);

/// A number that no other call gets.
fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Polls until the condition holds; panics with the promise when it has not after 30 seconds.
pub(crate) async fn until(promise: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(
            Instant::now() < deadline,
            "not within {PATIENCE:?}: {promise}"
        );
        sleep(POLL).await;
    }
}

// ---------------------------------------------------------------- what is left behind: nothing

/// Where all files of this run lie, watched over.
struct Scratch {
    root: PathBuf,
    /// Its closing, when this process ends, is what the watcher waits for.
    watcher: Mutex<ChildStdin>,
}

/// Reads the ids of started servers until this process has ended, then ends them and every
/// PostgreSQL below the directory, and removes the directory.
const WATCHER: &str = r#"
root=$1
servers=
while read -r pid; do servers="$servers $pid"; done
is() { # process, name: the number may have gone to some other program
    case "$(cat "/proc/$1/comm" 2>/dev/null || ps -o comm= -p "$1" 2>/dev/null)" in
        *"$2"*) true ;; *) false ;;
    esac
}
for pid in $servers; do is "$pid" todo-api && kill -9 "$pid"; done
tries=0
while [ $tries -lt 100 ]; do
    running=
    for file in "$root"/shared/cluster/postmaster.pid "$root"/*/*/cluster/postmaster.pid "$root"/*/.*/cluster/postmaster.pid; do
        [ -f "$file" ] || continue
        pid=$(head -n 1 "$file")
        is "$pid" postgres && kill -QUIT "$pid" && running=yes
    done
    [ "$running" ] || break
    tries=$((tries + 1))
    sleep 0.1
done
rm -rf "$root"
"#;

// The watcher lives longer than we do: nobody is there to wait for it.
#[expect(clippy::zombie_processes)]
fn scratch() -> &'static Scratch {
    static SCRATCH: OnceLock<Scratch> = OnceLock::new();
    SCRATCH.get_or_init(|| {
        let root = tempfile::Builder::new()
            .prefix("todo-api-tests-")
            // Tests that run as root run PostgreSQL as somebody else, who has to get in.
            .permissions(Permissions::from_mode(0o755))
            .tempdir()
            .unwrap()
            .keep()
            .canonicalize()
            .unwrap();
        let mut watcher = Command::new("sh")
            .args(["-c", WATCHER, "watcher"])
            .arg(&root)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Ctrl-C ends the tests; the watcher has its work before it then.
            .process_group(0)
            .spawn()
            .unwrap();
        let watcher = Mutex::new(watcher.stdin.take().unwrap());
        Scratch { root, watcher }
    })
}

/// A place for one private PostgreSQL; the directory itself is not made yet. Dropped, it goes,
/// and a PostgreSQL in it too.
pub(crate) struct DataDir(PathBuf);

impl DataDir {
    pub(crate) fn new() -> DataDir {
        DataDir::named("data")
    }

    /// The same with this name, below a directory that nobody else uses.
    pub(crate) fn named(name: &str) -> DataDir {
        let parent = scratch().root.join(unique().to_string());
        fs::create_dir(&parent).unwrap();
        DataDir(parent.join(name))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The directory that it is in, which is there.
    pub(crate) fn parent(&self) -> &Path {
        self.0.parent().unwrap()
    }

    /// The directory as the value of a variable.
    pub(crate) fn text(&self) -> &str {
        self.0.to_str().unwrap()
    }

    /// The process id of the PostgreSQL that runs here, if one does.
    pub(crate) fn postgres(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.0.join("cluster/postmaster.pid")).ok()?;
        let pid = Pid::from_raw(text.lines().next()?.parse().ok()?)?;
        is_alive(pid).then_some(pid)
    }

    /// How to reach the private PostgreSQL that listens here.
    pub(crate) fn database_url(&self) -> String {
        socket_url(&self.0.join("socket"))
    }
}

impl Drop for DataDir {
    fn drop(&mut self) {
        if let Some(postgres) = self.postgres() {
            let _ = kill_process(postgres, Signal::QUIT);
            let deadline = Instant::now() + PATIENCE;
            while is_alive(postgres) && Instant::now() < deadline {
                thread::sleep(POLL);
            }
        }
        let _ = fs::remove_dir_all(self.parent());
    }
}

/// Whether this process lives; a zombie, which waits for somebody to ask about its end, does not.
pub(crate) fn is_alive(pid: Pid) -> bool {
    if cfg!(target_os = "linux") {
        fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat[stat.rfind(')').unwrap()..].starts_with(") Z"))
    } else {
        rustix::process::test_kill_process(pid).is_ok()
    }
}

fn socket_url(directory: &Path) -> String {
    let host = directory.to_str().unwrap().replace('/', "%2F");
    format!("postgres://todo@{host}/todo")
}

// ---------------------------------------------------------------- databases

/// The PostgreSQL that all tests share, and the thread that talks to it as its superuser.
struct SharedPostgres {
    url: String,
    statements: tokio::sync::mpsc::UnboundedSender<Statement>,
}

type Statement = (String, mpsc::Sender<Result<(), String>>);

impl SharedPostgres {
    fn shared() -> &'static SharedPostgres {
        static HOST: OnceLock<SharedPostgres> = OnceLock::new();
        HOST.get_or_init(|| {
            let (started, start) = mpsc::channel();
            let (statements, received) = tokio::sync::mpsc::unbounded_channel();
            thread::spawn(|| SharedPostgres::run(started, received));
            let url = start.recv().expect("no PostgreSQL for the tests");
            SharedPostgres { url, statements }
        })
    }

    /// Starts the private PostgreSQL, unless told of another, and runs statements on it for ever after.
    #[tokio::main(flavor = "current_thread")]
    async fn run(
        started: mpsc::Sender<String>,
        mut statements: tokio::sync::mpsc::UnboundedReceiver<Statement>,
    ) {
        let mut _private = None;
        let url = match env::var("TEST_DATABASE_URL") {
            Ok(url) => url,
            Err(_) => {
                let settings = [
                    ("max_connections", "500"),
                    // What is thrown away at the end need not survive a power cut.
                    ("fsync", "off"),
                    ("full_page_writes", "off"),
                ];
                let postgres = Postgres::start_with(&scratch().root.join("shared"), &settings)
                    .await
                    .unwrap_or_else(|error| panic!("{error}"));
                let url = socket_url(postgres.socket_dir());
                _private = Some(postgres);
                url
            }
        };
        started.send(url.clone()).unwrap();
        while let Some((statement, reply)) = statements.recv().await {
            let url = url.clone();
            tokio::spawn(async move {
                let done = connect(&url).await.batch_execute(&statement).await;
                // The answer to a test that gave up waiting is not missed.
                let _ = reply.send(done.map_err(|error| format!("{error:?}")));
            });
        }
    }

    fn execute(&self, statement: String) -> Result<(), String> {
        let (reply, answer) = mpsc::channel();
        self.statements.send((statement, reply)).unwrap();
        answer
            .recv_timeout(PATIENCE)
            .map_err(|error| error.to_string())?
    }
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// An empty database for one test; dropped there when it is dropped here.
pub(crate) struct Database {
    name: String,
}

impl Database {
    pub(crate) async fn create() -> Database {
        Database::create_with("").await
    }

    /// The same with these options of `create database`.
    pub(crate) async fn create_with(options: &str) -> Database {
        let name = format!("test_{}_{}", std::process::id(), unique());
        let statement = format!("create database {name} {options}");
        tokio::task::spawn_blocking(move || SharedPostgres::shared().execute(statement))
            .await
            .unwrap()
            .unwrap();
        Database { name }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A connection of the test's own.
    pub(crate) async fn sql(&self) -> Client {
        connect(&self.url()).await
    }

    pub(crate) fn url(&self) -> String {
        let url = &SharedPostgres::shared().url;
        let (server, options) = url
            .split_once('?')
            .map_or((url.as_str(), None), |(s, o)| (s, Some(o)));
        let authority = server.find("://").unwrap() + 3;
        let end = server[authority..]
            .find('/')
            .map_or(server.len(), |at| authority + at);
        let options = options
            .map(|options| format!("?{options}"))
            .unwrap_or_default();
        format!("{}/{}{options}", &server[..end], self.name)
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let dropped =
            SharedPostgres::shared().execute(format!("drop database {} with (force)", self.name));
        // A second panic would abort the whole run and hide the first.
        if !thread::panicking() {
            dropped.unwrap();
        }
    }
}

// ---------------------------------------------------------------- processes

/// The program as a child process. Dropped, it is killed.
pub(crate) struct Process {
    child: Mutex<Child>,
    pid: Pid,
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
    collectors: Mutex<Vec<thread::JoinHandle<()>>>,
}

impl Process {
    /// Starts the program with these arguments, and these variables only.
    pub(crate) fn spawn(arguments: &[&str], variables: &[(&str, &str)]) -> Process {
        Process::spawn_in(&scratch().root, arguments, variables)
    }

    /// The same in this directory.
    pub(crate) fn spawn_in(
        directory: &Path,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_todo-api"));
        command
            .args(arguments)
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        Process::run(command, variables)
    }

    /// Runs this command, which is the program or becomes it, with these variables only.
    pub(crate) fn run(mut command: Command, variables: &[(&str, &str)]) -> Process {
        command
            // Nothing of the developer's own settings.
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .env("TMPDIR", env::temp_dir())
            .envs(variables.iter().copied());
        let (stderr_reader, stderr_writer) = pipe().unwrap();
        if variables.contains(&("JOURNAL_STREAM", "stderr")) {
            // As systemd names it if stderr is the journal.
            let stderr = File::from(OwnedFd::from(stderr_writer.try_clone().unwrap()));
            let meta = stderr.metadata().unwrap();
            command.env("JOURNAL_STREAM", format!("{}:{}", meta.dev(), meta.ino()));
        }
        let mut child = command.stderr(stderr_writer).spawn().unwrap();
        // With the command goes our copy of the pipe's other end.
        drop(command);
        let _ = writeln!(scratch().watcher.lock().unwrap(), "{}", child.id());

        let stdout = Arc::new(Mutex::new(String::new()));
        let stderr = Arc::new(Mutex::new(String::new()));
        let mut collectors = vec![collect(stderr_reader, stderr.clone())];
        if let Some(pipe) = child.stdout.take() {
            collectors.push(collect(pipe, stdout.clone()));
        }
        Process {
            pid: Pid::from_child(&child),
            child: Mutex::new(child),
            stdout,
            stderr,
            collectors: Mutex::new(collectors),
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// All that it has written to stderr so far.
    pub(crate) fn log(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// All that it has written to stdout so far.
    pub(crate) fn output(&self) -> String {
        self.stdout.lock().unwrap().clone()
    }

    pub(crate) async fn wait_for_log(&self, text: &str) {
        let deadline = Instant::now() + LOG_PATIENCE;
        while !self.log().contains(text) {
            assert!(
                Instant::now() < deadline,
                "{text:?} is not in the log:\n{}",
                self.log()
            );
            sleep(POLL).await;
        }
    }

    /// Waits until it listens; panics with its log if it does not.
    pub(crate) async fn listening(&self) -> SocketAddr {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let ended = self.status();
            let log = self.log();
            if let Some((_, rest)) = log.split_once("listening on http://") {
                let end = rest.find(|c: char| !c.is_ascii_hexdigit() && !".:[]".contains(c));
                if let Some(Ok(addr)) = end.map(|end| rest[..end].parse()) {
                    return addr;
                }
            }
            assert!(
                ended.is_none(),
                "ended ({}) before it listened:\n{log}",
                ended.unwrap()
            );
            assert!(Instant::now() < deadline, "does not listen:\n{log}");
            sleep(POLL).await;
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let mut child = self.child.lock().unwrap();
        // Once waited for, the number may be somebody else's.
        if child.try_wait().unwrap().is_none() {
            kill_process(self.pid, signal).unwrap();
        }
    }

    fn status(&self) -> Option<ExitStatus> {
        self.child.lock().unwrap().try_wait().unwrap()
    }

    /// Waits for its end, after which log and output are complete.
    pub(crate) async fn ended(&self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.status() {
                self.finish_collecting();
                return status;
            }
            assert!(Instant::now() < deadline, "does not end:\n{}", self.log());
            sleep(POLL).await;
        }
    }

    pub(crate) async fn stop(&self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended().await
    }

    pub(crate) fn kill(&self) {
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }

    fn finish_collecting(&self) {
        for collector in self.collectors.lock().unwrap().drain(..) {
            let _ = collector.join();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        self.finish_collecting();
        if thread::panicking() {
            eprintln!("---- log of process {}\n{}", self.pid, self.log());
        }
    }
}

fn collect(from: impl Read + Send + 'static, to: Arc<Mutex<String>>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while from.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            to.lock().unwrap().push_str(&String::from_utf8_lossy(&line));
            line.clear();
        }
    })
}

// ---------------------------------------------------------------- servers

/// A running server on a database of its own. Dropped, it is killed and the database goes.
pub(crate) struct Server {
    // Before the database: fields are dropped in this order.
    process: Process,
    addr: SocketAddr,
    database: Option<Arc<Database>>,
    variables: HashMap<String, String>,
}

impl Server {
    pub(crate) async fn start() -> Server {
        Server::with(&[]).await
    }

    /// Starts with these variables besides, or instead of, the usual ones. With a `DATABASE_URL`
    /// among them no database is made; with a `DATA_DIR` the server makes its own.
    pub(crate) async fn with(variables: &[(&str, &str)]) -> Server {
        let server = Server::listening(variables).await;
        server.ready().await;
        server
    }

    /// The same, but does not wait until the server is ready.
    pub(crate) async fn listening(variables: &[(&str, &str)]) -> Server {
        let brings_its_own = |(name, _): &(&str, &str)| {
            ["DATABASE_URL", "DATABASE_URL_FILE", "DATA_DIR"].contains(name)
        };
        let database = if variables.iter().any(brings_its_own) {
            None
        } else {
            Some(Arc::new(Database::create().await))
        };
        let mut all = HashMap::from(
            [
                ("LISTEN_ADDR", "127.0.0.1:0"),
                ("BCRYPT_COST", "10"),
                ("AUTH_RATE_PER_MINUTE", "0"),
                ("DB_POOL_SIZE", "5"),
                ("RUST_LOG", "info"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
        if let Some(database) = &database {
            all.insert("DATABASE_URL".into(), database.url());
        }
        // On its own PostgreSQL a server makes its own secret too.
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

    async fn ready(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.get("/readyz").send().await.status != 200 {
            assert!(Instant::now() < deadline, "not ready:\n{}", self.log());
            sleep(POLL).await;
        }
    }

    /// A second instance on the same database with the same variables, but for these.
    pub(crate) async fn sibling(&self, variables: &[(&str, &str)]) -> Server {
        let server = Server::launch(self.database.clone(), self.variables.clone(), variables).await;
        server.ready().await;
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

    /// A connection of the test's own to this server's database.
    pub(crate) async fn sql(&self) -> Client {
        connect(&self.database_url()).await
    }

    /// All that it has written to stderr so far.
    pub(crate) fn log(&self) -> String {
        self.process.log()
    }

    pub(crate) async fn wait_for_log(&self, text: &str) {
        self.process.wait_for_log(text).await;
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits for its end.
    pub(crate) async fn ended(&self) -> ExitStatus {
        self.process.ended().await
    }

    /// Ends it as an operator would, with SIGTERM.
    pub(crate) async fn stop(&self) -> ExitStatus {
        self.process.stop().await
    }

    /// Ends it as no operator would, with SIGKILL.
    pub(crate) fn kill(&self) {
        self.process.kill();
    }

    /// Registers this address with [`PASSWORD`].
    pub(crate) async fn register(&self, email: &str) -> User {
        let answer = self
            .post("/api/v1/auth/register")
            .json(json!({"email": email, "password": PASSWORD}))
            .send()
            .await
            .expect(201);
        User::from_tokens(&answer.json(), PASSWORD)
    }

    /// Registers somebody new.
    pub(crate) async fn user(&self) -> User {
        self.register(&format!("user{}@example.com", unique()))
            .await
    }

    /// Signs in: another session of the same user.
    pub(crate) async fn login(&self, email: &str, password: &str) -> User {
        let answer = self
            .post("/api/v1/auth/login")
            .json(json!({"email": email, "password": password}))
            .send()
            .await
            .expect(200);
        User::from_tokens(&answer.json(), password)
    }

    pub(crate) fn request(&self, method: Method, path: impl Into<String>) -> Request {
        Request {
            addr: self.addr,
            method,
            path: path.into(),
            headers: Vec::new(),
            body: None,
        }
    }

    pub(crate) fn get(&self, path: impl Into<String>) -> Request {
        self.request(Method::GET, path)
    }

    pub(crate) fn post(&self, path: impl Into<String>) -> Request {
        self.request(Method::POST, path)
    }

    pub(crate) fn put(&self, path: impl Into<String>) -> Request {
        self.request(Method::PUT, path)
    }

    pub(crate) fn patch(&self, path: impl Into<String>) -> Request {
        self.request(Method::PATCH, path)
    }

    pub(crate) fn delete(&self, path: impl Into<String>) -> Request {
        self.request(Method::DELETE, path)
    }

    /// One connection: writes these bytes and gives what comes back until it closes, or for 5 seconds.
    pub(crate) async fn raw(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut stream = TcpStream::connect(self.addr).await.unwrap();
        let mut answer = Vec::new();
        let exchange = async {
            // A server that has refused already may have closed it, and its answer counts.
            let _ = stream.write_all(bytes.as_ref()).await;
            let mut piece = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut piece).await {
                answer.extend_from_slice(&piece[..length]);
            }
        };
        let _ = timeout(Duration::from_secs(5), exchange).await;
        String::from_utf8_lossy(&answer).into_owned()
    }
}

// ---------------------------------------------------------------- users

/// Somebody who is signed in.
#[derive(Clone, Debug)]
pub(crate) struct User {
    pub(crate) id: String,
    pub(crate) email: String,
    pub(crate) password: String,
    pub(crate) access_token: String,
    pub(crate) refresh_token: String,
    pub(crate) session_id: String,
}

impl User {
    fn from_tokens(tokens: &Value, password: &str) -> User {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        User {
            id: text(&tokens["user"]["id"]),
            email: text(&tokens["user"]["email"]),
            password: password.to_owned(),
            access_token: text(&tokens["access_token"]),
            refresh_token: text(&tokens["refresh_token"]),
            session_id: text(&claims(tokens["access_token"].as_str().unwrap())["sid"]),
        }
    }

    /// The path of this user's tasks.
    pub(crate) fn tasks(&self) -> String {
        format!("/api/v1/{}/tasks", self.id)
    }

    pub(crate) async fn create_task(&self, server: &Server, title: &str) -> Value {
        server
            .post(self.tasks())
            .bearer(&self.access_token)
            .json(json!({"title": title}))
            .send()
            .await
            .expect(201)
            .json()
    }
}

/// The claims of a token, unverified.
pub(crate) fn claims(token: &str) -> Value {
    dangerous::insecure_decode_claims(token).unwrap()
}

/// A JWT made by hand, signed with HS256 whatever its header says.
pub(crate) fn forge(secret: &str, header: Value, claims: Value) -> String {
    let message = format!(
        "{}.{}",
        base64url(header.to_string().as_bytes()),
        base64url(claims.to_string().as_bytes())
    );
    let key = EncodingKey::from_secret(secret.as_bytes());
    let signature = crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap();
    format!("{message}.{signature}")
}

/// Base64 in the alphabet of URLs and without padding (RFC 7515, section 2).
pub(crate) fn base64url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk
            .iter()
            .fold(0, |bits, byte| bits << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for place in 0..=chunk.len() {
            text.push(char::from(
                ALPHABET[(bits >> (18 - 6 * place) & 63) as usize],
            ));
        }
    }
    text
}

// ---------------------------------------------------------------- requests

/// A request to be sent on a connection of its own.
#[must_use]
pub(crate) struct Request {
    addr: SocketAddr,
    method: Method,
    path: String,
    headers: Vec<(String, String)>,
    body: Option<Bytes>,
}

impl Request {
    pub(crate) fn header(mut self, name: &str, value: impl AsRef<str>) -> Request {
        self.headers
            .push((name.to_owned(), value.as_ref().to_owned()));
        self
    }

    pub(crate) fn bearer(self, token: &str) -> Request {
        self.header("authorization", format!("Bearer {token}"))
    }

    pub(crate) fn json(self, body: Value) -> Request {
        self.body(body.to_string(), "application/json")
    }

    pub(crate) fn body(mut self, body: impl Into<Bytes>, content_type: &str) -> Request {
        self.body = Some(body.into());
        self.header("content-type", content_type)
    }

    /// A body without a type.
    pub(crate) fn untyped(mut self, body: impl Into<Bytes>) -> Request {
        self.body = Some(body.into());
        self
    }

    pub(crate) async fn send(self) -> Response {
        let what = format!("{} {}", self.method, self.path);
        self.try_send()
            .await
            .unwrap_or_else(|error| panic!("{what}: {error}"))
    }

    /// The same where the server may be gone, or go in the middle.
    pub(crate) async fn try_send(
        self,
    ) -> Result<Response, Box<dyn std::error::Error + Send + Sync>> {
        timeout(Duration::from_secs(30), self.exchange()).await?
    }

    async fn exchange(self) -> Result<Response, Box<dyn std::error::Error + Send + Sync>> {
        let stream = TcpStream::connect(self.addr).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let mut request = hyper::Request::builder()
            .method(self.method)
            .uri(self.path)
            .header(header::HOST, self.addr.to_string());
        for (name, value) in self.headers {
            request = request.header(name, header::HeaderValue::from_bytes(value.as_bytes())?);
        }
        let request = request.body(Full::new(self.body.unwrap_or_default()))?;
        let (parts, body) = sender.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        connection.abort();
        Ok(Response {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body,
        })
    }
}

/// An answer, whole.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Response {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("no JSON ({error}): {} {:?}", self.status, self.body))
    }

    /// The value of a header that must be there.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .unwrap_or_else(|| panic!("no {name} in {self:?}"))
            .to_str()
            .unwrap()
    }

    /// Itself, if it has this status.
    pub(crate) fn expect(self, status: u16) -> Response {
        assert_eq!(
            self.status,
            status,
            "{}",
            String::from_utf8_lossy(&self.body)
        );
        self
    }

    /// The body, if it is problem details (RFC 9457) in every respect with this status and code.
    pub(crate) fn problem(&self, status: u16, code: &str) -> Value {
        assert_eq!(
            self.status,
            status,
            "{}",
            String::from_utf8_lossy(&self.body)
        );
        assert_eq!(self.header("content-type"), "application/problem+json");
        let body = self.json();
        assert_eq!(body["code"], code, "{body}");
        assert_eq!(body["status"], status, "{body}");
        assert_eq!(body["type"], format!("/problems/{code}"), "{body}");
        assert!(
            body["title"]
                .as_str()
                .is_some_and(|title| !title.is_empty()),
            "{body}"
        );
        assert!(
            body["detail"]
                .as_str()
                .is_some_and(|detail| !detail.is_empty()),
            "{body}"
        );
        let instance = format!("urn:request:{}", self.header("x-request-id"));
        assert_eq!(body["instance"], instance, "{body}");
        // The faults by name, for 422 alone.
        let faults = body["errors"].as_array().map_or(0, Vec::len);
        assert_eq!(faults > 0, code == "validation_failed", "{body}");
        body
    }
}
