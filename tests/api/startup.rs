//! Startup and shutdown: the log, invalid settings, and a database that is unavailable or rejects the
//! service.

use std::{
    fs,
    net::TcpListener,
    process::{Command, Stdio},
    time::Duration,
};

use futures_util::future::join_all;
use rustix::process::Signal;
use todo_api::embedded_postgres::Postgres;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use tokio_postgres::error::SqlState;

use crate::harness::{DataDir, Database, Process, SECRET, Server, until};

/// Asserts that the service fails to start, and returns the only line that it prints.
async fn startup_error(variables: &[(&str, &str)]) -> String {
    let process = Process::spawn(&[], variables);
    let status = process.ended().await;
    let log = process.log();
    assert!(
        status.code().is_some_and(|code| code != 0),
        "{status} with {variables:?}:\n{log}"
    );
    assert_eq!(log.lines().count(), 1, "{variables:?}:\n{log}");
    assert_eq!(process.output(), "", "{variables:?}");
    log.trim_end().to_owned()
}

/// Asserts that the service fails to start, and returns the last line that it prints.
async fn last_error(variables: &[(&str, &str)]) -> String {
    let process = Process::spawn(&[], variables);
    let status = process.ended().await;
    let log = process.log();
    assert!(
        status.code().is_some_and(|code| code != 0),
        "{status} with {variables:?}:\n{log}"
    );
    log.lines().last().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn startup_logs_end_with_the_addresses_and_the_data_directory() {
    let directory = DataDir::initialized().await;
    let server = Server::with(&[("DATA_DIR", directory.text())]).await;
    server.wait_for_log("/docs").await;
    let log = server.log();
    let lines: Vec<&str> = log.lines().collect();
    let last = &lines[lines.len() - 3..];
    for part in [
        &*format!("http://{}", server.addr()),
        directory.text(),
        "/docs",
    ] {
        assert!(
            last.iter().any(|line| line.contains(part)),
            "{part}:\n{log}"
        );
    }
}

#[tokio::test]
async fn startup_logs_contain_no_secret() {
    let directory = DataDir::initialized().await;
    let server = Server::with(&[("DATA_DIR", directory.text())]).await;
    let secret = fs::read_to_string(directory.path().join("jwt-secret")).unwrap();
    assert!(!server.log().contains(secret.trim()));
    let server = Server::start().await;
    assert!(!server.log().contains(SECRET));
}

#[tokio::test]
async fn reports_a_port_in_use() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let database = Database::create().await;
    let line = startup_error(&[
        ("LISTEN_ADDR", &addr),
        ("DATABASE_URL", &database.url()),
        ("JWT_SECRET", SECRET),
    ])
    .await;
    assert!(line.contains(&addr), "{line}");
}

#[tokio::test]
async fn reports_the_name_of_an_invalid_variable() {
    let secret = "thirty-one bytes, one too few!!";
    assert_eq!(secret.len(), 31);
    let nowhere = "/nowhere/at-all";
    let cases = [
        ("DATABASE_URL", "mysql://ann:hunter2@db.example/todo"),
        (
            "DATABASE_URL",
            "postgres://ann:hunter2@db.example/todo?sslmode=sometimes",
        ),
        (
            "DATABASE_URL",
            "postgres://ann:hunter2@db.example:port/todo",
        ),
        ("DATABASE_URL", "hunter2"),
        ("DATABASE_URL_FILE", nowhere),
        ("DATA_DIR", "/dev/null"),
        ("JWT_SECRET", secret),
        ("JWT_SECRET_FILE", nowhere),
        ("JWT_SECRET_PREVIOUS", secret),
        ("JWT_SECRET_PREVIOUS_FILE", nowhere),
        ("LISTEN_ADDR", "8000"),
        ("LISTEN_ADDR", "127.0.0.1:80000"),
        ("METRICS_ADDR", "somewhere"),
        ("CORS_ORIGINS", "app.example.com"),
        ("CORS_ORIGINS", "https://app.example.com,*"),
        ("CORS_ORIGINS", "https://app.example.com/path"),
        ("CORS_ORIGINS", "https://*.example.com"),
        ("CORS_ORIGINS", "*"),
        ("CORS_ORIGINS", "null"),
        ("CORS_ORIGINS", "localhost:5173"),
        ("CORS_ORIGINS", "https:app.example.com"),
        ("CORS_ORIGINS", "//app.example.com"),
        ("CORS_ORIGINS", "https://app.example.com?q"),
        ("CORS_ORIGINS", "https://app.example.com#f"),
        ("CORS_ORIGINS", "https://app.example.com//"),
        ("CORS_ORIGINS", "https://ann:hunter2@app.example.com"),
        ("CORS_ORIGINS", "https://app.example.com:65536"),
        ("CORS_ORIGINS", "https://app.example.com:+443"),
        ("CORS_ORIGINS", "https://bücher.example"),
        ("CORS_ORIGINS", "https://a.example https://b.example"),
        ("CORS_ORIGINS", "https://a.example;https://b.example"),
        ("CORS_ORIGINS", "https://"),
        ("CORS_ORIGINS", "https://.example.com"),
        ("CORS_ORIGINS", "https://app%2eexample.com"),
        ("CORS_ORIGINS", "http://127.1"),
        ("CORS_ORIGINS", "http://0x7f.0.0.1"),
        ("CORS_ORIGINS", "http://[::1"),
        ("CORS_ORIGINS", "http://::1"),
        ("CORS_ORIGINS", "file://"),
        ("CORS_ORIGINS", "wss://app.example.com"),
        ("CORS_ORIGINS", "capacitor://"),
        ("CORS_ORIGINS", "'https://app.example.com'"),
        ("TRUSTED_PROXIES", "10.0.0.0/33"),
        ("TRUSTED_PROXIES", "proxy.example"),
        ("DB_POOL_SIZE", "0"),
        ("DB_POOL_SIZE", "21"),
        ("DB_POOL_SIZE", "many"),
        ("REGISTRATION", "ajar"),
        ("AUTH_RATE_PER_MINUTE", "-1"),
        ("WRITES_PER_MINUTE", "2.5"),
        ("MAX_TASKS_PER_USER", "0"),
        ("BCRYPT_COST", "9"),
        ("BCRYPT_COST", "17"),
        ("ACCESS_TOKEN_TTL", "0"),
        ("ACCESS_TOKEN_TTL", "1h"),
        ("REFRESH_TOKEN_IDLE_TTL", "-5"),
        ("REFRESH_TOKEN_MAX_TTL", "1e9"),
        ("REFRESH_TOKEN_GRACE", "ten"),
    ];
    let directory = DataDir::new();
    let runs = cases.map(|(name, value)| {
        let directory = directory.text();
        async move {
            // The last value overrides an earlier one of the same name.
            let variables = [
                ("LISTEN_ADDR", "127.0.0.1:0"),
                ("DATA_DIR", directory),
                (name, value),
            ];
            let line = startup_error(&variables).await;
            assert!(line.contains(name), "{name}={value}: {line}");
            assert!(
                !line.contains("hunter2") && !line.contains(secret),
                "the line contains a secret: {line}"
            );
        }
    });
    join_all(runs).await;
    assert!(
        !directory.path().join("cluster").exists(),
        "PostgreSQL was started before the settings were read"
    );
}

#[tokio::test]
async fn rejects_log_filters_that_are_invalid_or_hide_errors() {
    let directory = DataDir::new();
    let filters = [
        "info,access=loud",
        "warning",
        "access",
        "todo_api",
        "info,acess",
        "access=debug",
        "off,access=debug",
        "todo_api=off",
    ];
    join_all(filters.map(|filter| async move {
        let line = startup_error(&[("RUST_LOG", filter), ("LISTEN_ADDR", "127.0.0.1:0")]).await;
        assert!(line.contains("RUST_LOG"), "{filter}: {line}");
    }))
    .await;
    for filter in ["warn", "OFF", "error,access=debug", "todo_api=debug"] {
        let process = Process::spawn(
            &["check"],
            &[("RUST_LOG", filter), ("DATA_DIR", directory.text())],
        );
        let status = process.ended().await;
        assert_eq!(status.code(), Some(0), "{filter}: {}", process.log());
    }
}

#[tokio::test]
async fn fatal_errors_have_error_priority_in_the_journal() {
    let directory = DataDir::new();
    let cases: [(&[&str], (&str, &str)); 4] = [
        (&["--dance"], ("LISTEN_ADDR", "127.0.0.1:0")),
        (&[], ("BCRYPT_COST", "9")),
        (&[], ("DATA_DIR", "/dev/null")),
        (
            &["user", "set-password", "ann@example.com"],
            ("RUST_LOG", "off"),
        ),
    ];
    for (arguments, variable) in cases {
        for (stream, is_journal) in [("stderr", true), ("8:12345", false)] {
            let variables = [
                ("JOURNAL_STREAM", stream),
                ("LISTEN_ADDR", "127.0.0.1:0"),
                ("DATA_DIR", directory.text()),
                variable,
            ];
            let process = Process::spawn(arguments, &variables);
            assert_ne!(process.ended().await.code(), Some(0));
            let log = process.log();
            assert_eq!(log.lines().count(), 1, "{arguments:?}: {log}");
            assert_eq!(log.starts_with("<3>"), is_journal, "{arguments:?}: {log}");
        }
    }
}

#[tokio::test]
async fn requires_a_jwt_secret_with_a_database_url() {
    let line = startup_error(&[("DATABASE_URL", "postgres://ann:hunter2@127.0.0.1/todo")]).await;
    assert!(
        line.contains("JWT_SECRET") && !line.contains("hunter2"),
        "{line}"
    );
}

#[tokio::test]
async fn accepts_a_secret_of_32_bytes() {
    let secret = "x".repeat(32);
    let server = Server::with(&[("JWT_SECRET", &secret)]).await;
    server.user().await;
}

#[tokio::test]
async fn reads_secrets_from_files() {
    let directory = DataDir::new();
    let database = Database::create().await;
    let (url, secret) = (
        directory.parent().join("url"),
        directory.parent().join("secret"),
    );
    fs::write(&url, database.url() + "\n").unwrap();
    fs::write(&secret, format!("{SECRET}\n")).unwrap();
    let process = Process::spawn(
        &[],
        &[
            ("DATABASE_URL_FILE", url.to_str().unwrap()),
            ("JWT_SECRET_FILE", secret.to_str().unwrap()),
            ("LISTEN_ADDR", "127.0.0.1:0"),
        ],
    );
    process.listening().await;
    assert_eq!(process.stop().await.code(), Some(0), "{}", process.log());
}

#[tokio::test]
async fn exits_if_the_database_rejects_the_password() {
    let directory = DataDir::initialized().await;
    let postgres = Postgres::start(directory.path()).await.unwrap();
    let (client, connection) = postgres
        .config()
        .connect(tokio_postgres::NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    client
        .batch_execute("create role ann login password 'the right one'")
        .await
        .unwrap();
    let rules = directory.path().join("pg_hba.conf");
    let own = fs::read_to_string(&rules).unwrap();
    fs::write(&rules, format!("local all ann scram-sha-256\n{own}")).unwrap();
    client
        .batch_execute("select pg_reload_conf()")
        .await
        .unwrap();
    let url = directory.database_url().replace("todo@", "ann:hunter2@");
    // The postmaster reloads asynchronously.
    until("the rules are in effect", async || {
        let refused = tokio_postgres::connect(&url, tokio_postgres::NoTls).await;
        refused.is_err_and(|error| error.code() == Some(&SqlState::INVALID_PASSWORD))
    })
    .await;

    let line = last_error(&[
        ("DATABASE_URL", &url),
        ("JWT_SECRET", SECRET),
        ("LISTEN_ADDR", "127.0.0.1:0"),
    ])
    .await;
    assert!(line.contains("password authentication failed"), "{line}");
    let address = format!("{}:5432/todo", directory.path().join("socket").display());
    assert!(
        line.contains("DATABASE_URL") && line.contains(&address),
        "{line}"
    );
    assert!(!line.contains("hunter2"), "{line}");
    postgres.stop().await;
}

#[tokio::test]
async fn exits_if_the_database_does_not_exist() {
    let database = Database::create().await;
    let url = database.url().replace("/test_", "/no_");
    let line = last_error(&[
        ("DATABASE_URL", &url),
        ("JWT_SECRET", SECRET),
        ("LISTEN_ADDR", "127.0.0.1:0"),
    ])
    .await;
    assert!(line.contains("does not exist"), "{line}");
    assert!(
        line.contains("DATABASE_URL") && line.contains("/no_"),
        "{line}"
    );
}

#[tokio::test]
async fn exits_if_the_database_lacks_the_required_tls() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            // A server without TLS rejects the SSLRequest with N.
            let mut request = [0; 8];
            let _ = stream.read_exact(&mut request).await;
            let _ = stream.write_all(b"N").await;
        }
    });
    let url = format!("postgres://ann:hunter2@{addr}/todo?sslmode=require");
    let line = last_error(&[
        ("DATABASE_URL", &url),
        ("JWT_SECRET", SECRET),
        ("LISTEN_ADDR", "127.0.0.1:0"),
    ])
    .await;
    assert!(line.contains("TLS"), "{line}");
    let subject = format!("DATABASE_URL ({addr}/todo)");
    assert!(line.contains(&subject), "{line}");
    assert!(!line.contains("hunter2"), "{line}");
}

#[tokio::test]
async fn waits_for_an_unavailable_database() {
    let directory = DataDir::initialized().await;
    let server = Server::listening(&[("DATABASE_URL", &directory.database_url())]).await;
    server.wait_for_log("waiting for the database").await;
    server.get("/healthz").await.expect(200);
    server.get("/readyz").await.expect(503);
    let early = server
        .post("/api/v1/auth/login")
        .json(serde_json::json!({"email": "a@b", "password": "c"}));
    early.await.problem(503, "database_unavailable");

    let postgres = Postgres::start(directory.path()).await.unwrap();
    until("the service is ready", async || {
        server.get("/readyz").await.status == 200
    })
    .await;
    let user = server.user().await;
    user.create_task("a task").await;
    assert_eq!(server.stop().await.code(), Some(0));
    postgres.stop().await;
}

#[tokio::test]
async fn stops_while_waiting_for_the_database() {
    let directory = DataDir::new();
    let server = Server::listening(&[("DATABASE_URL", &directory.database_url())]).await;
    server.wait_for_log("waiting for the database").await;
    assert_eq!(server.stop().await.code(), Some(0), "{}", server.log());
}

#[tokio::test]
async fn five_instances_can_start_concurrently_on_an_empty_database() {
    let database = Database::create().await;
    let url = database.url();
    let variables = [("DATABASE_URL", url.as_str())];
    let servers = join_all((0..5).map(|_| Server::with(&variables))).await;
    let user = servers[0].user().await;
    for server in &servers {
        user.on(server).create_task("one of five").await;
    }
    let list = user.on(&servers[4]).get(user.tasks()).await.expect(200);
    assert_eq!(list.json().as_array().map(Vec::len), Some(5));
}

#[tokio::test]
async fn a_restart_keeps_the_data() {
    let server = Server::start().await;
    let user = server.user().await;
    let task = user.create_task("still here").await;
    assert_eq!(server.stop().await.code(), Some(0));
    let server = server.sibling(&[]).await;
    let list = user.on(&server).get(user.tasks()).await.expect(200);
    assert_eq!(list.json(), serde_json::json!([task]));
}

#[tokio::test]
async fn shuts_down_gracefully_on_each_signal() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let server = Server::start().await;
        server.user().await;
        server.signal(signal);
        assert_eq!(server.ended().await.code(), Some(0), "{}", server.log());
    }
}

#[tokio::test]
async fn survives_sighup_under_nohup() {
    if !cfg!(target_os = "linux") {
        return;
    }
    let database = Database::create().await;
    let mut command = Command::new("nohup");
    command
        .arg(env!("CARGO_BIN_EXE_todo-api"))
        .stdin(Stdio::null());
    let process = Process::run(
        command,
        &[
            ("DATABASE_URL", &database.url()),
            ("JWT_SECRET", SECRET),
            ("LISTEN_ADDR", "127.0.0.1:0"),
        ],
    );
    process.listening().await;
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = u64::from_str_radix(ignored.unwrap().trim(), 16).unwrap();
    assert_eq!(ignored & 1, 1, "SIGHUP is no longer ignored");
    process.signal(Signal::HUP);
    assert_eq!(process.stop().await.code(), Some(0), "{}", process.log());
}

#[tokio::test]
async fn an_idle_connection_does_not_delay_shutdown() {
    let server = Server::start().await;
    let mut idle = tokio::net::TcpStream::connect(server.addr()).await.unwrap();
    idle.write_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    let mut response = [0; 1024];
    assert!(idle.read(&mut response).await.unwrap() > 0);
    // Running requests would be given ten seconds.
    timeout(Duration::from_secs(9), server.stop())
        .await
        .expect("shutdown waited for an idle connection");
}
