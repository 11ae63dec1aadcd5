//! A cluster and its creation with initdb.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    time::Duration,
};

use log::{info, warn};
use rustix::process::Signal;
use tokio::process::Command;

use super::{
    Error, Installation, OsUser, SUPERUSER, access, child,
    data_dir::{create_private_dir, create_socket_dir},
    path_error, run,
};

/// Long enough to write about 40 MB to a slow disk.
const INITDB_TIMEOUT: Duration = Duration::from_secs(120);
/// Prefix of the directories in which initdb has not finished.
const UNFINISHED: &str = "cluster.unfinished-";

/// A cluster, and the programs, the user and the settings that run it.
#[derive(Clone)]
pub(super) struct Cluster {
    pub(super) data_dir: PathBuf,
    pub(super) directory: PathBuf,
    pub(super) socket_dir: PathBuf,
    pub(super) installation: Installation,
    os_user: Option<OsUser>,
    /// Additional settings, as `name=value`.
    pub(super) settings: Vec<String>,
}

impl Cluster {
    /// Finds the programs for the cluster, and creates the cluster if it is missing.
    pub(super) async fn open(
        data_dir: PathBuf,
        os_user: Option<OsUser>,
        settings: &[(&str, &str)],
    ) -> Result<Cluster, Error> {
        let directory = data_dir.join("cluster");
        let installation = Installation::find(&directory).await?;
        let socket_dir = create_socket_dir(&data_dir, os_user.as_ref())?;
        let rules = access::write_rules(&data_dir)?.into_iter();
        let settings = settings
            .iter()
            .map(|(name, value)| format!("{name}={value}"));
        let cluster = Cluster {
            settings: rules.chain(settings).collect(),
            data_dir,
            directory,
            socket_dir,
            installation,
            os_user,
        };
        if !cluster.directory.exists() {
            cluster.init().await?;
        }
        Ok(cluster)
    }

    /// Runs initdb in a temporary directory and renames it, so that the cluster is never incomplete.
    async fn init(&self) -> Result<(), Error> {
        let (version, directory) = (&self.installation.version, self.directory.display());
        info!("creating a PostgreSQL {version} cluster in {directory}");
        let name = format!("{UNFINISHED}{}", std::process::id());
        let unfinished = self.data_dir.join(name);
        // Not every system has C.UTF-8; plain C sorts the same way.
        let result = match self.initdb(&unfinished, "--locale=C.UTF-8").await {
            Err(reason) if reason.contains("locale") => {
                self.initdb(&unfinished, "--no-locale").await
            }
            result => result,
        };
        if result.is_err() {
            self.remove_unfinished();
        }
        result?;
        fs::rename(&unfinished, &self.directory).map_err(path_error("create", &self.directory))?;
        // The new name must survive a power failure, as the files do.
        File::open(&self.data_dir)
            .and_then(|directory| directory.sync_all())
            .map_err(path_error("sync", &self.data_dir))
    }

    async fn initdb(&self, directory: &Path, locale: &str) -> Result<(), Error> {
        self.remove_unfinished();
        create_private_dir(directory, self.os_user.as_ref())?;
        let mut command = self.command("initdb", Signal::INT);
        command.arg("--pgdata").arg(directory).args([
            "--encoding=UTF8",
            locale,
            // These rules apply only to a server that is started without the rules of `access`.
            "--auth-local=peer",
            "--auth-host=reject",
            &format!("--username={SUPERUSER}"),
        ]);
        let output = run(command, INITDB_TIMEOUT).await;
        let output = output.map_err(path_error("run initdb in", &self.data_dir))?;
        if output.status.success() {
            return Ok(());
        }
        let reason = first_error_line(&String::from_utf8_lossy(&output.stderr));
        let reason = reason.unwrap_or_else(|| output.status.to_string());
        let data_dir = self.data_dir.display();
        Err(format!("initdb failed in {data_dir}: {reason}"))
    }

    /// Removes the directories of interrupted runs of initdb. A directory that cannot be removed does
    /// no harm, because the next run uses another name.
    fn remove_unfinished(&self) {
        for entry in fs::read_dir(&self.data_dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED)
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                warn!("cannot remove {}: {error}", entry.path().display());
            }
        }
    }

    /// A command that runs one of PostgreSQL's programs as the owner of the cluster, and that receives
    /// `signal` if this process ends.
    pub(super) fn command(&self, program: &str, signal: Signal) -> Command {
        let mut command = child::command(&self.installation.directory.join(program), signal);
        command
            // The environment contains secrets, and variables such as PGPORT would change settings.
            .env_clear()
            .envs(env::var_os("PATH").map(|path| ("PATH", path)))
            .env("LC_ALL", "C")
            // The user may not have access to the current directory.
            .current_dir("/")
            // Ctrl-C signals the terminal's foreground process group; only the service handles it.
            .process_group(0);
        if let Some(user) = &self.os_user {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    /// Removes the socket directory if it is outside of `DATA_DIR`.
    pub(super) fn remove_external_socket_dir(&self) {
        if !self.socket_dir.starts_with(&self.data_dir)
            && let Err(error) = fs::remove_dir(&self.socket_dir)
        {
            warn!("cannot remove {}: {error}", self.socket_dir.display());
        }
    }
}

/// The first line in which one of PostgreSQL's programs reports an error: later errors follow from it.
pub(super) fn first_error_line(text: &str) -> Option<String> {
    const LEVELS: [&str; 3] = ["FATAL:", "PANIC:", "error:"];
    let is_error = |line: &&str| {
        // Ignores the rejection of a client that connected too early.
        LEVELS.iter().any(|level| line.contains(level)) && !line.contains("the database system is")
    };
    let line = text
        .lines()
        .find(is_error)
        .or_else(|| text.lines().rev().find(|line| !line.trim().is_empty()))?;
    // Omits the time and the process id in front.
    let start = LEVELS[..2].iter().find_map(|level| line.find(level));
    Some(line[start.unwrap_or(0)..].trim().to_owned())
}
