//! The PostgreSQL server that the tests share, and one database in it for each test.

use std::{
    env,
    sync::{Arc, OnceLock, mpsc},
    thread,
};

use todo_api::embedded_postgres::Postgres;
use tokio::{
    runtime::Handle,
    sync::{Mutex, OnceCell, mpsc as tokio_mpsc},
};
use tokio_postgres::{Client, NoTls};

use super::{
    Process, SECRET, WAIT_TIMEOUT,
    scratch::{root, socket_url},
    unique, until,
};

/// The shared PostgreSQL server, and the thread that runs statements on it as its superuser.
struct SharedPostgres {
    url: String,
    /// Whether it is an embedded PostgreSQL of this run rather than the server at
    /// `TEST_DATABASE_URL`.
    is_embedded: bool,
    statements: tokio_mpsc::UnboundedSender<Statement>,
    /// The runtime of the thread. Unlike that of a test, it runs until this process ends.
    runtime: Handle,
}

type Statement = (String, mpsc::Sender<Result<(), String>>);

impl SharedPostgres {
    fn get() -> &'static SharedPostgres {
        static SHARED: OnceLock<SharedPostgres> = OnceLock::new();
        SHARED.get_or_init(|| {
            let (started, start) = mpsc::channel();
            let (statements, received) = tokio_mpsc::unbounded_channel();
            thread::spawn(|| SharedPostgres::run(started, received));
            let (url, is_embedded, runtime) = start.recv().expect("no PostgreSQL for the tests");
            SharedPostgres {
                url,
                is_embedded,
                statements,
                runtime,
            }
        })
    }

    /// Starts the embedded PostgreSQL, unless `TEST_DATABASE_URL` is set, and runs statements on
    /// it until this process ends.
    #[tokio::main(flavor = "current_thread")]
    async fn run(
        started: mpsc::Sender<(String, bool, Handle)>,
        mut statements: tokio_mpsc::UnboundedReceiver<Statement>,
    ) {
        let mut postgres = None;
        let url = match env::var("TEST_DATABASE_URL") {
            Ok(url) => url,
            Err(_) => {
                let settings = [
                    ("max_connections", "500"),
                    // The data is temporary and need not survive a crash.
                    ("fsync", "off"),
                    ("full_page_writes", "off"),
                    ("synchronous_commit", "off"),
                    ("wal_init_zero", "off"),
                    ("max_wal_size", "1GB"),
                    ("checkpoint_timeout", "1h"),
                    // Dropping a database scans the buffers, and autovacuum starts a process for
                    // each database again and again.
                    ("shared_buffers", "32MB"),
                    ("autovacuum", "off"),
                ];
                let started = Postgres::start_with(&root().join("shared"), &settings)
                    .await
                    .unwrap_or_else(|error| panic!("{error}"));
                let url = socket_url(started.socket_dir());
                postgres = Some(started);
                url
            }
        };
        let started_at = (url.clone(), postgres.is_some(), Handle::current());
        started.send(started_at).unwrap();
        // Connecting takes PostgreSQL longer than most statements. Created databases do not wait until
        // others are dropped.
        let (mut creating, mut dropping) = (None, None);
        while let Some((statement, reply)) = statements.recv().await {
            let sql = match statement.starts_with("drop") {
                true => &mut dropping,
                false => &mut creating,
            };
            let sql = reconnect(sql, &url).await;
            tokio::spawn(async move {
                let done = sql.batch_execute(&statement).await;
                // The receiver has been dropped if the test has timed out.
                let _ = reply.send(done.map_err(|error| format!("{error:?}")));
            });
        }
    }

    fn execute(&self, statement: String) -> Result<(), String> {
        let (reply, result) = mpsc::channel();
        self.statements.send((statement, reply)).unwrap();
        result
            .recv_timeout(WAIT_TIMEOUT)
            .map_err(|error| error.to_string())?
    }

    /// Returns the URL of another database on the same server.
    fn database_url(&self, name: &str) -> String {
        let (server, options) = self
            .url
            .split_once('?')
            .map_or((self.url.as_str(), String::new()), |(server, options)| {
                (server, format!("?{options}"))
            });
        let authority = server.find("://").unwrap() + 3;
        let end = server[authority..]
            .find('/')
            .map_or(server.len(), |at| authority + at);
        format!("{}/{name}{options}", &server[..end])
    }
}

pub(super) async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Returns the client of the last call, or connects if there is none or its connection was lost.
async fn reconnect(last: &mut Option<Arc<Client>>, url: &str) -> Arc<Client> {
    match last.take_if(|client| !client.is_closed()) {
        Some(client) => last.insert(client).clone(),
        None => last.insert(Arc::new(connect(url).await)).clone(),
    }
}

/// A database for one test, dropped with this value.
pub(crate) struct Database {
    name: String,
    shared_sql: Mutex<Option<Arc<Client>>>,
}

impl Database {
    /// Creates an empty database.
    pub(crate) async fn create() -> Database {
        Database::create_with("").await
    }

    /// Creates a database with these options of `create database`.
    pub(crate) async fn create_with(options: &str) -> Database {
        let name = format!("test_{}_{}", std::process::id(), unique());
        execute(format!("create database {name} {options}"))
            .await
            .unwrap();
        Database {
            name,
            shared_sql: Mutex::default(),
        }
    }

    /// Creates a database with the current schema.
    pub(crate) async fn create_migrated() -> Database {
        static TEMPLATE: OnceCell<Database> = OnceCell::const_new();
        Database::clone_of(&TEMPLATE, create_template).await
    }

    /// Clones the database that `create` returns. Calls it once, unless the server is an external
    /// one, on which nothing would drop the template.
    pub(crate) async fn clone_of(
        template: &OnceCell<Database>,
        create: impl AsyncFn() -> Database,
    ) -> Database {
        if !is_embedded().await {
            return create().await;
        }
        let template = template.get_or_init(async || {
            let database = create().await;
            wait_until_unused(&database.name).await;
            database
        });
        Database::create_with(&format!("template {}", template.await.name)).await
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Connects to this database.
    pub(crate) async fn sql(&self) -> Client {
        connect(&self.url()).await
    }

    /// Returns a connection to this database that the harness keeps.
    pub(super) async fn shared_sql(&self) -> Arc<Client> {
        let mut shared = self.shared_sql.lock().await;
        let (mut last, url) = (shared.take(), self.url());
        let connect = async move { reconnect(&mut last, &url).await };
        let connected = SharedPostgres::get().runtime.spawn(connect);
        shared.insert(connected.await.unwrap()).clone()
    }

    pub(crate) fn url(&self) -> String {
        SharedPostgres::get().database_url(&self.name)
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let shared = SharedPostgres::get();
        let statement = format!("drop database {} with (force)", self.name);
        if shared.is_embedded {
            // Does not wait, because the whole cluster is removed at the end.
            let _ = shared.statements.send((statement, mpsc::channel().0));
            return;
        }
        let dropped = shared.execute(statement);
        // A panic while panicking would abort the run and hide the first one.
        if !thread::panicking() {
            dropped.unwrap();
        }
    }
}

async fn is_embedded() -> bool {
    tokio::task::spawn_blocking(|| SharedPostgres::get().is_embedded)
        .await
        .unwrap()
}

/// Runs a statement as the superuser.
async fn execute(statement: String) -> Result<(), String> {
    tokio::task::spawn_blocking(move || SharedPostgres::get().execute(statement))
        .await
        .unwrap()
}

/// Creates a database with the service's schema.
async fn create_template() -> Database {
    let database = Database::create().await;
    let variables = [
        ("DATABASE_URL", &*database.url()),
        ("JWT_SECRET", SECRET),
        ("RUST_LOG", "info"),
    ];
    let migrate = Process::spawn(&["migrate"], &variables);
    assert!(migrate.ended().await.success(), "{}", migrate.log());
    database
}

/// Waits until no connection to a database is open, so that it can be a template.
async fn wait_until_unused(name: &str) {
    let assert_unused = format!(
        "do $$ begin assert not exists
         (select 1 from pg_stat_activity where datname = '{name}'); end $$"
    );
    until("the template's connections are closed", async || {
        execute(assert_unused.clone()).await.is_ok()
    })
    .await;
}

/// A transaction that holds a lock, and a connection that observes which statements it blocks.
pub(crate) struct Lock {
    pub(crate) transaction: Client,
    observer: Client,
}

impl Lock {
    /// Begins a transaction and executes a statement that acquires the lock.
    pub(super) async fn acquire(url: &str, statement: &str) -> Lock {
        let transaction = connect(url).await;
        let begin = format!("begin; {statement}");
        transaction.batch_execute(&begin).await.unwrap();
        let observer = connect(url).await;
        Lock {
            transaction,
            observer,
        }
    }

    /// Waits until `count` statements are blocked.
    pub(crate) async fn wait_for_blocked(&self, count: i64) {
        let blocked = "select count(*) from pg_stat_activity
                       where datname = current_database() and wait_event_type = 'Lock'";
        until(&format!("{count} statements are blocked"), async || {
            let row = self.observer.query_one(blocked, &[]).await.unwrap();
            row.get::<_, i64>(0) >= count
        })
        .await;
    }

    /// Commits the transaction once `count` statements are blocked.
    pub(crate) async fn release_after(&self, count: i64) {
        self.wait_for_blocked(count).await;
        self.release().await;
    }

    /// Terminates the backends whose statements are blocked. Returns their number.
    pub(crate) async fn terminate_blocked(&self) -> i64 {
        let terminate = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                         where datname = current_database() and wait_event_type = 'Lock'";
        let row = self.observer.query_one(terminate, &[]).await.unwrap();
        row.get(0)
    }

    /// Commits the transaction.
    pub(crate) async fn release(&self) {
        self.transaction.batch_execute("commit").await.unwrap();
    }
}
