//! `DATABASE_URL` is parsed as libpq parses it, or rejected without revealing any part of the
//! password.
//!
//! `psql`, which uses libpq, and the service connect to a server that records their messages.

use std::{collections::BTreeMap, env, fs};

use futures_util::future::join_all;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, UnixListener},
    sync::mpsc,
    time::{Duration, sleep, timeout},
};

use crate::harness::{DataDir, Process, SECRET};

/// The messages of a client before it was rejected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Startup {
    transport: &'static str,
    tls_requested: bool,
    /// `user`, `database` and so on; empty if the client disconnected before it sent them.
    parameters: BTreeMap<String, String>,
    password: Option<String>,
}

/// A server on loopback and a unix socket that requests a password and rejects it.
struct Listener {
    port: u16,
    directory: DataDir,
    received: mpsc::UnboundedReceiver<Startup>,
}

impl Listener {
    async fn start() -> Listener {
        let (sender, received) = mpsc::unbounded_channel();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        // Fails if the port is in use or IPv6 is unavailable.
        let second = TcpListener::bind(("::1", port)).await.ok();
        let directory = DataDir::new();
        let path = directory.parent().join(format!(".s.PGSQL.{port}"));
        let socket = UnixListener::bind(path).unwrap();
        for (listener, transport) in [(Some(listener), "IPv4"), (second, "IPv6")] {
            let Some(listener) = listener else { continue };
            let sender = sender.clone();
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let _ = sender.send(reject(stream, transport).await);
                }
            });
        }
        tokio::spawn(async move {
            while let Ok((stream, _)) = socket.accept().await {
                let _ = sender.send(reject(stream, "unix").await);
            }
        });
        Listener {
            port,
            directory,
            received,
        }
    }

    fn url(&self, template: &str) -> String {
        let directory = self.directory.parent().to_str().unwrap();
        template
            .replace("PORT", &self.port.to_string())
            .replace("ENCODED", &directory.replace('/', "%2F"))
            .replace("DIRECTORY", directory)
    }

    /// Connects with `psql` and returns its error message.
    async fn psql(&self, url: &str) -> String {
        let output = tokio::process::Command::new("psql")
            .args(["--no-password", "--no-psqlrc", "--dbname", url])
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.directory.parent())
            .output()
            .await
            .expect("psql, which comes with PostgreSQL");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Connects with `todo-api check` and returns its output.
    async fn service(&self, url: &str) -> String {
        let variables = [("DATABASE_URL", url), ("JWT_SECRET", SECRET)];
        let process = Process::spawn(&["check"], &variables);
        assert_eq!(process.ended().await.code(), Some(1), "{url}");
        process.output() + &process.log()
    }

    /// Returns the messages of a client, which may arrive after it has exited.
    async fn received(&mut self) -> Option<Startup> {
        timeout(Duration::from_secs(10), self.received.recv())
            .await
            .ok()
            .flatten()
    }
}

async fn reject(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    transport: &'static str,
) -> Startup {
    let mut startup = Startup {
        transport,
        ..Startup::default()
    };
    let _ = read_startup(&mut stream, &mut startup).await;
    startup
}

async fn read_startup(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    startup: &mut Startup,
) -> std::io::Result<()> {
    const TLS: u32 = 80_877_103;
    const GSS: u32 = 80_877_104;
    let packet = loop {
        let packet = read_packet(stream).await?;
        match u32::from_be_bytes(packet[..4].try_into().unwrap()) {
            TLS => startup.tls_requested = true,
            GSS => {}
            _ => break packet,
        }
        stream.write_all(b"N").await?;
    };
    let texts: Vec<String> = packet[4..]
        .split(|byte| *byte == 0)
        .map(|text| String::from_utf8_lossy(text).into_owned())
        .collect();
    startup.parameters = texts
        .chunks_exact(2)
        .map(|pair| (pair[0].clone(), pair[1].clone()))
        .collect();
    // AuthenticationCleartextPassword
    stream.write_all(b"R\0\0\0\x08\0\0\0\x03").await?;
    if stream.read_u8().await? == b'p' {
        let packet = read_packet(stream).await?;
        let text = String::from_utf8_lossy(&packet).into_owned();
        startup.password = Some(text.trim_end_matches('\0').to_owned());
    }
    let fields = b"SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed\0\0";
    stream.write_all(b"E").await?;
    stream.write_u32(4 + fields.len() as u32).await?;
    stream.write_all(fields).await?;
    stream.shutdown().await
}

async fn read_packet(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Vec<u8>> {
    let length = stream.read_u32().await? as usize;
    let mut packet = vec![0; length - 4];
    stream.read_exact(&mut packet).await?;
    Ok(packet)
}

/// Removes the parameters that may differ between the clients, and fills in defaults.
fn comparable(startup: Option<Startup>, url: &str) -> Option<Startup> {
    let mut startup = startup?;
    let parameters = &mut startup.parameters;
    if let Some(user) = parameters.get("user").cloned() {
        parameters.entry("database".to_owned()).or_insert(user);
    }
    if !url.contains("?application_name") {
        parameters.remove("application_name");
    }
    parameters.remove("client_encoding");
    parameters.retain(|name, _| !name.is_empty());
    Some(startup)
}

#[tokio::test]
async fn parses_urls_as_libpq_does() {
    let urls = [
        "postgres://ann:hunter2@127.0.0.1:PORT/todo",
        "postgresql://ann:hunter2@127.0.0.1:PORT/todo",
        "postgres://ann:hunter2@localhost:PORT/todo",
        "postgres://ann:%40%2F%3F%23%25%3A%20hunter2@127.0.0.1:PORT/todo",
        "postgres://ann:p%C3%A4ss@127.0.0.1:PORT/todo",
        "postgres://ann:päss@127.0.0.1:PORT/todo",
        "postgres://ann:hun:ter2@127.0.0.1:PORT/todo",
        "postgres://ann:hun#ter2@127.0.0.1:PORT/todo",
        r"postgres://ann:h'u\n\'ter2@127.0.0.1:PORT/todo",
        "postgres://ann:h&=+$!*;,()[]^`|<>{}~ter2@127.0.0.1:PORT/todo",
        "postgres://ann@127.0.0.1:PORT/todo",
        "postgres://ann:@127.0.0.1:PORT/todo",
        "postgres://:hunter2@127.0.0.1:PORT/todo",
        "postgres://127.0.0.1:PORT/todo",
        "postgres://@127.0.0.1:PORT/todo",
        "postgres://ann%40tenant:hunter2@127.0.0.1:PORT/todo",
        "postgres://ann@127.0.0.1:PORT",
        "postgres://ann@127.0.0.1:PORT/",
        "postgres://ann@127.0.0.1:PORT?sslmode=disable",
        "postgres://ann@127.0.0.1:PORT/?sslmode=disable",
        "postgres://ann@127.0.0.1:PORT/to%2Fdo%3F",
        "postgres://ann@127.0.0.1:PORT/todo#main",
        "postgres://ann@127.0.0.1:PORT/to/do",
        "postgres://ann@127.0.0.1:PORT/todo?",
        "postgres://ann@127.0.0.1:PORT/todo?sslmode=disable&",
        "postgres://ann@127.0.0.1:PORT/todo?sslmode=prefer",
        "postgres://ann@127.0.0.1:PORT/todo?sslmode=require",
        "postgres://ann@127.0.0.1:PORT/todo?ssl=true",
        "postgres://ann@127.0.0.1:PORT/todo?sslmode=require&sslmode=disable",
        "postgres://ann@127.0.0.1:PORT/todo?%73slmode=d%69sable",
        "postgres:///todo?host=127.0.0.1&port=PORT&user=ann&password=hunter2",
        "postgres://bob:other@127.0.0.2:1/none?host=127.0.0.1&port=PORT&user=ann&dbname=todo&password=hunter2",
        "postgres://ann@db.example:PORT/todo?hostaddr=127.0.0.1",
        "postgres://ann@:PORT/todo?hostaddr=127.0.0.1",
        "postgres://ann@[::1]:PORT/todo",
        "postgres://ann:hunter2@ENCODED:PORT/todo",
        "postgres://ann:hunter2@ENCODED:PORT/todo?sslmode=require",
        "postgres://ann:hunter2@/todo?host=DIRECTORY&port=PORT",
        "postgres:///todo?host=ENCODED&port=PORT&user=ann",
        "postgres://ann:hunter2@127.0.0.1:1,127.0.0.1:PORT/todo",
        "postgres://ann:hunter2@[::1]:1,127.0.0.1:PORT/todo",
        "postgres://ann:hunter2@127.0.0.9,127.0.0.1/todo?port=PORT",
        "postgres://ann:hunter2@ENCODED:1,127.0.0.1:PORT/todo?sslmode=disable",
        "postgres://ann@127.0.0.1:PORT/todo?application_name=a%20name&connect_timeout=9",
        "postgres://ann@127.0.0.1:PORT/todo?options=endpoint%3Dep-1%20-csearch_path%3Dtodo",
        "postgres://ann@127.0.0.1:PORT/todo?keepalives=1&keepalives_idle=9&keepalives_interval=9&keepalives_count=9&tcp_user_timeout=9000",
        "postgres://ann@127.0.0.1:PORT/todo?target_session_attrs=read-write&channel_binding=prefer",
        "postgres://ann@127.0.0.1:PORT/todo?target_session_attrs=primary",
        "postgres://ann@127.0.0.1:PORT/todo?gssencmode=disable&krbsrvname=a&client_encoding=UTF8&sslsni=1&sslcompression=0",
        "postgres://ann@127.0.0.1:PORT/todo?fallback_application_name=a",
    ];
    let compared = urls.map(async |template| {
        let mut listener = Listener::start().await;
        let url = listener.url(template);
        let libpq_output = listener.psql(&url).await;
        let libpq = comparable(listener.received().await, template);
        let output = listener.service(&url).await;
        let ours = listener.received().await;
        if libpq.is_some() && libpq == comparable(ours.clone(), template) {
            return None;
        }
        Some(format!(
            "{template}\nlibpq: {libpq:?} {libpq_output}\nours: {ours:?} {output}"
        ))
    });
    let differences: Vec<String> = join_all(compared).await.into_iter().flatten().collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[tokio::test]
async fn accepts_parameters_of_other_tools() {
    let mut listener = Listener::start().await;
    let url = listener.url(
        "postgres://ann:hunter2@127.0.0.1:PORT/todo?pgbouncer=true&connection_limit=5&pool_timeout=9\
         &schema=public&statement_cache_size=0&supa=base-pooler.x&prepareThreshold=0&pool=5\
         &uselibpqcompat=true&gssencmode=disable",
    );
    let output = listener.service(&url).await;
    let received = listener
        .received()
        .await
        .unwrap_or_else(|| panic!("{output}"));
    assert_eq!(received.parameters["user"], "ann", "{output}");
    assert_eq!(received.password.as_deref(), Some("hunter2"), "{output}");
}

/// A URL that is rejected.
struct Rejected {
    url: &'static str,
    /// Part of the error message.
    message: &'static str,
    /// Whether libpq rejects it as well.
    libpq: bool,
}

#[tokio::test]
async fn rejects_ambiguous_urls_without_revealing_the_password() {
    const ENCODE: &str = "percent-encode the password";
    let rejected = |message, libpq| {
        move |url| Rejected {
            url,
            message,
            libpq,
        }
    };
    let encode = [
        "postgres://ann:hun/ter2@127.0.0.1:PORT/todo",
        "postgres://ann:hun%ter2@127.0.0.1:PORT/todo",
        "postgres://ann:hunter2%@127.0.0.1:PORT/todo",
        "postgres://ann:hunter2%4@127.0.0.1:PORT/todo",
        "postgres://ann:hunter2%00@127.0.0.1:PORT/todo",
        "postgres://ann:80/hunter2@127.0.0.1:PORT/todo",
        "postgres://ann:80/?hun=ter2@127.0.0.1:PORT/todo",
        "postgres://ann@127.0.0.1:PORT/todo?password=hun&ter2",
        "postgres://ann@127.0.0.1:PORT/todo?password=hun&ter2=x",
        "postgres://ann@127.0.0.1:PORT/todo?password=hun=ter2",
    ];
    // libpq, or an older version of it, misinterprets these passwords.
    let service_only = [
        "postgres://ann:hun@ter2@127.0.0.1:PORT/todo",
        "postgres://ann:hunter2@@127.0.0.1:PORT/todo",
        "postgres://ann:@hunter2@127.0.0.1:PORT/todo",
        "postgres://ann:hun?ter2@127.0.0.1:PORT/todo?sslmode=require",
        "postgres://ann:hun?sslmode=disable&ter2@127.0.0.1:PORT/todo",
        "postgres://ann:1@hun/ter2@127.0.0.1:PORT/todo",
        "postgres://ann:1@hun?ter2@127.0.0.1:PORT/todo",
        "postgres://127.0.0.1:PORT?user=ann&password=hun@ter2",
        "postgres://ann@127.0.0.1:PORT/todo?password=hun@ter2",
        "postgres://ann%3Ahunter2%40127.0.0.1/todo",
        "postgres://ann:hun ter2@127.0.0.1:PORT/todo",
        "postgres://ann:hunter2%E4@127.0.0.1:PORT/todo",
    ];
    let others = [
        ("hunter2", "must be a URL", true),
        (
            "mysql://ann:hunter2@127.0.0.1:PORT/todo",
            "must be a URL",
            true,
        ),
        (
            "host=127.0.0.1 port=PORT user=ann password=hunter2",
            "must be a URL",
            false,
        ),
        ("postgres://ann:hunter2", "port", true),
        ("postgres://ann:hunter2@127.0.0.1:port/todo", "port", true),
        ("postgres://ann:hunter2@127.0.0.1:0/todo", "port", true),
        ("postgres://ann:hunter2@127.0.0.1:70000/todo", "port", true),
        ("postgres://ann:hunter2@[::1:PORT/todo", "IPv6", true),
        ("postgres://ann:hunter2@[::1]PORT/todo", "IPv6", true),
        ("postgres://ann:hunter2@/todo", "no host", false),
        ("postgres://ann:hunter2@127.0.0.1,/todo", "no host", false),
        (
            "postgres://ann:hunter2@127.0.0.1,127.0.0.2,127.0.0.3/todo?port=1,PORT",
            "ports",
            true,
        ),
        (
            "postgres://ann:hunter2@127.0.0.1:PORT/todo?sslmode=sometimes",
            "sslmode",
            true,
        ),
        (
            "postgres://ann:hunter2@127.0.0.1:PORT/todo?sslmode=",
            "sslmode",
            true,
        ),
        (
            "postgres://ann:hunter2@127.0.0.1:PORT/todo?sslmode=prefer&sslrootcert=system",
            "verify-full",
            false,
        ),
        (
            "postgres://ann:hunter2@127.0.0.1:PORT/todo?sslmode=disable&sslrootcert=/no/file",
            "/no/file",
            false,
        ),
        (
            "postgres://ann:hunter2@127.0.0.1:PORT/todo?sslcert=/no/file",
            "sslcert",
            false,
        ),
        (
            "postgres://ann:hunter2@127.0.0.1:PORT/todo?require_auth=none",
            "require_auth",
            false,
        ),
        (
            "postgres://ann:hunter2@127.0.0.1:PORT/todo?colour=blue",
            "colour",
            true,
        ),
        (
            "postgres://ann:hunter2@127.0.0.1:PORT/todo?Sslmode=require",
            "Sslmode",
            true,
        ),
        (
            "postgres://ann:hunter2@127.0.0.1:PORT/todo?schema=todo",
            "search_path",
            true,
        ),
        (
            "postgres://ann:hunter2@127.0.0.1:PORT/todo?connect_timeout=soon",
            "connect_timeout",
            false,
        ),
        (
            "postgres://ann:hunter2@127.0.0.1:PORT/todo?tcp_user_timeout=soon",
            "tcp_user_timeout",
            true,
        ),
        (
            "postgres://ann:hunter2@127.0.0.1:PORT/todo?target_session_attrs=standby",
            "target_session_attrs",
            false,
        ),
    ];
    let cases = encode
        .map(rejected(ENCODE, true))
        .into_iter()
        .chain(service_only.map(rejected(ENCODE, false)))
        .chain(others.map(|(url, message, libpq)| rejected(message, libpq)(url)));
    let results = cases.map(async |case| {
        let mut listener = Listener::start().await;
        let url = listener.url(case.url);
        let variables = [("DATABASE_URL", &*url), ("JWT_SECRET", SECRET)];
        let process = Process::spawn(&["check"], &variables);
        let code = process.ended().await.code();
        let output = process.output() + &process.log();
        let contains = |part: &str| output.contains(part);
        if case.libpq {
            listener.psql(&url).await;
        }
        sleep(Duration::from_millis(100)).await;
        let received = listener.received.try_recv().ok();
        let is_expected = code == Some(1)
            && received.is_none()
            && output.lines().count() == 1
            && contains("DATABASE_URL")
            && contains(case.message)
            && !["hun", "ter2", "80"].into_iter().any(contains);
        (!is_expected).then(|| format!("{}: {code:?} {received:?} {output}", case.url))
    });
    let failures: Vec<String> = join_all(results).await.into_iter().flatten().collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[tokio::test]
async fn exits_if_the_server_requires_a_password_that_the_url_lacks() {
    let listener = Listener::start().await;
    let url = listener.url("postgres://ann@127.0.0.1:PORT/todo");
    let variables = [
        ("DATABASE_URL", &*url),
        ("JWT_SECRET", SECRET),
        ("LISTEN_ADDR", "127.0.0.1:0"),
    ];
    let process = Process::spawn(&[], &variables);
    assert_eq!(process.ended().await.code(), Some(1));
    let location = listener.url("DATABASE_URL (127.0.0.1:PORT/todo)");
    let log = process.log();
    assert!(
        log.contains(&location) && log.contains("password missing"),
        "{log}"
    );
}

#[tokio::test]
async fn a_missing_root_certificate_file_is_always_an_error() {
    let directory = DataDir::new();
    let empty = directory.parent().join("empty.pem");
    fs::write(&empty, "").unwrap();
    for path in ["/no/such/file", empty.to_str().unwrap()] {
        for variables in [
            [("DATA_DIR", directory.text()), ("PGSSLROOTCERT", path)],
            [
                (
                    "DATABASE_URL",
                    "postgres://ann@127.0.0.1:1/todo?sslmode=disable",
                ),
                ("PGSSLROOTCERT", path),
            ],
            [
                (
                    "DATABASE_URL",
                    "postgres://ann@127.0.0.1:1/todo?sslrootcert=system",
                ),
                ("PGSSLROOTCERT", path),
            ],
        ] {
            let process = Process::spawn(&[], &variables);
            assert_eq!(process.ended().await.code(), Some(1), "{variables:?}");
            let log = process.log();
            assert!(log.contains("PGSSLROOTCERT") && log.contains(path), "{log}");
        }
    }
    assert!(!directory.path().exists());
}
