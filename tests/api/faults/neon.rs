//! The ways of a hosted database: it sleeps, a pooler stands before it, and it speaks TLS alone.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use todo_api::embedded_postgres::Postgres;

use super::{
    ANSWERED, Cluster, HEALED, backends,
    load::{Client, Outcome},
    proxy::NetworkCondition,
    report, serialize, short_or_full, until_connected,
};
use crate::harness::{DataDir, PASSWORD, Process, SECRET, Server, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_fell_asleep_is_woken_by_the_first_request() {
    let _turn = serialize().await;
    let rig = Cluster::proxied(&[("DB_POOL_SIZE", "8")]).await;
    let sql = rig.sql().await;
    let asker = rig.asker();
    let read = format!("/{}", rig.task);
    let waking = Duration::from_secs(1);
    let rounds = short_or_full(3, 20);
    let mut slowest = Duration::ZERO;
    for round in 0..rounds {
        // All connections are closed while nobody wants anything.
        rig.proxy().turns(NetworkCondition::Asleep(waking));
        until("all connections are closed", async || {
            backends(&sql).await.is_empty()
        })
        .await;

        // More of them than there are connections, reads and writes.
        let begin = Instant::now();
        let asks = (0..12).map(|number| {
            let mut client = Client::at(rig.server.addr());
            let title = format!("number {number} of round {round}");
            let request = match number % 2 {
                0 => asker.read(&read),
                _ => asker.create(&title, &title.replace(' ', "-")),
            };
            async move { client.ask(request).await.fate }
        });
        let fates = futures_util::future::join_all(asks).await;
        let took = begin.elapsed();
        assert!(took < ANSWERED, "answered after {took:?}");
        assert!(
            fates
                .iter()
                .all(|fate| matches!(fate, Outcome::Status(200 | 201))),
            "{fates:?}"
        );
        slowest = slowest.max(took);
        rig.proxy().turns(NetworkCondition::Fair);
    }
    assert!(slowest >= waking, "nobody had to wait");
    report(
        "asleep",
        format!(
            "{rounds} × woken by 12 requests at once, all served, the slowest after {slowest:.1?}"
        ),
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_wakes_slowly_is_refused_and_then_served() {
    let _turn = serialize().await;
    let rig = Cluster::proxied(&[]).await;
    // Longer than a request can wait for a connection.
    let waking = Duration::from_secs(4);
    rig.proxy().turns(NetworkCondition::Asleep(2 * waking));
    let begin = Instant::now();
    let mut refused = 0;
    loop {
        let asked = Instant::now();
        let answer = rig
            .server
            .get(rig.user.tasks())
            .bearer(&rig.user.access_token)
            .send()
            .await;
        assert!(
            asked.elapsed() < ANSWERED,
            "answered after {:?}",
            asked.elapsed()
        );
        if answer.status == 200 {
            break;
        }
        answer.problem(503, "database_unavailable");
        answer.header("retry-after");
        refused += 1;
        assert!(begin.elapsed() < waking + HEALED, "still refused");
        if begin.elapsed() > waking {
            rig.proxy().turns(NetworkCondition::Fair);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let took = begin.elapsed();
    report(
        "waking slowly",
        format!(
            "{refused} × 503 with Retry-After, served after {took:.1?} of which 4 s were its own"
        ),
    );
    assert!(refused > 0);
    rig.end().await;
}

/// The embedded PostgreSQL with a `pg_hba.conf` of the test's own.
async fn start_with_rules(directory: &DataDir, rules: &str, settings: &[(&str, &str)]) -> Postgres {
    let file = directory.parent().join("rules");
    fs::write(&file, rules).unwrap();
    let mut settings = settings.to_vec();
    settings.push(("hba_file", file.to_str().unwrap()));
    Postgres::start_with(directory.path(), &settings)
        .await
        .unwrap()
}

/// A PgBouncer before a private PostgreSQL. Dropped, it ends.
struct PgBouncer {
    child: Child,
    url: String,
}

impl PgBouncer {
    /// None where the program is not on the machine.
    async fn start(directory: &DataDir, postgres: &Postgres, mode: &str) -> Option<PgBouncer> {
        let program = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer"]
            .into_iter()
            .find(|path| Path::new(path).exists())?;
        let place = directory.parent();
        let port = {
            let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            free.local_addr().unwrap().port()
        };
        let users = place.join("users.txt");
        fs::write(&users, "\"todo\" \"\"\n").unwrap();
        let settings = place.join(format!("{mode}.ini"));
        fs::write(
            &settings,
            format!(
                "[databases]\ntodo = host={} port=5432 user=todo dbname=todo\n\
                 [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
                 auth_type = trust\nauth_file = {}\npool_mode = {mode}\ndefault_pool_size = 10\n",
                postgres.socket_dir().display(),
                users.display()
            ),
        )
        .unwrap();
        let mut command = Command::new(program);
        command
            .arg(&settings)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // It does not run as root, and whoever owns the cluster may reach its socket.
        let owner = fs::metadata(directory.path().join("cluster")).unwrap();
        use std::os::unix::process::CommandExt;
        if rustix::process::geteuid().is_root() {
            command.uid(owner.uid()).gid(owner.gid());
        }
        let child = command.spawn().unwrap();
        until("PgBouncer listens", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port))
                .await
                .is_ok()
        })
        .await;
        let url = format!("postgres://todo@127.0.0.1:{port}/todo");
        Some(PgBouncer { child, url })
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn a_pooler_in_session_mode_serves() {
    let directory = DataDir::new();
    let postgres = start_with_rules(&directory, "local all all trust\n", &[]).await;
    let Some(pooler) = PgBouncer::start(&directory, &postgres, "session").await else {
        return report(
            "pooler in session mode",
            "SKIPPED: no pgbouncer on this machine",
        );
    };
    let server = Server::with(&[("DATABASE_URL", &pooler.url)]).await;
    let user = server.user().await;
    let tasks = short_or_full(50, 1000);
    for number in 0..tasks {
        user.create_task(&format!("number {number}")).await;
    }
    let list = server
        .get(user.tasks())
        .bearer(&user.access_token)
        .send()
        .await
        .expect(200);
    assert_eq!(list.json().as_array().map(Vec::len), Some(tasks));
    report(
        "pooler in session mode",
        format!("{tasks} of {tasks} tasks made and listed"),
    );
    assert_eq!(server.stop().await.code(), Some(0), "{}", server.log());
    drop(pooler);
    postgres.stop().await;
}

#[tokio::test]
async fn a_pooler_that_forgets_statements_is_refused_by_name() {
    let directory = DataDir::new();
    let postgres = start_with_rules(&directory, "local all all trust\n", &[]).await;
    let Some(pooler) = PgBouncer::start(&directory, &postgres, "transaction").await else {
        return report(
            "pooler in transaction mode",
            "SKIPPED: no pgbouncer on this machine",
        );
    };
    let variables = [
        ("DATABASE_URL", pooler.url.as_str()),
        ("JWT_SECRET", SECRET),
        ("LISTEN_ADDR", "127.0.0.1:0"),
    ];
    let rounds = short_or_full(3, 50);
    let mut line = String::new();
    for _ in 0..rounds {
        let process = Process::spawn(&[], &variables);
        let status = process.ended().await;
        let log = process.log();
        assert!(
            status.code().is_some_and(|code| code != 0),
            "{status}: {log}"
        );
        line = log.lines().last().unwrap_or_default().to_owned();
        assert!(
            line.contains("PgBouncer") && line.contains("transaction"),
            "{log}"
        );
    }
    let check = Process::spawn(&["check"], &variables);
    assert_eq!(check.ended().await.code(), Some(1), "{}", check.output());
    assert!(check.output().contains("PgBouncer"), "{}", check.output());
    report(
        "pooler in transaction mode",
        format!("{rounds} × refused: {line}"),
    );
    drop(pooler);
    postgres.stop().await;
}

/// Runs openssl in a directory.
fn openssl(directory: &Path, arguments: &str) {
    let output = Command::new("openssl")
        .args(arguments.split(' '))
        .current_dir(directory)
        .output()
        .expect("openssl");
    assert!(
        output.status.success(),
        "openssl {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Certificates: two authorities, a server's by the first for `db.example`, and one by nobody.
fn certificates(directory: &Path) {
    const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
    for authority in ["ca", "stranger"] {
        openssl(
            directory,
            &format!(
                "req -x509 {KEY} -subj /CN={authority} -keyout {authority}.key -out {authority}.pem"
            ),
        );
    }
    openssl(
        directory,
        &format!("req {KEY} -subj /CN=db.example -keyout server.key -out server.csr"),
    );
    fs::write(directory.join("names"), "subjectAltName=DNS:db.example\n").unwrap();
    openssl(
        directory,
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.pem",
    );
    openssl(
        directory,
        &format!(
            "req -x509 {KEY} -subj /CN=self -addext subjectAltName=DNS:db.example -keyout self.key -out self.pem"
        ),
    );
}

/// A PostgreSQL that wants TLS and a password of everybody who comes over TCP.
struct Tls {
    postgres: Postgres,
    directory: DataDir,
    certificates: PathBuf,
    address: String,
}

impl Tls {
    async fn start() -> Tls {
        let directory = DataDir::new();
        let certificates = directory.parent().join("certificates");
        fs::create_dir(&certificates).unwrap();
        self::certificates(&certificates);
        // A loopback address of its own, so that the port need not be.
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let [_, high, middle, low] = std::process::id().to_be_bytes();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let address = format!("127.{}.{middle}.{low}", 32 * number + u32::from(high));

        let first = Postgres::start(directory.path()).await.unwrap();
        let sql = until_connected(&first).await;
        sql.batch_execute(&format!(
            "create role ann login superuser password '{PASSWORD}'"
        ))
        .await
        .unwrap();
        first.stop().await;
        let cluster = directory.path().join("cluster");
        present(&certificates, &cluster, "server");
        let settings = [("listen_addresses", address.as_str()), ("ssl", "on")];
        let rules = "local all all trust\nhostssl all all 127.0.0.0/8 scram-sha-256\n";
        let postgres = start_with_rules(&directory, rules, &settings).await;
        Tls {
            postgres,
            directory,
            certificates,
            address,
        }
    }

    fn url(&self, host: &str, options: &str) -> String {
        format!(
            "postgres://ann:{PASSWORD}@{host}/todo?hostaddr={}&{options}",
            self.address
        )
    }

    /// What `todo-api check` says of it, and its exit code.
    async fn check(&self, host: &str, options: &str, authority: Option<&str>) -> (i32, String) {
        let url = self.url(host, options);
        let authority = authority.map(|name| self.certificates.join(name));
        let mut variables = vec![("DATABASE_URL", url.as_str()), ("JWT_SECRET", SECRET)];
        if let Some(authority) = &authority {
            variables.push(("PGSSLROOTCERT", authority.to_str().unwrap()));
        }
        let process = Process::spawn(&["check"], &variables);
        let code = process.ended().await.code().unwrap();
        (code, process.output() + &process.log())
    }
}

/// Puts a certificate and its key where PostgreSQL looks for its own.
fn present(certificates: &Path, cluster: &Path, name: &str) {
    let owner = fs::metadata(cluster).unwrap();
    for (from, to) in [("pem", "server.crt"), ("key", "server.key")] {
        let to = cluster.join(to);
        fs::copy(certificates.join(format!("{name}.{from}")), &to).unwrap();
        fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).unwrap();
        chown(&to, Some(owner.uid()), Some(owner.gid())).unwrap();
    }
}

#[cfg(target_os = "linux")] // Elsewhere there is one loopback address.
#[tokio::test]
async fn tls_is_verified_as_the_url_asks() {
    let tls = Tls::start().await;
    let (right, wrong) = ("db.example", "other.example");
    let (ca, stranger) = (Some("ca.pem"), Some("stranger.pem"));
    let works = [
        (right, "sslmode=require", ca),
        (right, "sslmode=verify-ca", ca),
        (right, "sslmode=verify-full", ca),
        // The chain is right, and the name is not asked about.
        (wrong, "sslmode=verify-ca", ca),
        (right, "sslmode=require&channel_binding=require", ca),
        (right, "sslmode=verify-full&channel_binding=require", ca),
        (wrong, "sslmode=prefer", None),
        (right, "channel_binding=prefer", None),
    ];
    let refused = [
        (wrong, "sslmode=require", ca),
        (wrong, "sslmode=verify-full", ca),
        (right, "sslmode=require", stranger),
        (right, "sslmode=verify-ca", stranger),
        (right, "sslmode=verify-full", stranger),
        // None of the authorities that the system trusts.
        (right, "sslmode=require", None),
        (right, "sslmode=require&channel_binding=require", stranger),
    ];
    for (host, options, authority) in works {
        let (code, said) = tls.check(host, options, authority).await;
        assert_eq!(code, 0, "{host} {options} {authority:?}: {said}");
        assert!(said.contains("TLS in use"), "{host} {options}: {said}");
    }
    let mut reasons = Vec::new();
    for (host, options, authority) in refused {
        let (code, said) = tls.check(host, options, authority).await;
        assert_eq!(code, 1, "{host} {options} {authority:?}: {said}");
        assert!(!said.contains(PASSWORD), "{said}");
        let reason = said.lines().find(|line| line.contains("cannot be used"));
        let reason = reason.unwrap_or_else(|| panic!("{host} {options}: {said}"));
        assert!(reason.contains("certificate"), "{host} {options}: {reason}");
        reasons.push(reason.trim().to_owned());
    }

    // Without TLS the rules have no place for us.
    let (code, said) = tls.check(right, "sslmode=disable", None).await;
    assert_eq!(code, 1, "{said}");
    let (code, said) = tls
        .check(right, "sslmode=disable&channel_binding=require", None)
        .await;
    assert_eq!(code, 1, "{said}");

    // A certificate that nobody vouches for.
    present(
        &tls.certificates,
        &tls.directory.path().join("cluster"),
        "self",
    );
    let sql = until_connected(&tls.postgres).await;
    sql.batch_execute("select pg_reload_conf()").await.unwrap();
    until("the new certificate is shown", async || {
        let (code, _) = tls.check(right, "sslmode=verify-full", ca).await;
        code == 1
    })
    .await;
    let (code, said) = tls.check(right, "sslmode=prefer", None).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("TLS in use"), "{said}");
    report(
        "TLS",
        format!(
            "{} ways that work, {} that are refused, such as: {}",
            works.len() + 1,
            refused.len() + 3,
            reasons[0]
        ),
    );
    tls.postgres.stop().await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_server_over_tls_serves_and_one_it_cannot_trust_ends_the_start() {
    let tls = Tls::start().await;
    let authority = tls.certificates.join("ca.pem");
    let authority = authority.to_str().unwrap();
    let url = tls.url("db.example", "sslmode=require&channel_binding=require");
    let server = Server::with(&[("DATABASE_URL", &url), ("PGSSLROOTCERT", authority)]).await;
    let user = server.user().await;
    for number in 0..20 {
        user.create_task(&format!("number {number}")).await;
    }
    let sql = until_connected(&tls.postgres).await;
    let plain: i64 = sql
        .query_one(
            "select count(*) from pg_stat_activity a left join pg_stat_ssl s using (pid)
             where application_name = 'todo-api' and s.ssl is not true",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(plain, 0, "connections without TLS");
    assert_eq!(server.stop().await.code(), Some(0), "{}", server.log());

    let url = tls.url("other.example", "sslmode=verify-full");
    let process = Process::spawn(
        &[],
        &[
            ("DATABASE_URL", &url),
            ("JWT_SECRET", SECRET),
            ("LISTEN_ADDR", "127.0.0.1:0"),
            ("PGSSLROOTCERT", authority),
        ],
    );
    let status = process.ended().await;
    let log = process.log();
    assert!(
        status.code().is_some_and(|code| code != 0),
        "{status}: {log}"
    );
    let line = log.lines().last().unwrap_or_default();
    assert!(
        line.contains("certificate") && !line.contains(PASSWORD),
        "{log}"
    );
    report(
        "TLS",
        format!("20 of 20 tasks made over it; wrong name: {line}"),
    );
    tls.postgres.stop().await;
}
