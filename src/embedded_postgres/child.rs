//! Child processes that end with this process, however it ends.
//!
//! Linux signals a process when its parent ends, but only if the process has requested the signal
//! after its last change of user. Therefore the service spawns its own program, which requests the
//! signal and then replaces itself with a program of PostgreSQL.

use std::{
    env, io,
    os::unix::process::CommandExt,
    path::Path,
    process,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::process::{Pid, Signal, getppid};
use tokio::process::Command;

/// The argument that makes this program replace itself. It is followed by the signal, the parent's
/// pid, the other program and that program's arguments.
const BECOME: &str = "--become";

/// Whether this program calls `become_child`. The test binary does not.
static CAN_BECOME: AtomicBool = AtomicBool::new(false);

/// Replaces this process with a program of PostgreSQL if it was spawned for that. Must be called
/// before anything else. Returns an error if the program cannot be run.
pub fn become_child() -> io::Result<()> {
    CAN_BECOME.store(cfg!(target_os = "linux"), Ordering::Relaxed);
    let mut arguments = env::args_os().skip(1);
    if arguments.next().is_none_or(|argument| argument != BECOME) {
        return Ok(());
    }
    let mut number = || arguments.next()?.to_str()?.parse().ok();
    let _signal = number().and_then(Signal::from_named_raw);
    let parent = number().and_then(Pid::from_raw);
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(_signal)?;
    // The parent may have ended before the request.
    if getppid() != parent {
        process::exit(1);
    }
    let program = arguments.next().unwrap_or_default();
    Err(process::Command::new(program).args(arguments).exec())
}

/// A command that Linux sends `signal` when this process ends. On other systems the command
/// outlives a killed service, and the next start stops it.
///
/// Linux sends the signal when the *thread* that spawned the command ends. The main thread and the
/// runtime's workers live as long as the process, because nothing uses `block_in_place`.
pub(super) fn command(program: &Path, signal: Signal) -> Command {
    if !CAN_BECOME.load(Ordering::Relaxed) {
        return Command::new(program);
    }
    // Runs this program even if an upgrade has replaced its file.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg(BECOME)
        .arg(signal.as_raw().to_string())
        .arg(process::id().to_string())
        .arg(program);
    command
}
