//! Zero set-up: without `DATABASE_URL` the service runs a PostgreSQL of its own, and nothing that
//! it acknowledged is lost, whoever is killed.

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
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

/// The processes that work in the cluster: the postmaster and its children.
fn postgres_processes(directory: &DataDir) -> usize {
    let cluster = directory.path().join("cluster");
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter(|process| fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == cluster))
        .count()
}

#[tokio::test]
async fn postgres_ends_when_the_service_is_killed() {
    let directory = DataDir::new();
    let (server, user, task) = start_with_a_task(&directory).await;
    let postgres = running_postgres(&directory);
    server.kill();
    if cfg!(target_os = "linux") {
        until("PostgreSQL has ended with the service", async || {
            !is_alive(postgres) && postgres_processes(&directory) == 0
        })
        .await;
    }
    assert_all_there(&serve(&directory).await, &user, &task).await;
}

#[tokio::test]
async fn a_postgres_that_outlived_its_service_is_stopped_before_the_next_is_started() {
    let directory = DataDir::new();
    let (server, user, task) = start_with_a_task(&directory).await;
    let programs = programs(&directory);
    assert_eq!(server.stop().await.code(), Some(0));
    // As where no parent-death signal is sent.
    let cluster = directory.path().join("cluster");
    let mut command = as_owner_of(&cluster, programs.join("postgres"));
    let mut left = command
        .arg("-D")
        .arg(&cluster)
        .args(["-c", "listen_addresses=", "-c", "unix_socket_directories="])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("it runs", async || directory.postgres().is_some()).await;
    let server = serve(&directory).await;
    assert!(
        !is_alive(Pid::from_child(&left)),
        "two PostgreSQL on one directory"
    );
    left.wait().unwrap();
    assert_all_there(&server, &user, &task).await;
}

/// The directory of the programs of the PostgreSQL that runs here.
fn programs(directory: &DataDir) -> PathBuf {
    let postgres = fs::read_link(format!("/proc/{}/exe", running_postgres(directory))).unwrap();
    postgres.parent().unwrap().to_owned()
}

/// A command that runs as the user that owns this file.
fn as_owner_of(path: &Path, program: PathBuf) -> Command {
    let mut command = Command::new(program);
    command.current_dir("/");
    if geteuid().is_root() {
        let owner = fs::metadata(path).unwrap();
        command.uid(owner.uid()).gid(owner.gid());
    }
    command
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
async fn a_stop_by_any_signal_leaves_no_postgres_behind() {
    let directory = DataDir::new();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
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
    assert!(
        refusal.contains("was written by PostgreSQL 9,"),
        "{refusal}"
    );
    let recipe = "A new major version of PostgreSQL";
    assert!(refusal.contains(recipe), "{refusal}");
    assert!(include_str!("../../docs/operations.md").contains(&format!("### {recipe}\n")));
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
async fn only_root_and_the_services_own_user_can_connect() {
    if !geteuid().is_root() {
        // The socket's directory is closed to everybody else, and PostgreSQL runs as ourselves.
        return;
    }
    let directory = DataDir::new();
    // A cluster as earlier versions created it: whoever reaches its socket is the superuser.
    Postgres::start(directory.path())
        .await
        .unwrap()
        .stop()
        .await;
    let rules = directory.path().join("cluster/pg_hba.conf");
    fs::write(&rules, "local all all trust\n").unwrap();

    let server = serve(&directory).await;
    let owner = fs::metadata(directory.path().join("cluster"))
        .unwrap()
        .uid();
    for (uid, may_connect) in [(0, true), (owner, false)] {
        let output = Command::new(programs(&directory).join("psql"))
            .uid(uid)
            .current_dir("/")
            .arg("-h")
            .arg(directory.path().join("socket"))
            .args(["-U", "todo", "-d", "todo", "-c", "select from users"])
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), may_connect, "{uid}: {stderr}");
        assert!(
            may_connect || stderr.contains("Peer authentication failed"),
            "{stderr}"
        );
    }
    assert_eq!(server.stop().await.code(), Some(0));
}

#[tokio::test]
async fn the_directory_of_another_user_is_not_used() {
    if !geteuid().is_root() {
        // Only root can give a directory away.
        return;
    }
    const STRANGER: u32 = 65_534;
    let directory = DataDir::new();
    fs::create_dir(directory.path()).unwrap();
    let secret = directory.path().join("jwt-secret");
    fs::write(&secret, "planted, and long enough to be a secret of ours").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();

    chown(directory.path(), Some(STRANGER), None).unwrap();
    let refused = refusal(directory.path()).await;
    assert!(
        refused.contains(directory.text()) && refused.contains("another user"),
        "{refused}"
    );
    // A link that a stranger made is no better.
    let link = directory.parent().join("link");
    symlink(directory.path(), &link).unwrap();
    chown(directory.path(), Some(0), None).unwrap();
    std::os::unix::fs::lchown(&link, Some(STRANGER), None).unwrap();
    assert!(refusal(&link).await.contains("another user"));
    // Nor is a secret that a stranger left in a directory that is ours since.
    chown(&secret, Some(STRANGER), None).unwrap();
    let refused = embedded_postgres::jwt_secret(directory.path())
        .unwrap_err()
        .to_string();
    assert!(refused.contains("another user"), "{refused}");
    assert_eq!(
        fs::read_dir(directory.path()).unwrap().count(),
        1,
        "something was created"
    );
}

#[tokio::test]
async fn a_directory_that_others_can_write_to_is_not_used() {
    let directory = DataDir::new();
    fs::create_dir(directory.path()).unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let refused = refusal(directory.path()).await;
    assert!(refused.contains("chmod go-w"), "{refused}");
}

#[tokio::test]
async fn links_in_the_directory_are_not_followed() {
    for name in [
        "jwt-secret",
        "lock",
        "postgres.log",
        "socket",
        "cluster",
        "pg_hba.conf",
    ] {
        let directory = DataDir::new();
        fs::create_dir(directory.path()).unwrap();
        let target = directory.parent().join("target");
        match name {
            "socket" | "cluster" => fs::create_dir(&target).unwrap(),
            _ => fs::write(&target, "x".repeat(64)).unwrap(),
        }
        fs::set_permissions(&target, fs::Permissions::from_mode(0o750)).unwrap();
        symlink(&target, directory.path().join(name)).unwrap();
        match name {
            // A rename replaces it.
            "pg_hba.conf" => {
                Postgres::start(directory.path())
                    .await
                    .unwrap()
                    .stop()
                    .await
            }
            "jwt-secret" => {
                let refused = embedded_postgres::jwt_secret(directory.path()).unwrap_err();
                assert!(refused.to_string().contains("symbolic link"), "{refused}");
            }
            _ => {
                let refused = refusal(directory.path()).await;
                assert!(refused.contains(directory.text()), "{name}: {refused}");
            }
        }
        let meta = fs::metadata(&target).unwrap();
        assert_eq!(meta.mode() & 0o777, 0o750, "{name}");
        assert_eq!(meta.uid(), geteuid().as_raw(), "{name}");
        match meta.is_dir() {
            true => assert_eq!(fs::read_dir(&target).unwrap().count(), 0, "{name}"),
            false => assert_eq!(meta.len(), 64, "{name}"),
        }
    }
}

#[tokio::test]
async fn a_directory_that_cannot_be_created_is_named_with_the_reason() {
    let directory = DataDir::new();
    let file = directory.parent().join("file");
    fs::write(&file, "").unwrap();
    let below = directory.path().join("below");
    let long = below.join("x".repeat(200)).join("x".repeat(200));
    let long = long
        .join("x".repeat(200))
        .join("x".repeat(200))
        .join("x".repeat(200));
    for (path, reason) in [
        (Path::new("/dev/null"), "is not a directory"),
        (&file.join("data"), "is not a directory"),
        (&long, "too long a path"),
    ] {
        let refused = refusal(path).await;
        assert!(
            refused.contains("DATA_DIR") && refused.contains(reason),
            "{refused}"
        );
    }
    assert!(!directory.path().exists(), "a directory was left behind");
}

/// Runs the service, with DATA_DIR as $1/disk/below/data, on a disk that is too small for a cluster.
const TOO_SMALL_A_DISK: &str = r#"
mkdir "$1/disk" && mount -t tmpfs -o size=20m,mode=755 tmpfs "$1/disk" || exit 99
"$2"
code=$?
ls -A "$1/disk"
exit $code
"#;

#[tokio::test]
async fn a_disk_that_is_full_at_the_first_start_is_named_and_nothing_is_left_on_it() {
    let mounts = Command::new("unshare").args(["-m", "true"]).output();
    if !geteuid().is_root() || !mounts.is_ok_and(|output| output.status.success()) {
        return;
    }
    let directory = DataDir::new();
    let data_dir = directory.parent().join("disk/below/data");
    let mut command = Command::new("unshare");
    command
        .args(["-m", "sh", "-c", TOO_SMALL_A_DISK, "sh"])
        .arg(directory.parent())
        .arg(env!("CARGO_BIN_EXE_todo-api"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let process = Process::run(
        command,
        &[
            ("DATA_DIR", data_dir.to_str().unwrap()),
            ("LISTEN_ADDR", "127.0.0.1:0"),
        ],
    );
    assert_eq!(process.ended().await.code(), Some(1), "{}", process.log());
    let log = process.log();
    let line = log.lines().last().unwrap_or_default();
    assert!(line.contains("No space left on device"), "{log}");
    assert_eq!(process.output(), "", "left behind");
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
