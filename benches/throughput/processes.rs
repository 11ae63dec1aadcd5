//! The child processes.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use todo_api::embedded_postgres::Postgres;
use tokio::runtime::{self, Runtime};

use crate::{
    Result, SECRET,
    client::fetch,
    interrupt::{POLL_INTERVAL, check},
};

/// A child process that is killed on drop.
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn spawn(command: &mut Command) -> Result<Self> {
        let child = command.spawn();
        Ok(Self(child.map_err(|error| {
            format!("{:?}: {error}", command.get_program())
        })?))
    }

    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The embedded PostgreSQL, as the service runs it, but also listening on TCP.
pub(crate) struct Database {
    /// Runs the tasks that supervise PostgreSQL.
    runtime: Runtime,
    postgres: Option<Postgres>,
    host: IpAddr,
    programs: PathBuf,
    pub(crate) postmaster: Option<u32>,
}

impl Database {
    /// Returns PostgreSQL's version.
    pub(crate) fn version(&self) -> Option<&str> {
        self.postgres.as_ref().map(Postgres::version)
    }

    pub(crate) fn start(directory: &Path) -> Result<Self> {
        // The port is fixed, so find an address in 127.0.0.0/8 on which it is free.
        let host = (1..=254)
            .map(|last| IpAddr::from(Ipv4Addr::new(127, 0, 0, last)))
            .find(|host| TcpListener::bind((*host, 5432)).is_ok())
            .ok_or("no loopback address has port 5432 free")?;
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let rules = directory.with_added_extension("rules");
        fs::write(
            &rules,
            format!("local all all peer map=todo-api\nhost all all {host}/32 trust\n"),
        )?;
        let settings = [
            ("listen_addresses", &*host.to_string()),
            (
                "hba_file",
                rules.to_str().ok_or("a path that is not UTF-8")?,
            ),
        ];
        let postgres = runtime.block_on(Postgres::start_with(directory, &settings))?;
        let pid_file = fs::read_to_string(postgres.data_dir().join("cluster/postmaster.pid"))?;
        let postmaster = pid_file.lines().next().and_then(|pid| pid.parse().ok());
        // Use pgbench and psql of the same version; without /proc, those in PATH.
        let program =
            fs::read_link(format!("/proc/{}/exe", postmaster.unwrap_or(0))).unwrap_or_default();
        let programs = program.parent().map_or(PathBuf::new(), Path::to_owned);
        Ok(Self {
            runtime,
            postgres: Some(postgres),
            host,
            programs,
            postmaster,
        })
    }

    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        command.args(["-h", &self.host.to_string(), "-p", "5432", "-U", "todo"]);
        command
    }

    /// Runs statements one by one and returns the output of the last.
    pub(crate) fn sql(&self, statements: &[&str]) -> Result<String> {
        let mut command = self.command("psql");
        command.args(["-XqAt", "-v", "ON_ERROR_STOP=1"]);
        for statement in statements {
            command.args(["-c", statement]);
        }
        output(command.arg("todo"))
    }

    /// Runs weighted scripts for the given time; returns transactions per second and their number.
    pub(crate) fn pgbench(
        &self,
        scripts: &[(PathBuf, u64)],
        length: Duration,
    ) -> Result<(f64, f64)> {
        let mut command = self.command("pgbench");
        command.args(["-n", "-M", "prepared", "-c", "20", "-j", "2", "-D", "i=-1"]);
        command.arg("-T").arg(length.as_secs().to_string());
        for (script, weight) in scripts {
            command.arg(format!("-f{}@{weight}", script.display()));
        }
        let output = output(command.arg("todo"))?;
        let figure = |name: &str| {
            let line = output.lines().find_map(|line| line.strip_prefix(name));
            let figure = line.and_then(|line| line.split_whitespace().next());
            figure.ok_or_else(|| format!("pgbench printed no `{name}`"))
        };
        Ok((
            figure("tps = ")?.parse()?,
            figure("number of transactions actually processed: ")?.parse()?,
        ))
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if let Some(postgres) = self.postgres.take() {
            self.runtime.block_on(postgres.stop());
        }
    }
}

/// Runs a program and returns its output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let piped = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = piped.stdin(Stdio::null()).spawn();
    let child = child.map_err(|error| format!("{:?}: {error}", command.get_program()))?;
    let pid = Pid::from_child(&child);
    let output = thread::scope(|scope| {
        let running = scope.spawn(|| child.wait_with_output());
        while !running.is_finished() {
            if check().is_err() {
                let _ = kill_process(pid, Signal::TERM);
            }
            thread::sleep(POLL_INTERVAL);
        }
        running.join()
    });
    let output = output.map_err(|_| "the thread waiting for a program panicked")??;
    check()?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{:?} failed: {error}", command.get_program()).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Starts the server and returns the milliseconds until its first successful response.
pub(crate) fn start_server(
    build: &Path,
    database: &Database,
    address: SocketAddr,
    directory: &Path,
    bcrypt_cost: u32,
) -> Result<(Process, f64)> {
    let log_path = directory.join(format!("server-{}.log", address.port()));
    let log = fs::File::create(&log_path)?;
    let begin = Instant::now();
    let mut command = Command::new(build);
    command
        .env_clear()
        .env(
            "DATABASE_URL",
            format!(
                "postgres://todo@{}:5432/todo?sslmode=disable",
                database.host
            ),
        )
        .env("JWT_SECRET", SECRET)
        .env("LISTEN_ADDR", address.to_string())
        .env("AUTH_RATE_PER_MINUTE", "0")
        .env("WRITES_PER_MINUTE", "0")
        .env("MAX_TASKS_PER_USER", "1000000000")
        .env("BCRYPT_COST", bcrypt_cost.to_string())
        .stdin(Stdio::null())
        .stderr(log);
    let process = Process::spawn(&mut command)?;
    await_response(address, "/readyz").map_err(|error| {
        let log = fs::read_to_string(&log_path).unwrap_or_default();
        format!("{error}; its log:\n{log}")
    })?;
    Ok((process, begin.elapsed().as_secs_f64() * 1e3))
}

/// Waits until a server is ready.
pub(crate) fn await_response(address: SocketAddr, path: &str) -> Result<()> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n");
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        check()?;
        let response = fetch(address, request.as_bytes());
        if response.is_ok_and(|(status, _)| status == 200) {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Err(format!("no successful response from {address} within 30 s").into())
}

/// Returns an unused address.
pub(crate) fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
