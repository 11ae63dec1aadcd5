//! Zero set-up: without `DATABASE_URL` the service runs a PostgreSQL of its own, and nothing that
//! it acknowledged is lost, whoever is killed.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::Value;
use todo_api::embedded_postgres::{self, Postgres};

use crate::harness::{DataDir, Process, Server, User, is_alive, until};

async fn serve(directory: &DataDir) -> Server {
    Server::with(&[("DATA_DIR", directory.text())]).await
}

/// Somebody with one task, on a server of their own.
async fn start_with_a_task(directory: &DataDir) -> (Server, User, Value) {
    let server = serve(directory).await;
    let user = server.user().await;
    let task = user.create_task(&server, "water the ferns").await;
    (server, user, task)
}

/// The old token opens the door, the task is what it was, and another can be added.
async fn assert_all_there(server: &Server, user: &User, task: &Value) {
    let list = server
        .get(user.tasks())
        .bearer(&user.access_token)
        .send()
        .await
        .expect(200)
        .json();
    assert_eq!(list, Value::Array(vec![task.clone()]));
    let login = server.login(&user.email, &user.password).await;
    assert_eq!(login.id, user.id);
    let second = login.create_task(server, "and the moss").await;
    assert_eq!(second["user_id"], *user.id);
}

fn running_postgres(directory: &DataDir) -> Pid {
    directory.postgres().expect("no PostgreSQL runs")
}

#[tokio::test]
async fn one_directory_is_all_the_set_up_there_is() {
    let directory = DataDir::new();
    let (server, user, task) = start_with_a_task(&directory).await;
    assert_all_there(&server, &user, &task).await;
    assert_eq!(server.stop().await.code(), Some(0));
}

#[tokio::test]
async fn without_any_setting_the_data_goes_below_the_current_directory() {
    let directory = DataDir::named(".todo-api");
    // The port is the one thing that a test must choose.
    let process = Process::spawn_in(directory.parent(), &[], &[("LISTEN_ADDR", "127.0.0.1:0")]);
    process.listening().await;
    until("PostgreSQL runs", async || directory.postgres().is_some()).await;
    assert_eq!(process.stop().await.code(), Some(0), "{}", process.log());
    assert_eq!(directory.postgres(), None);
}

#[tokio::test]
async fn the_data_is_there_after_a_stop_and_a_start() {
    let directory = DataDir::new();
    let (server, user, task) = start_with_a_task(&directory).await;
    let postgres = running_postgres(&directory);
    assert_eq!(server.stop().await.code(), Some(0));
    assert!(!is_alive(postgres));
    assert_all_there(&serve(&directory).await, &user, &task).await;
}

#[tokio::test]
async fn the_data_is_there_after_the_service_was_killed() {
    let directory = DataDir::new();
    let (server, user, task) = start_with_a_task(&directory).await;
    let left = running_postgres(&directory);
    server.kill();
    assert!(is_alive(left), "nothing was left to pick up");
    let server = serve(&directory).await;
    assert!(!is_alive(left), "two PostgreSQL on one directory");
    assert_all_there(&server, &user, &task).await;
}

#[tokio::test]
async fn it_heals_when_its_postgres_is_killed() {
    let directory = DataDir::new();
    let (server, user, task) = start_with_a_task(&directory).await;
    for _ in 0..3 {
        let killed = running_postgres(&directory);
        kill_process(killed, Signal::KILL).unwrap();
        until("another PostgreSQL runs and serves", async || {
            directory
                .postgres()
                .is_some_and(|postgres| postgres != killed)
                && server
                    .get(user.tasks())
                    .bearer(&user.access_token)
                    .send()
                    .await
                    .status
                    == 200
        })
        .await;
    }
    assert_all_there(&server, &user, &task).await;
    let told = server
        .log()
        .lines()
        .filter(|line| line.contains("ended unexpectedly"))
        .count();
    assert_eq!(told, 3, "{}", server.log());
    assert_eq!(server.stop().await.code(), Some(0));
    assert_eq!(directory.postgres(), None);
}

#[tokio::test]
async fn the_data_is_there_after_both_were_killed() {
    let directory = DataDir::new();
    let (server, user, task) = start_with_a_task(&directory).await;
    let postgres = running_postgres(&directory);
    server.kill();
    kill_process(postgres, Signal::KILL).unwrap();
    assert_all_there(&serve(&directory).await, &user, &task).await;
}

#[tokio::test]
async fn a_stop_by_either_signal_leaves_no_postgres_behind() {
    let directory = DataDir::new();
    for signal in [Signal::TERM, Signal::INT] {
        let server = serve(&directory).await;
        let postgres = running_postgres(&directory);
        server.signal(signal);
        assert_eq!(server.ended().await.code(), Some(0), "{}", server.log());
        assert!(!is_alive(postgres));
    }
}

#[tokio::test]
async fn a_start_that_is_called_off_leaves_no_postgres_behind() {
    let directory = DataDir::new();
    let process = Process::spawn(
        &[],
        &[
            ("DATA_DIR", directory.text()),
            ("LISTEN_ADDR", "127.0.0.1:0"),
        ],
    );
    until("PostgreSQL is about to run", async || {
        directory.path().join("postgres.log").exists()
    })
    .await;
    assert_eq!(process.stop().await.code(), Some(0), "{}", process.log());
    until("PostgreSQL has ended", async || {
        directory.postgres().is_none()
    })
    .await;
}

#[tokio::test]
async fn an_interrupted_making_of_the_cluster_does_not_stick() {
    let directory = DataDir::new();
    let unfinished = || {
        fs::read_dir(directory.path())
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| {
                entry
                    .file_name()
                    .to_string_lossy()
                    .starts_with("cluster.unfinished")
            })
            .count()
    };
    let process = Process::spawn(
        &[],
        &[
            ("DATA_DIR", directory.text()),
            ("LISTEN_ADDR", "127.0.0.1:0"),
        ],
    );
    until("initdb is at work", async || unfinished() == 1).await;
    process.kill();
    assert!(!directory.path().join("cluster").exists());
    let (server, user, task) = start_with_a_task(&directory).await;
    assert_all_there(&server, &user, &task).await;
    assert_eq!(unfinished(), 0);
}

#[tokio::test]
async fn a_second_service_on_one_directory_ends_with_one_line() {
    let directory = DataDir::new();
    let (server, user, task) = start_with_a_task(&directory).await;
    let second = Process::spawn(
        &[],
        &[
            ("DATA_DIR", directory.text()),
            ("LISTEN_ADDR", "127.0.0.1:0"),
        ],
    );
    let status = second.ended().await;
    assert!(status.code().is_some_and(|code| code != 0), "{status}");
    let log = second.log();
    let told: Vec<_> = log
        .lines()
        .filter(|line| line.contains("another todo-api"))
        .collect();
    assert_eq!(told.len(), 1, "{log}");
    assert!(told[0].contains(directory.text()), "{log}");
    assert_all_there(&server, &user, &task).await;
}

#[tokio::test]
async fn what_is_private_is_closed_to_others() {
    let directory = DataDir::new();
    let server = serve(&directory).await;
    let mode = |name: &str| {
        fs::metadata(directory.path().join(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    for (name, expected) in [
        ("jwt-secret", 0o600),
        ("cluster", 0o700),
        ("socket", 0o700),
        ("lock", 0o600),
        ("postgres.log", 0o600),
    ] {
        assert_eq!(mode(name), expected, "{name}");
    }
    // Root's must let the user pass who runs PostgreSQL; nobody may look into it.
    assert_eq!(mode("") & 0o066, 0);
    assert_eq!(server.stop().await.code(), Some(0));
}

#[tokio::test]
async fn its_postgres_listens_on_no_network() {
    let directory = DataDir::new();
    let server = serve(&directory).await;
    let addresses: String = server
        .sql()
        .await
        .query_one("show listen_addresses", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(addresses, "");
}

#[tokio::test]
async fn acknowledged_writes_are_on_the_disk() {
    let directory = DataDir::new();
    let server = serve(&directory).await;
    let sql = server.sql().await;
    for setting in ["fsync", "synchronous_commit", "full_page_writes"] {
        let value: String = sql
            .query_one(&format!("show {setting}"), &[])
            .await
            .unwrap()
            .get(0);
        assert_eq!(value, "on", "{setting}");
    }
}

#[tokio::test]
async fn its_postgres_does_not_inherit_the_environment() {
    let directory = DataDir::new();
    // PGPORT would move the socket, and secrets are none of another program's business.
    let server = Server::with(&[
        ("DATA_DIR", directory.text()),
        ("PGPORT", "6543"),
        ("PGDATA", "/nowhere"),
    ])
    .await;
    let port: String = server
        .sql()
        .await
        .query_one("show port", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(port, "5432");
}

#[test]
fn the_secret_is_made_once_and_kept() {
    let directory = DataDir::new();
    let secret = embedded_postgres::jwt_secret(directory.path()).unwrap();
    assert!(secret.len() >= 64, "{} bytes", secret.len());
    assert_eq!(
        embedded_postgres::jwt_secret(directory.path()).unwrap(),
        secret
    );
    let other = DataDir::new();
    assert_ne!(embedded_postgres::jwt_secret(other.path()).unwrap(), secret);
}

#[test]
fn a_secret_that_others_can_read_or_guess_is_refused() {
    let directory = DataDir::new();
    let secret = embedded_postgres::jwt_secret(directory.path()).unwrap();
    let path = directory.path().join("jwt-secret");

    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let refusal = embedded_postgres::jwt_secret(directory.path())
        .unwrap_err()
        .to_string();
    assert!(
        refusal.contains(path.to_str().unwrap()) && !refusal.contains(&secret),
        "{refusal}"
    );

    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&path, "short").unwrap();
    let refusal = embedded_postgres::jwt_secret(directory.path())
        .unwrap_err()
        .to_string();
    assert!(
        refusal.contains("32 bytes") && !refusal.contains("short"),
        "{refusal}"
    );
}

#[tokio::test]
async fn a_directory_too_deep_for_a_socket_works_as_well() {
    let directory = DataDir::named(&"x".repeat(100));
    let parent = directory.parent();
    let elsewhere = || {
        fs::read_dir(parent)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path != directory.path())
            .collect::<Vec<_>>()
    };
    let server = Server::with(&[
        ("DATA_DIR", directory.text()),
        ("TMPDIR", parent.to_str().unwrap()),
    ])
    .await;
    server.user().await;
    assert!(!directory.path().join("socket").exists());
    for sockets in elsewhere() {
        let mode = fs::metadata(sockets).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }
    assert_eq!(server.stop().await.code(), Some(0));
    assert_eq!(elsewhere(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn odd_characters_in_the_directory_do_no_harm() {
    let directory = DataDir::named("a, 'b' ü");
    let postgres = Postgres::start(directory.path()).await.unwrap();
    assert_answers(&postgres).await;
    postgres.stop().await;
}

#[tokio::test]
async fn a_lock_file_that_names_a_stranger_harms_neither() {
    let stranger = DataDir::new();
    let strangers = Postgres::start(stranger.path()).await.unwrap();
    let directory = DataDir::new();
    Postgres::start(directory.path())
        .await
        .unwrap()
        .stop()
        .await;
    // As after a crash, when the number has gone to another process since; one that PostgreSQL
    // itself would take for the one that it fears, because the same user runs it.
    let pid = running_postgres(&stranger);
    for file in ["cluster/postmaster.pid", "socket/.s.PGSQL.5432.lock"] {
        fs::write(directory.path().join(file), format!("{pid}\n")).unwrap();
    }
    let postgres = Postgres::start(directory.path()).await.unwrap();
    assert_answers(&postgres).await;
    assert_answers(&strangers).await;
    postgres.stop().await;
    strangers.stop().await;
}

#[tokio::test]
async fn a_cluster_of_a_version_that_is_not_here_is_left_alone() {
    let directory = DataDir::new();
    Postgres::start(directory.path())
        .await
        .unwrap()
        .stop()
        .await;
    let version = directory.path().join("cluster/PG_VERSION");
    fs::write(&version, "9\n").unwrap();
    let refusal = refusal(directory.path()).await;
    assert!(refusal.contains("was made by PostgreSQL 9,"), "{refusal}");
}

#[tokio::test]
async fn a_postgres_that_cannot_start_says_why() {
    let directory = DataDir::new();
    Postgres::start(directory.path())
        .await
        .unwrap()
        .stop()
        .await;
    let settings = directory.path().join("cluster/postgresql.conf");
    fs::write(&settings, "shared_buffers = plenty\n").unwrap();
    let refusal = refusal(directory.path()).await;
    assert!(refusal.contains("does not start"), "{refusal}");
    assert!(refusal.contains("postgresql.conf"), "{refusal}");
}

#[tokio::test]
async fn a_directory_that_is_a_file_is_refused() {
    let refusal = refusal(Path::new("/dev/null")).await;
    assert!(refusal.contains("DATA_DIR /dev/null"), "{refusal}");
}

#[tokio::test]
async fn a_place_that_postgres_cannot_reach_is_named() {
    if !geteuid().is_root() {
        // Anybody else runs PostgreSQL as themselves.
        return;
    }
    let directory = DataDir::new();
    fs::set_permissions(directory.parent(), fs::Permissions::from_mode(0o700)).unwrap();
    let refusal = refusal(directory.path()).await;
    assert!(refusal.contains(directory.text()), "{refusal}");
    assert!(!directory.path().exists(), "made what cannot be used");
}

async fn assert_answers(postgres: &Postgres) {
    let (client, connection) = postgres
        .config()
        .connect(tokio_postgres::NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    let name: String = client
        .query_one("select current_database()::text", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(name, "todo");
}

/// The one line with which a start in this directory fails.
async fn refusal(directory: &Path) -> String {
    let refusal = match Postgres::start(directory).await {
        Ok(_) => panic!("it starts"),
        Err(error) => error.to_string(),
    };
    assert_eq!(refusal.lines().count(), 1, "{refusal}");
    refusal
}
