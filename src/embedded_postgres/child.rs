//! Child processes that end with this process, however it ends.

use std::{
    env, io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{LazyLock, mpsc},
    thread,
};

use log::warn;
use tokio::{
    process::{Child, Command},
    runtime::Handle,
};

type Job = Box<dyn FnOnce() + Send>;

/// The thread that spawns all children. Linux sends the parent-death signal when the *thread* that
/// spawned the child ends, and a thread of the runtime may end at any time; this one never does.
static SPAWNER: LazyLock<mpsc::Sender<Job>> = LazyLock::new(|| {
    let (jobs, received) = mpsc::channel::<Job>();
    // Without the thread the channel is closed, which `spawn` reports.
    thread::Builder::new()
        .name("spawner".into())
        .spawn(move || received.into_iter().for_each(|job| job()))
        .ok();
    jobs
});

/// util-linux's `setpriv`, if it can set a parent-death signal (version 2.33 and later).
static SETPRIV: LazyLock<Option<PathBuf>> = LazyLock::new(|| {
    if !cfg!(target_os = "linux") {
        return None;
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let setpriv = env::split_paths(&path)
        .chain([PathBuf::from("/usr/bin"), PathBuf::from("/bin")])
        .map(|directory| directory.join("setpriv"))
        .filter(|program| program.is_absolute() && program.is_file())
        .find(|program| {
            std::process::Command::new(program)
                .args(["--pdeathsig", "INT", "--"])
                .arg(program)
                .arg("--version")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|status| status.success())
        });
    if setpriv.is_none() {
        warn!(
            "setpriv of util-linux 2.33 or later is not installed: PostgreSQL would outlive a killed todo-api until the next start"
        );
    }
    setpriv
});

/// A command that Linux sends `signal` when this process ends. Elsewhere it survives a process
/// that is killed, and the next start stops it.
///
/// `setpriv` replaces itself by the program, so the child has the program's name and pid. It runs
/// after a change of user, which would clear the signal.
pub(super) fn command(program: &Path, signal: &str) -> Command {
    let Some(setpriv) = &*SETPRIV else {
        return Command::new(program);
    };
    let mut command = Command::new(setpriv);
    command.args(["--pdeathsig", signal, "--"]).arg(program);
    command
}

/// Spawns a child from the thread that never ends.
pub(super) fn spawn(mut command: Command) -> io::Result<Child> {
    let runtime = Handle::current();
    let (reply, child) = mpsc::channel();
    let job = move || {
        let _context = runtime.enter();
        // The receiver waits.
        let _ = reply.send(command.spawn());
    };
    let sent = SPAWNER.send(Box::new(job));
    sent.ok()
        .and_then(|()| child.recv().ok())
        .unwrap_or_else(|| Err(io::Error::other("the spawning thread has ended")))
}
