//! The program as a child process.

use std::{
    env,
    fs::File,
    io::{BufRead, BufReader, Read, pipe},
    net::SocketAddr,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::Instant,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::time::sleep;

use super::{
    POLL_INTERVAL, WAIT_TIMEOUT,
    scratch::{kill_at_exit, root},
};

/// The program as a child process, killed when this is dropped.
pub(crate) struct Process {
    child: Mutex<Child>,
    pid: Pid,
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
    collectors: Mutex<Vec<thread::JoinHandle<()>>>,
}

impl Process {
    /// Starts the program with these arguments and only these environment variables.
    pub(crate) fn spawn(arguments: &[&str], variables: &[(&str, &str)]) -> Process {
        Process::spawn_in(root(), arguments, variables)
    }

    /// Starts the program in this working directory.
    pub(crate) fn spawn_in(
        directory: &Path,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_todo-api"));
        command
            .args(arguments)
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        Process::run(command, variables)
    }

    /// Runs a command that is the program or becomes it, with only these environment variables.
    pub(crate) fn run(mut command: Command, variables: &[(&str, &str)]) -> Process {
        command
            // Ignore the developer's own settings.
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .env("TMPDIR", env::temp_dir())
            .envs(variables.iter().copied());
        let (stderr_reader, stderr_writer) = pipe().unwrap();
        if variables.contains(&("JOURNAL_STREAM", "stderr")) {
            // systemd sets this variable if stderr is the journal.
            let stderr = File::from(OwnedFd::from(stderr_writer.try_clone().unwrap()));
            let meta = stderr.metadata().unwrap();
            command.env("JOURNAL_STREAM", format!("{}:{}", meta.dev(), meta.ino()));
        }
        let mut child = command.stderr(stderr_writer).spawn().unwrap();
        // Close this process's copy of the pipe's write end.
        drop(command);
        kill_at_exit(child.id());

        let stdout = Arc::new(Mutex::new(String::new()));
        let stderr = Arc::new(Mutex::new(String::new()));
        let mut collectors = vec![collect(stderr_reader, stderr.clone())];
        if let Some(pipe) = child.stdout.take() {
            collectors.push(collect(pipe, stdout.clone()));
        }
        Process {
            pid: Pid::from_child(&child),
            child: Mutex::new(child),
            stdout,
            stderr,
            collectors: Mutex::new(collectors),
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Returns what the process has written to stderr.
    pub(crate) fn log(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// Returns what the process has written to stdout.
    pub(crate) fn output(&self) -> String {
        self.stdout.lock().unwrap().clone()
    }

    pub(crate) async fn wait_for_log(&self, text: &str) {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        while !self.log().contains(text) {
            assert!(
                Instant::now() < deadline,
                "{text:?} is not in the log:\n{}",
                self.log()
            );
            sleep(POLL_INTERVAL).await;
        }
    }

    /// Waits until the service listens, and returns the address.
    pub(crate) async fn listening(&self) -> SocketAddr {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        loop {
            let ended = self.status();
            let log = self.log();
            if let Some((_, rest)) = log.split_once("listening on http://") {
                let end = rest.find(|c: char| !c.is_ascii_hexdigit() && !".:[]".contains(c));
                if let Some(Ok(addr)) = end.map(|end| rest[..end].parse()) {
                    return addr;
                }
            }
            assert!(
                ended.is_none(),
                "exited ({}) before it listened:\n{log}",
                ended.unwrap()
            );
            assert!(Instant::now() < deadline, "does not listen:\n{log}");
            sleep(POLL_INTERVAL).await;
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let mut child = self.child.lock().unwrap();
        // The process id of a child that has been waited for may be reused.
        if child.try_wait().unwrap().is_none() {
            kill_process(self.pid, signal).unwrap();
        }
    }

    fn status(&self) -> Option<ExitStatus> {
        self.child.lock().unwrap().try_wait().unwrap()
    }

    /// Waits until the process exits and its log and output are complete.
    pub(crate) async fn ended(&self) -> ExitStatus {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        loop {
            if let Some(status) = self.status() {
                self.finish_collecting();
                return status;
            }
            assert!(Instant::now() < deadline, "does not exit:\n{}", self.log());
            sleep(POLL_INTERVAL).await;
        }
    }

    pub(crate) async fn stop(&self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended().await
    }

    pub(crate) fn kill(&self) {
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }

    fn finish_collecting(&self) {
        for collector in self.collectors.lock().unwrap().drain(..) {
            let _ = collector.join();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        self.finish_collecting();
        if thread::panicking() {
            eprintln!("---- log of process {}\n{}", self.pid, self.log());
        }
    }
}

fn collect(from: impl Read + Send + 'static, to: Arc<Mutex<String>>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while from.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            to.lock().unwrap().push_str(&String::from_utf8_lossy(&line));
            line.clear();
        }
    })
}
