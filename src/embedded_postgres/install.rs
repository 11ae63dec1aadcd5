//! PostgreSQL's programs on this machine.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::process::Command;

use super::{Error, file, path_error, run};

const MIN_MAJOR: u32 = 13;
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

/// Where distributions install PostgreSQL: a parent directory, and the prefix of the subdirectories
/// whose `bin` contains the programs.
const SEARCH_PATHS: [(&str, &str); 8] = [
    ("/usr/lib/postgresql", ""),
    ("/usr", "pgsql-"),
    ("/usr/lib", "postgresql"),
    ("/usr/local", "pgsql"),
    ("/opt/homebrew/opt", "postgresql"),
    ("/usr/local/opt", "postgresql"),
    ("/home/linuxbrew/.linuxbrew/opt", "postgresql"),
    ("/Applications/Postgres.app/Contents/Versions", ""),
];

/// PostgreSQL's programs of one version.
#[derive(Clone)]
pub(super) struct Installation {
    pub(super) directory: PathBuf,
    pub(super) version: String,
}

impl Installation {
    /// Finds the newest installation that can run the cluster: one of the cluster's major version,
    /// or any supported version for a new cluster.
    pub(super) async fn find(cluster: &Path) -> Result<Installation, Error> {
        let version_file = cluster.join("PG_VERSION");
        let required = match file::read(&version_file) {
            Ok(version) => Some(major_minor(&version).0),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(path_error("read", &version_file)(error)),
        };
        let mut found = Installation::find_all().await;
        found.sort_by_key(|installation| major_minor(&installation.version));
        let is_suitable = |installation: &&Installation| {
            let (major, _) = major_minor(&installation.version);
            required.map_or(major >= MIN_MAJOR, |required| major == required)
        };
        if let Some(newest) = found.iter().rfind(is_suitable) {
            return Ok(newest.clone());
        }
        let mut versions: Vec<_> = found.iter().map(|found| found.version.as_str()).collect();
        versions.dedup();
        let installed = match versions.join(", ") {
            none if none.is_empty() => none,
            versions => format!(" (installed: {versions})"),
        };
        Err(match required {
            Some(major) => format!(
                "the data in {} was written by PostgreSQL {major}, which is not installed{installed}: \
                 install it as well (Debian, Ubuntu: apt install postgresql-{major}; macOS: brew install postgresql@{major}), \
                 then move the data as docs/operations.md says under “A new major version of PostgreSQL”",
                cluster.display()
            ),
            None => format!(
                "there is no PostgreSQL {MIN_MAJOR} or later on this machine{installed}: install it \
                 (Debian, Ubuntu: apt install postgresql; macOS: brew install postgresql@17) or set DATABASE_URL"
            ),
        })
    }

    async fn find_all() -> Vec<Installation> {
        let path = env::var_os("PATH").unwrap_or_default();
        let mut directories: Vec<PathBuf> = env::split_paths(&path).collect();
        for (parent, prefix) in SEARCH_PATHS {
            let entries = fs::read_dir(parent).into_iter().flatten().flatten();
            let entries = entries.filter(|e| e.file_name().to_string_lossy().starts_with(prefix));
            directories.extend(entries.map(|entry| entry.path().join("bin")));
        }
        let mut found = Vec::new();
        for directory in directories {
            if directory.is_absolute()
                && directory.join("initdb").is_file()
                && let Some(version) = version_of(&directory.join("postgres")).await
            {
                found.push(Installation { directory, version });
            }
        }
        found
    }
}

/// Returns `15.8` if the program prints `postgres (PostgreSQL) 15.8 (Debian 15.8-0+deb12u1)`.
async fn version_of(postgres: &Path) -> Option<String> {
    let mut command = Command::new(postgres);
    command.arg("--version");
    let output = run(command, VERSION_TIMEOUT).await.ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.split_whitespace().nth(2).map(str::to_owned)
}

/// Parses `15.8` as (15, 8) and `18beta1` as (18, 0).
fn major_minor(version: &str) -> (u32, u32) {
    let (major, minor) = version.split_once('.').unwrap_or((version, ""));
    let number = |text: &str| {
        let digits = text.split(|c: char| !c.is_ascii_digit()).next();
        digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
    };
    (number(major), number(minor))
}
