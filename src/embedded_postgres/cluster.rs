//! A cluster: where it is, and its creation with initdb.

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
    path_error, run, socket_config,
};

const INITDB_TIMEOUT: Duration = Duration::from_secs(120);
/// Prefix of the directories in which initdb has not finished.
const UNFINISHED: &str = "cluster.unfinished-";

/// Where a cluster is and what it is run with.
#[derive(Clone)]
pub(super) struct Cluster {
    pub(super) data_dir: PathBuf,
    pub(super) directory: PathBuf,
    pub(super) socket_dir: PathBuf,
    pub(super) installation: Installation,
    pub(super) os_user: Option<OsUser>,
    pub(super) settings: Vec<String>,
}

impl Cluster {
    /// Finds the programs for the cluster, and creates it if it is missing.
    pub(super) async fn open(
        data_dir: PathBuf,
        os_user: Option<OsUser>,
        settings: &[(&str, &str)],
    ) -> Result<Cluster, Error> {
        let directory = data_dir.join("cluster");
        let installation = Installation::find(&directory).await?;
        let socket_dir = create_socket_dir(&data_dir, os_user.as_ref())?;
        let mut all_settings = access::write_rules(&data_dir)?;
        all_settings.extend(
            settings
                .iter()
                .map(|(name, value)| format!("{name}={value}")),
        );
        let cluster = Cluster {
            data_dir,
            directory,
            socket_dir,
            installation,
            os_user,
            settings: all_settings,
        };
        if !cluster.directory.exists() {
            cluster.init().await?;
        }
        Ok(cluster)
    }

    /// Runs initdb in a temporary directory and renames the result: an interrupted run never counts.
    async fn init(&self) -> Result<(), Error> {
        info!(
            "creating a PostgreSQL {} cluster in {}",
            self.installation.version,
            self.directory.display()
        );
        self.remove_unfinished();
        let unfinished = self
            .data_dir
            .join(format!("{UNFINISHED}{}", std::process::id()));
        // Not every system has C.UTF-8; plain C sorts the same way.
        let result = match self.initdb(&unfinished, "--locale=C.UTF-8").await {
            Err(Error(reason)) if reason.contains("locale") => {
                self.initdb(&unfinished, "--no-locale").await
            }
            result => result,
        };
        if result.is_err() {
            self.remove_unfinished();
        }
        result?;
        fs::rename(&unfinished, &self.directory).map_err(path_error("create", &self.directory))?;
        // The new name must survive a power cut as the files in it do.
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
            // These rules apply only if the cluster is started without ours (`access`).
            "--auth-local=peer",
            "--auth-host=reject",
            &format!("--username={SUPERUSER}"),
        ]);
        let output = run(command, INITDB_TIMEOUT).await.map_err(path_error(
            "run",
            &self.installation.directory.join("initdb"),
        ))?;
        if output.status.success() {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        Err(Error(format!(
            "initdb failed in {}: {}",
            self.data_dir.display(),
            first_error_line(&stderr).unwrap_or_else(|| output.status.to_string())
        )))
    }

    /// Removes what interrupted runs of initdb have left. A directory that cannot be removed is
    /// harmless: the next has another name.
    fn remove_unfinished(&self) {
        for entry in fs::read_dir(&self.data_dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED)
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                warn!("cannot remove {}: {error}", entry.path().display());
            }
        }
    }

    /// One of PostgreSQL's programs, run by the user that owns the cluster. If this process dies, it
    /// receives `signal`.
    pub(super) fn command(&self, program: &str, signal: Signal) -> Command {
        let mut command = child::command(&self.installation.directory.join(program), signal);
        command
            // The environment has secrets in it, and variables such as PGPORT would change settings.
            .env_clear()
            .envs(env::var_os("PATH").map(|path| ("PATH", path)))
            .env("LC_ALL", "C")
            // The user may not be allowed in the current directory.
            .current_dir("/")
            // Ctrl-C on a terminal signals a whole process group; only the service handles it.
            .process_group(0);
        if let Some(user) = &self.os_user {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    pub(super) fn config(&self, database: &str) -> tokio_postgres::Config {
        socket_config(&self.socket_dir, database)
    }

    /// Removes a socket directory outside of `DATA_DIR`.
    pub(super) fn remove_external_socket_dir(&self) {
        if !self.socket_dir.starts_with(&self.data_dir)
            && let Err(error) = fs::remove_dir(&self.socket_dir)
        {
            warn!("cannot remove {}: {error}", self.socket_dir.display());
        }
    }
}

/// The first line in which one of PostgreSQL's programs reports an error; later errors are its consequences.
pub(super) fn first_error_line(text: &str) -> Option<String> {
    const LEVELS: [&str; 3] = ["FATAL:", "PANIC:", "error:"];
    let is_error = |line: &&str| {
        // Not the refusal of a client that came too early.
        LEVELS.iter().any(|level| line.contains(level)) && !line.contains("the database system is")
    };
    let line = text
        .lines()
        .find(is_error)
        .or_else(|| text.lines().rev().find(|line| !line.trim().is_empty()))?;
    // Without PostgreSQL's time and process id in front.
    let start = LEVELS[..2].iter().find_map(|level| line.find(level));
    Some(line[start.unwrap_or(0)..].trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn returns_the_first_line_that_is_an_error() {
        let log = "2026-01-01 10:00:00.000 UTC [7] LOG:  starting\n\
                   2026-01-01 10:00:00.000 UTC [9] FATAL:  the database system is starting up\n\
                   2026-01-01 10:00:00.000 UTC [7] FATAL:  No space left on device\n\
                   2026-01-01 10:00:00.000 UTC [7] PANIC:  cannot abort transaction 1\n\
                   2026-01-01 10:00:00.000 UTC [7] LOG:  database system is shut down\n";
        assert_eq!(
            first_error_line(log).as_deref(),
            Some("FATAL:  No space left on device")
        );
        assert_eq!(
            first_error_line("postgres: not found\n\n").as_deref(),
            Some("postgres: not found")
        );
        assert_eq!(first_error_line("\n"), None);
    }
}
