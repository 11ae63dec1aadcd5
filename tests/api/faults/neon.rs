//! Hosted databases such as Neon, which are suspended when idle, are behind a pooler, and require
//! TLS.

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
    Cluster, RECOVERY_TIMEOUT, RESPONSE_TIMEOUT, backends, connect_when_ready,
    load::{Client, Outcome},
    proxy::NetworkCondition,
    report, short_or_full, start_light_load,
};
use crate::harness::{DataDir, PASSWORD, Process, SECRET, Server, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_wake_a_suspended_database_succeed() {
    let _guard = start_light_load().await;
    let cluster = Cluster::proxied(&[("DB_POOL_SIZE", "8")]).await;
    let sql = cluster.sql().await;
    let credentials = cluster.credentials();
    let wake_time = Duration::from_secs(1);
    let rounds = short_or_full(2, 20);
    let mut slowest = Duration::ZERO;
    for round in 0..rounds {
        // A suspended database closes its connections.
        cluster
            .proxy()
            .set_condition(NetworkCondition::Suspended(wake_time));
        until("all connections are closed", async || {
            backends(&sql).await.is_empty()
        })
        .await;

        // Send more requests than there are connections.
        let start = Instant::now();
        let responses = (0..12).map(|number| {
            let mut client = Client::at(cluster.server.addr());
            let title = format!("number {number} of round {round}");
            let request = match number % 2 {
                0 => credentials.read(&cluster.task),
                _ => credentials.create(&title),
            };
            async move { client.send(request).await.outcome }
        });
        let outcomes = futures_util::future::join_all(responses).await;
        let duration = start.elapsed();
        assert!(duration < RESPONSE_TIMEOUT, "took {duration:?}");
        assert!(
            outcomes
                .iter()
                .all(|outcome| matches!(outcome, Outcome::Status(200 | 201))),
            "{outcomes:?}"
        );
        slowest = slowest.max(duration);
        cluster.proxy().set_condition(NetworkCondition::Normal);
    }
    assert!(slowest >= wake_time, "no request had to wait");
    report(
        "suspended",
        format!(
            "{rounds} × woken by 12 concurrent requests, all served, the slowest after {slowest:.1?}"
        ),
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn returns_503_until_a_slowly_waking_database_is_ready() {
    let _guard = start_light_load().await;
    let cluster = Cluster::proxied(&[]).await;
    // Longer than the timeout for acquiring a connection.
    let wake_time = Duration::from_secs(4);
    cluster
        .proxy()
        .set_condition(NetworkCondition::Suspended(2 * wake_time));
    let start = Instant::now();
    let mut rejected = 0;
    loop {
        let sent_at = Instant::now();
        let response = cluster.user.get(cluster.user.tasks()).await;
        let duration = sent_at.elapsed();
        assert!(duration < RESPONSE_TIMEOUT, "took {duration:?}");
        if response.status == 200 {
            break;
        }
        response.problem(503, "database_unavailable");
        response.header("retry-after");
        rejected += 1;
        assert!(
            start.elapsed() < wake_time + RECOVERY_TIMEOUT,
            "still unavailable"
        );
        if start.elapsed() > wake_time {
            cluster.proxy().set_condition(NetworkCondition::Normal);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    report(
        "waking slowly",
        format!(
            "{rejected} × 503 with Retry-After, served after {:.1?} with a wake time of {wake_time:?}",
            start.elapsed()
        ),
    );
    assert!(rejected > 0);
    cluster.stop().await;
}

/// Starts an embedded PostgreSQL with this `pg_hba.conf`.
async fn start_with_hba(directory: &DataDir, hba: &str, settings: &[(&str, &str)]) -> Postgres {
    let file = directory.parent().join("pg_hba.conf");
    fs::write(&file, hba).unwrap();
    let mut settings = settings.to_vec();
    settings.push(("hba_file", file.to_str().unwrap()));
    Postgres::start_with(directory.path(), &settings)
        .await
        .unwrap()
}

/// A PgBouncer in front of an embedded PostgreSQL. Killed on drop.
struct PgBouncer {
    child: Child,
    url: String,
}

impl PgBouncer {
    /// Returns `None` if PgBouncer is not installed.
    async fn start(directory: &DataDir, postgres: &Postgres, mode: &str) -> Option<PgBouncer> {
        let program = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer"]
            .into_iter()
            .find(|path| Path::new(path).exists())?;
        let parent = directory.parent();
        let port = {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.local_addr().unwrap().port()
        };
        let users = parent.join("users.txt");
        fs::write(&users, "\"todo\" \"\"\n").unwrap();
        let settings = parent.join(format!("{mode}.ini"));
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
        // PgBouncer refuses to run as root; the cluster's owner can access its socket.
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
async fn pgbouncer_in_session_mode_is_supported() {
    let directory = DataDir::initialized().await;
    let postgres = start_with_hba(&directory, "local all all trust\n", &[]).await;
    let Some(pooler) = PgBouncer::start(&directory, &postgres, "session").await else {
        return report(
            "PgBouncer in session mode",
            "SKIPPED: PgBouncer is not installed",
        );
    };
    let server = Server::with(&[("DATABASE_URL", &pooler.url)]).await;
    let user = server.user().await;
    let tasks = short_or_full(50, 1000);
    for number in 0..tasks {
        user.create_task(&format!("number {number}")).await;
    }
    let list = user.get(user.tasks()).await.expect(200);
    assert_eq!(list.json().as_array().map(Vec::len), Some(tasks));
    report(
        "PgBouncer in session mode",
        format!("{tasks} of {tasks} tasks created and listed"),
    );
    assert_eq!(server.stop().await.code(), Some(0), "{}", server.log());
    drop(pooler);
    postgres.stop().await;
}

#[tokio::test]
async fn rejects_a_pooler_without_prepared_statements_with_a_clear_error() {
    let directory = DataDir::initialized().await;
    let postgres = start_with_hba(&directory, "local all all trust\n", &[]).await;
    let Some(pooler) = PgBouncer::start(&directory, &postgres, "transaction").await else {
        return report(
            "PgBouncer in transaction mode",
            "SKIPPED: PgBouncer is not installed",
        );
    };
    let variables = [
        ("DATABASE_URL", pooler.url.as_str()),
        ("JWT_SECRET", SECRET),
        ("LISTEN_ADDR", "127.0.0.1:0"),
    ];
    let rounds = short_or_full(1, 50);
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
        "PgBouncer in transaction mode",
        format!("{rounds} × rejected: {line}"),
    );
    drop(pooler);
    postgres.stop().await;
}

/// Runs `openssl` in this directory.
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

/// Creates two certificate authorities, a server certificate for `db.example` signed by the first,
/// and a self-signed one.
fn create_certificates(directory: &Path) {
    const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
    for authority in ["ca", "other-ca"] {
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

/// A PostgreSQL that requires TLS and a password for TCP connections.
struct Tls {
    postgres: Postgres,
    directory: DataDir,
    certificates: PathBuf,
    address: String,
}

impl Tls {
    async fn start() -> Tls {
        let directory = DataDir::initialized().await;
        let certificates = directory.parent().join("certificates");
        fs::create_dir(&certificates).unwrap();
        create_certificates(&certificates);
        // Each instance gets its own loopback address, because all use the default port.
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let [_, high, middle, low] = std::process::id().to_be_bytes();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let address = format!("127.{}.{middle}.{low}", 32 * number + u32::from(high));

        let first = Postgres::start(directory.path()).await.unwrap();
        let sql = connect_when_ready(&first).await;
        sql.batch_execute(&format!(
            "create role ann login superuser password '{PASSWORD}'"
        ))
        .await
        .unwrap();
        first.stop().await;
        let cluster = directory.path().join("cluster");
        install_certificate(&certificates, &cluster, "server");
        let settings = [("listen_addresses", address.as_str()), ("ssl", "on")];
        let hba = "local all all trust\nhostssl all all 127.0.0.0/8 scram-sha-256\n";
        let postgres = start_with_hba(&directory, hba, &settings).await;
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

    /// Runs `todo-api check`; returns its exit code and output.
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

/// Installs a certificate and its key as the server's.
fn install_certificate(certificates: &Path, cluster: &Path, name: &str) {
    let owner = fs::metadata(cluster).unwrap();
    for (from, to) in [("pem", "server.crt"), ("key", "server.key")] {
        let to = cluster.join(to);
        fs::copy(certificates.join(format!("{name}.{from}")), &to).unwrap();
        fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).unwrap();
        chown(&to, Some(owner.uid()), Some(owner.gid())).unwrap();
    }
}

#[cfg(target_os = "linux")] // Other systems have a single loopback address.
#[tokio::test]
async fn tls_is_verified_as_sslmode_requires() {
    let tls = Tls::start().await;
    let (right, wrong) = ("db.example", "other.example");
    let (ca, other_ca) = (Some("ca.pem"), Some("other-ca.pem"));
    let accepted = [
        (right, "sslmode=require", ca),
        (right, "sslmode=verify-ca", ca),
        (right, "sslmode=verify-full", ca),
        // The chain is valid, and the name is not checked.
        (wrong, "sslmode=verify-ca", ca),
        (right, "sslmode=require&channel_binding=require", ca),
        (right, "sslmode=verify-full&channel_binding=require", ca),
        (wrong, "sslmode=prefer", None),
        (right, "channel_binding=prefer", None),
    ];
    let rejected = [
        (wrong, "sslmode=require", ca),
        (wrong, "sslmode=verify-full", ca),
        (right, "sslmode=require", other_ca),
        (right, "sslmode=verify-ca", other_ca),
        (right, "sslmode=verify-full", other_ca),
        // The system trusts neither authority.
        (right, "sslmode=require", None),
        (right, "sslmode=require&channel_binding=require", other_ca),
    ];
    for (host, options, authority) in accepted {
        let (code, output) = tls.check(host, options, authority).await;
        assert_eq!(code, 0, "{host} {options} {authority:?}: {output}");
        assert!(output.contains("TLS in use"), "{host} {options}: {output}");
    }
    let mut reasons = Vec::new();
    for (host, options, authority) in rejected {
        let (code, output) = tls.check(host, options, authority).await;
        assert_eq!(code, 1, "{host} {options} {authority:?}: {output}");
        assert!(!output.contains(PASSWORD), "{output}");
        let reason = output.lines().find(|line| line.contains("cannot be used"));
        let reason = reason.unwrap_or_else(|| panic!("{host} {options}: {output}"));
        assert!(reason.contains("certificate"), "{host} {options}: {reason}");
        reasons.push(reason.trim().to_owned());
    }

    // `pg_hba.conf` has no rule for connections without TLS.
    let (code, output) = tls.check(right, "sslmode=disable", None).await;
    assert_eq!(code, 1, "{output}");
    let (code, output) = tls
        .check(right, "sslmode=disable&channel_binding=require", None)
        .await;
    assert_eq!(code, 1, "{output}");

    // A self-signed certificate.
    install_certificate(
        &tls.certificates,
        &tls.directory.path().join("cluster"),
        "self",
    );
    let sql = connect_when_ready(&tls.postgres).await;
    sql.batch_execute("select pg_reload_conf()").await.unwrap();
    until("the new certificate is in use", async || {
        let (code, _) = tls.check(right, "sslmode=verify-full", ca).await;
        code == 1
    })
    .await;
    let (code, output) = tls.check(right, "sslmode=prefer", None).await;
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("TLS in use"), "{output}");
    report(
        "TLS",
        format!(
            "{} combinations accepted, {} rejected, such as: {}",
            accepted.len() + 1,
            rejected.len() + 3,
            reasons[0]
        ),
    );
    tls.postgres.stop().await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_service_runs_over_tls_and_exits_if_the_certificate_is_not_trusted() {
    let tls = Tls::start().await;
    let authority = tls.certificates.join("ca.pem");
    let authority = authority.to_str().unwrap();
    let url = tls.url("db.example", "sslmode=require&channel_binding=require");
    let server = Server::with(&[("DATABASE_URL", &url), ("PGSSLROOTCERT", authority)]).await;
    let user = server.user().await;
    for number in 0..20 {
        user.create_task(&format!("number {number}")).await;
    }
    let sql = connect_when_ready(&tls.postgres).await;
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
    report("TLS", format!("20 of 20 tasks created; wrong name: {line}"));
    tls.postgres.stop().await;
}
