//! The temporary directory of a test run, and the cleanup when the run ends.

use std::{
    env,
    fs::{self, Permissions},
    io::Write,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{ChildStdin, Command, Stdio},
    sync::{Mutex, OnceLock},
    thread,
    time::Instant,
};

use rustix::process::{Pid, Signal, kill_process};
use todo_api::embedded_postgres::Postgres;
use tokio::sync::OnceCell;

use super::{POLL_INTERVAL, WAIT_TIMEOUT, unique};

/// The directory with all files of a test run.
struct Scratch {
    root: PathBuf,
    /// The system closes this pipe when the process ends, which starts the cleanup.
    watcher: Mutex<ChildStdin>,
}

/// A shell script that reads the process ids of servers until this process ends for any reason.
/// It then kills those servers and every PostgreSQL below the directory, and removes the directory.
const WATCHER: &str = r#"
root=$1
servers=
while read -r pid; do servers="$servers $pid"; done
is() { # pid, name: the pid may have been reused by an unrelated program
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

// The watcher outlives this process, so it is never waited for.
#[expect(clippy::zombie_processes)]
fn scratch() -> &'static Scratch {
    static SCRATCH: OnceLock<Scratch> = OnceLock::new();
    SCRATCH.get_or_init(|| {
        let root = tempfile::Builder::new()
            .prefix("todo-api-tests-")
            // When tests run as root, PostgreSQL runs as another user, who needs access.
            .permissions(Permissions::from_mode(0o755))
            .tempdir_in(parent())
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
            // Ctrl-C must not interrupt the watcher.
            .process_group(0)
            .spawn()
            .unwrap();
        let watcher = Mutex::new(watcher.stdin.take().unwrap());
        Scratch { root, watcher }
    })
}

/// Returns the directory for temporary files. Without `TMPDIR` this is the memory file system of
/// Linux, because clusters are created and copied many times faster there than on a disk. A
/// container may restrict it to a few megabytes.
fn parent() -> PathBuf {
    const MEMORY: &str = "/dev/shm";
    const REQUIRED_BYTES: u64 = 4 << 30;
    let has_room = || {
        rustix::fs::statvfs(MEMORY)
            .is_ok_and(|stats| stats.f_bavail * stats.f_frsize > REQUIRED_BYTES)
    };
    match env::var_os("TMPDIR") {
        None if has_room() => MEMORY.into(),
        _ => env::temp_dir(),
    }
}

/// Returns the directory with all files of this run.
pub(super) fn root() -> &'static Path {
    &scratch().root
}

/// Registers a server process to be killed when this process ends.
pub(super) fn kill_at_exit(pid: u32) {
    let _ = writeln!(scratch().watcher.lock().unwrap(), "{pid}");
}

/// The path of a data directory for an embedded PostgreSQL. The directory does not exist initially.
/// Dropping this stops a PostgreSQL that runs there and removes the directory.
pub(crate) struct DataDir(PathBuf);

impl DataDir {
    pub(crate) fn new() -> DataDir {
        DataDir::named("data")
    }

    /// Returns a directory with this name in a new parent directory.
    pub(crate) fn named(name: &str) -> DataDir {
        let parent = root().join(unique().to_string());
        fs::create_dir(&parent).unwrap();
        DataDir(parent.join(name))
    }

    /// Returns a directory with an initialized cluster. Copies a template, because `initdb` takes much
    /// longer than a copy.
    pub(crate) async fn initialized() -> DataDir {
        static TEMPLATE: OnceCell<DataDir> = OnceCell::const_new();
        let template = TEMPLATE.get_or_init(async || {
            let directory = DataDir::new();
            Postgres::start(directory.path())
                .await
                .unwrap()
                .stop()
                .await;
            directory
        });
        let directory = DataDir::new();
        let copied = Command::new("cp")
            .arg("-a")
            .args([template.await.path(), directory.path()])
            .status();
        assert!(copied.unwrap().success());
        directory
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The parent directory, which exists.
    pub(crate) fn parent(&self) -> &Path {
        self.0.parent().unwrap()
    }

    /// Returns the path as the value of an environment variable.
    pub(crate) fn text(&self) -> &str {
        self.0.to_str().unwrap()
    }

    /// Returns the process id of the PostgreSQL that runs in this directory, if any.
    pub(crate) fn postgres(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.0.join("cluster/postmaster.pid")).ok()?;
        let pid = Pid::from_raw(text.lines().next()?.parse().ok()?)?;
        is_alive(pid).then_some(pid)
    }

    /// Returns the URL of the PostgreSQL that runs in this directory.
    pub(crate) fn database_url(&self) -> String {
        socket_url(&self.0.join("socket"))
    }
}

impl Drop for DataDir {
    fn drop(&mut self) {
        if let Some(postgres) = self.postgres() {
            let _ = kill_process(postgres, Signal::QUIT);
            let deadline = Instant::now() + WAIT_TIMEOUT;
            while is_alive(postgres) && Instant::now() < deadline {
                thread::sleep(POLL_INTERVAL);
            }
        }
        let _ = fs::remove_dir_all(self.parent());
    }
}

/// Returns whether this process is running. A zombie is not.
pub(crate) fn is_alive(pid: Pid) -> bool {
    if cfg!(target_os = "linux") {
        fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat[stat.rfind(')').unwrap()..].starts_with(") Z"))
    } else {
        rustix::process::test_kill_process(pid).is_ok()
    }
}

/// Returns the URL of an embedded PostgreSQL whose socket is in this directory.
pub(super) fn socket_url(directory: &Path) -> String {
    let host = directory.to_str().unwrap().replace('/', "%2F");
    format!("postgres://todo@{host}/todo")
}
