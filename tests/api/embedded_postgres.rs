//! The embedded PostgreSQL: its lifecycle, durability and file permissions.

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

/// Starts a server and creates a user with one task.
async fn start_with_a_task(directory: &DataDir) -> (Server, User, Value) {
    let server = serve(directory).await;
    let user = server.user().await;
    let task = user.create_task("water the ferns").await;
    (server, user, task)
}

/// Asserts that the user's token is still valid, that the task is unchanged, and that another task can
/// be created.
async fn assert_data_kept(server: &Server, user: &User, task: &Value) {
    let list = user.on(server).get(user.tasks()).await.expect(200).json();
    assert_eq!(list, Value::Array(vec![task.clone()]));
    let login = server.login(&user.email, &user.password).await;
    assert_eq!(login.id, user.id);
    let second = login.create_task("and the moss").await;
    assert_eq!(second["user_id"], *user.id);
}

/// Starts the service without waiting until it is ready.
fn spawn(directory: &DataDir) -> Process {
    let listen = ("LISTEN_ADDR", "127.0.0.1:0");
    Process::spawn(&[], &[("DATA_DIR", directory.text()), listen])
}

/// Creates a cluster that is not running.
async fn create_cluster(directory: &DataDir) {
    let postgres = Postgres::start(directory.path()).await.unwrap();
    postgres.stop().await;
}

fn running_postgres(directory: &DataDir) -> Pid {
    directory.postgres().expect("PostgreSQL is not running")
}

#[tokio::test]
async fn requires_only_a_data_directory() {
    let directory = DataDir::initialized().await;
    let (server, user, task) = start_with_a_task(&directory).await;
    assert_data_kept(&server, &user, &task).await;
    assert_eq!(server.stop().await.code(), Some(0));
}

#[tokio::test]
async fn stores_data_in_the_current_directory_by_default() {
    let directory = DataDir::named(".todo-api");
    // The default port may be in use.
    let process = Process::spawn_in(directory.parent(), &[], &[("LISTEN_ADDR", "127.0.0.1:0")]);
    process.listening().await;
    until("PostgreSQL runs", async || directory.postgres().is_some()).await;
    assert_eq!(process.stop().await.code(), Some(0), "{}", process.log());
    assert_eq!(directory.postgres(), None);
}

#[tokio::test]
async fn data_survives_a_restart() {
    let directory = DataDir::initialized().await;
    let (server, user, task) = start_with_a_task(&directory).await;
    let postgres = running_postgres(&directory);
    assert_eq!(server.stop().await.code(), Some(0));
    assert!(!is_alive(postgres));
    assert_data_kept(&serve(&directory).await, &user, &task).await;
}

/// Counts the processes whose working directory is the cluster: the postmaster and its children.
fn postgres_processes(directory: &DataDir) -> usize {
    let cluster = directory.path().join("cluster");
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter(|process| fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == cluster))
        .count()
}

#[tokio::test]
async fn postgres_exits_when_the_service_is_killed() {
    let directory = DataDir::initialized().await;
    let (server, user, task) = start_with_a_task(&directory).await;
    let postgres = running_postgres(&directory);
    server.kill();
    if cfg!(target_os = "linux") {
        until("PostgreSQL has ended with the service", async || {
            !is_alive(postgres) && postgres_processes(&directory) == 0
        })
        .await;
    }
    assert_data_kept(&serve(&directory).await, &user, &task).await;
}

#[tokio::test]
async fn stops_a_stale_postgres_before_starting_another() {
    let directory = DataDir::initialized().await;
    let (server, user, task) = start_with_a_task(&directory).await;
    let programs = programs(&directory);
    assert_eq!(server.stop().await.code(), Some(0));
    // Systems without a parent-death signal leave such a process behind.
    let cluster = directory.path().join("cluster");
    let mut command = as_owner_of(&cluster, programs.join("postgres"));
    let mut stale = command
        .arg("-D")
        .arg(&cluster)
        .args(["-c", "listen_addresses=", "-c", "unix_socket_directories="])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("PostgreSQL runs", async || directory.postgres().is_some()).await;
    let server = serve(&directory).await;
    assert!(
        !is_alive(Pid::from_child(&stale)),
        "two servers run on one directory"
    );
    stale.wait().unwrap();
    assert_data_kept(&server, &user, &task).await;
}

/// Returns the directory of the running PostgreSQL's programs.
fn programs(directory: &DataDir) -> PathBuf {
    let postgres = fs::read_link(format!("/proc/{}/exe", running_postgres(directory))).unwrap();
    postgres.parent().unwrap().to_owned()
}

/// Builds a command that runs as the owner of this file.
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
async fn restarts_a_killed_postgres() {
    let directory = DataDir::initialized().await;
    let (server, user, task) = start_with_a_task(&directory).await;
    for _ in 0..3 {
        let killed = running_postgres(&directory);
        kill_process(killed, Signal::KILL).unwrap();
        until("another PostgreSQL runs and serves", async || {
            directory
                .postgres()
                .is_some_and(|postgres| postgres != killed)
                && user.get(user.tasks()).await.status == 200
        })
        .await;
    }
    assert_data_kept(&server, &user, &task).await;
    let restarts = server
        .log()
        .lines()
        .filter(|line| line.contains("ended unexpectedly"))
        .count();
    assert_eq!(restarts, 3, "{}", server.log());
    assert_eq!(server.stop().await.code(), Some(0));
    assert_eq!(directory.postgres(), None);
}

#[tokio::test]
async fn data_survives_if_service_and_postgres_are_killed() {
    let directory = DataDir::initialized().await;
    let (server, user, task) = start_with_a_task(&directory).await;
    let postgres = running_postgres(&directory);
    server.kill();
    kill_process(postgres, Signal::KILL).unwrap();
    assert_data_kept(&serve(&directory).await, &user, &task).await;
}

#[tokio::test]
async fn stops_postgres_on_each_signal() {
    let directory = DataDir::initialized().await;
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let server = serve(&directory).await;
        let postgres = running_postgres(&directory);
        server.signal(signal);
        assert_eq!(server.ended().await.code(), Some(0), "{}", server.log());
        assert!(!is_alive(postgres));
    }
}

#[tokio::test]
async fn stops_postgres_if_startup_is_interrupted() {
    let directory = DataDir::new();
    let process = spawn(&directory);
    until("PostgreSQL is being started", async || {
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
async fn recovers_from_an_interrupted_initdb() {
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
    let process = spawn(&directory);
    until("initdb is running", async || unfinished() == 1).await;
    process.kill();
    assert!(!directory.path().join("cluster").exists());
    let (server, user, task) = start_with_a_task(&directory).await;
    assert_data_kept(&server, &user, &task).await;
    assert_eq!(unfinished(), 0);
}

#[tokio::test]
async fn exits_if_another_service_uses_the_directory() {
    let directory = DataDir::initialized().await;
    let (server, user, task) = start_with_a_task(&directory).await;
    let second = spawn(&directory);
    let status = second.ended().await;
    assert!(status.code().is_some_and(|code| code != 0), "{status}");
    let log = second.log();
    let lines: Vec<_> = log
        .lines()
        .filter(|line| line.contains("another todo-api"))
        .collect();
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].contains(directory.text()), "{log}");
    assert_data_kept(&server, &user, &task).await;
}

#[tokio::test]
async fn other_users_cannot_access_private_files() {
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
    // If root runs the service, PostgreSQL's user may traverse the directory, but no other user may list it.
    assert_eq!(mode("") & 0o066, 0);
    assert_eq!(server.stop().await.code(), Some(0));
}

#[tokio::test]
async fn postgres_listens_on_no_network_address() {
    let directory = DataDir::initialized().await;
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
async fn commits_are_durable() {
    let directory = DataDir::initialized().await;
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
async fn postgres_does_not_inherit_the_environment() {
    let directory = DataDir::initialized().await;
    // PGPORT would change the name of the socket.
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
fn creates_the_secret_once() {
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
fn rejects_a_secret_that_is_readable_by_others_or_too_short() {
    let directory = DataDir::new();
    let secret = embedded_postgres::jwt_secret(directory.path()).unwrap();
    let path = directory.path().join("jwt-secret");

    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let error = embedded_postgres::jwt_secret(directory.path())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(path.to_str().unwrap()) && !error.contains(&secret),
        "{error}"
    );

    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&path, "short").unwrap();
    let error = embedded_postgres::jwt_secret(directory.path())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("32 bytes") && !error.contains("short"),
        "{error}"
    );
}

#[tokio::test]
async fn supports_data_directories_whose_path_is_too_long_for_a_socket() {
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
async fn supports_special_characters_in_the_path() {
    let directory = DataDir::named("a, 'b' ü");
    let postgres = Postgres::start(directory.path()).await.unwrap();
    assert_responds(&postgres).await;
    postgres.stop().await;
}

#[tokio::test]
async fn ignores_a_lock_file_whose_pid_was_reused() {
    let other = DataDir::initialized().await;
    let other_postgres = Postgres::start(other.path()).await.unwrap();
    let directory = DataDir::initialized().await;
    // After a crash, another process may get the pid. PostgreSQL would assume that this process serves
    // the cluster, because the same user runs it.
    let pid = running_postgres(&other);
    for file in ["cluster/postmaster.pid", "socket/.s.PGSQL.5432.lock"] {
        fs::write(directory.path().join(file), format!("{pid}\n")).unwrap();
    }
    let postgres = Postgres::start(directory.path()).await.unwrap();
    assert_responds(&postgres).await;
    assert_responds(&other_postgres).await;
    postgres.stop().await;
    other_postgres.stop().await;
}

#[tokio::test]
async fn rejects_a_cluster_of_a_version_that_is_not_installed() {
    let directory = DataDir::initialized().await;
    let version = directory.path().join("cluster/PG_VERSION");
    fs::write(&version, "9\n").unwrap();
    let error = start_error(directory.path()).await;
    assert!(error.contains("was written by PostgreSQL 9,"), "{error}");
    let recipe = "A new major version of PostgreSQL";
    assert!(error.contains(recipe), "{error}");
    assert!(include_str!("../../docs/operations.md").contains(&format!("### {recipe}\n")));
}

#[tokio::test]
async fn reports_why_postgres_cannot_start() {
    let directory = DataDir::initialized().await;
    let settings = directory.path().join("cluster/postgresql.conf");
    fs::write(&settings, "shared_buffers = plenty\n").unwrap();
    let error = start_error(directory.path()).await;
    assert!(error.contains("does not start"), "{error}");
    assert!(error.contains("postgresql.conf"), "{error}");
}

#[tokio::test]
async fn only_root_and_the_service_user_can_connect() {
    if !geteuid().is_root() {
        // PostgreSQL runs as the same user, and other users cannot enter the socket directory.
        return;
    }
    let directory = DataDir::initialized().await;
    // Earlier versions created clusters that trust every local user.
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
async fn rejects_another_users_directory_link_or_secret() {
    if !geteuid().is_root() {
        // Only root can change the owner of a directory.
        return;
    }
    const OTHER_USER: u32 = 65_534;
    let directory = DataDir::new();
    fs::create_dir(directory.path()).unwrap();
    let secret = directory.path().join("jwt-secret");
    fs::write(&secret, "planted, and long enough to be a secret").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();

    chown(directory.path(), Some(OTHER_USER), None).unwrap();
    let error = start_error(directory.path()).await;
    assert!(
        error.contains(directory.text()) && error.contains("another user"),
        "{error}"
    );
    // A symbolic link that another user has created.
    let link = directory.parent().join("link");
    symlink(directory.path(), &link).unwrap();
    chown(directory.path(), Some(0), None).unwrap();
    std::os::unix::fs::lchown(&link, Some(OTHER_USER), None).unwrap();
    assert!(start_error(&link).await.contains("another user"));
    // Another user's secret in a directory of this user.
    chown(&secret, Some(OTHER_USER), None).unwrap();
    let error = embedded_postgres::jwt_secret(directory.path())
        .unwrap_err()
        .to_string();
    assert!(error.contains("another user"), "{error}");
    // Another user's cluster, whose owner would run PostgreSQL.
    let cluster = directory.path().join("cluster");
    fs::create_dir(&cluster).unwrap();
    chown(&cluster, Some(12_345), None).unwrap();
    assert!(start_error(directory.path()).await.contains("another user"));
    fs::remove_dir(&cluster).unwrap();
    assert_eq!(
        fs::read_dir(directory.path()).unwrap().count(),
        1,
        "a file was created"
    );
}

#[tokio::test]
async fn rejects_a_directory_that_other_users_can_write_to() {
    let directory = DataDir::new();
    fs::create_dir(directory.path()).unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let error = start_error(directory.path()).await;
    assert!(error.contains("chmod go-w"), "{error}");
}

#[tokio::test]
async fn does_not_follow_symbolic_links() {
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
            // The link is replaced.
            "pg_hba.conf" => create_cluster(&directory).await,
            "jwt-secret" => {
                let error = embedded_postgres::jwt_secret(directory.path()).unwrap_err();
                assert!(error.to_string().contains("symbolic link"), "{error}");
            }
            _ => {
                let error = start_error(directory.path()).await;
                assert!(error.contains(directory.text()), "{name}: {error}");
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
async fn reports_a_directory_that_cannot_be_created() {
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
        let error = start_error(path).await;
        assert!(
            error.contains("DATA_DIR") && error.contains(reason),
            "{error}"
        );
    }
    assert!(!directory.path().exists(), "a directory was created");
}

/// Runs the service on $1/disk, which is too small for a cluster.
const RUN_ON_SMALL_DISK: &str = r#"
mkdir "$1/disk" && mount -t tmpfs -o size=20m,mode=755 tmpfs "$1/disk" || exit 99
"$2"
code=$?
ls -A "$1/disk"
exit $code
"#;

#[tokio::test]
async fn a_failed_first_start_on_a_full_disk_leaves_no_files() {
    let mounts = Command::new("unshare").args(["-m", "true"]).output();
    if !geteuid().is_root() || !mounts.is_ok_and(|output| output.status.success()) {
        return;
    }
    let directory = DataDir::new();
    let data_dir = directory.parent().join("disk/below/data");
    let mut command = Command::new("unshare");
    command
        .args(["-m", "sh", "-c", RUN_ON_SMALL_DISK, "sh"])
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
    assert_eq!(process.output(), "", "files were left");
}

#[tokio::test]
async fn reports_a_directory_that_postgres_cannot_access() {
    if !geteuid().is_root() {
        // PostgreSQL runs as the same user.
        return;
    }
    let directory = DataDir::new();
    fs::set_permissions(directory.parent(), fs::Permissions::from_mode(0o700)).unwrap();
    let error = start_error(directory.path()).await;
    assert!(error.contains(directory.text()), "{error}");
    assert!(!directory.path().exists(), "a directory was created");
}

async fn assert_responds(postgres: &Postgres) {
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

/// Asserts that PostgreSQL cannot be started in this directory, and returns the error.
async fn start_error(directory: &Path) -> String {
    let error = match Postgres::start(directory).await {
        Ok(_) => panic!("PostgreSQL has started"),
        Err(error) => error.to_string(),
    };
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}
