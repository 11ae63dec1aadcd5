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

/// Where distributions install PostgreSQL: directories with subdirectories that begin with the
/// name and contain `bin`.
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
    /// The newest on this machine that fits the cluster: the same major version, or any supported
    /// version for a new cluster.
    pub(super) async fn find(cluster: &Path) -> Result<Installation, Error> {
        let wanted = match file::read(&cluster.join("PG_VERSION")) {
            Ok(version) => Some(major_minor(&version).0),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(path_error("read", &cluster.join("PG_VERSION"))(error)),
        };
        let found = Installation::all().await;
        let newest = found
            .iter()
            .filter(|installation| {
                let major = major_minor(&installation.version).0;
                wanted.map_or(major >= MIN_MAJOR, |wanted| major == wanted)
            })
            .max_by_key(|installation| major_minor(&installation.version));
        if let Some(installation) = newest {
            return Ok(installation.clone());
        }
        let mut versions: Vec<_> = found.iter().map(|found| found.version.as_str()).collect();
        versions.dedup();
        let there = match versions.join(", ") {
            none if none.is_empty() => String::new(),
            versions => format!(" (there is {versions})"),
        };
        Err(Error(match wanted {
            Some(major) => format!(
                "the data in {} was written by PostgreSQL {major}, which is not installed{there}: \
                 install it as well (Debian, Ubuntu: apt install postgresql-{major}; macOS: brew install postgresql@{major}), \
                 then move the data as docs/operations.md says under “A new major version of PostgreSQL”",
                cluster.display()
            ),
            None => format!(
                "no PostgreSQL {MIN_MAJOR} or later on this machine{there}: install it \
                 (Debian, Ubuntu: apt install postgresql; macOS: brew install postgresql@17) or set DATABASE_URL"
            ),
        }))
    }

    async fn all() -> Vec<Installation> {
        let mut directories: Vec<PathBuf> = env::var_os("PATH")
            .map(|path| env::split_paths(&path).collect())
            .unwrap_or_default();
        for (parent, prefix) in SEARCH_PATHS {
            for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().starts_with(prefix) {
                    directories.push(entry.path().join("bin"));
                }
            }
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

/// `15.8` out of `postgres (PostgreSQL) 15.8 (Debian 15.8-0+deb12u1)`.
async fn version_of(postgres: &Path) -> Option<String> {
    let mut command = Command::new(postgres);
    command.arg("--version");
    let output = run(command, VERSION_TIMEOUT).await.ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.split_whitespace().nth(2).map(str::to_owned)
}

/// (15, 8) of `15.8`, (18, 0) of `18beta1`.
fn major_minor(version: &str) -> (u32, u32) {
    let mut numbers = version
        .trim()
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    let major = numbers.next().unwrap_or(0);
    let minor = if version.contains('.') {
        numbers.next()
    } else {
        None
    };
    (major, minor.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        assert!(major_minor("16.10") > major_minor("16.9"));
        assert!(major_minor("16.0") > major_minor("9.6"));
        assert_eq!(major_minor("18beta1"), (18, 0));
        assert_eq!(major_minor("15\n"), (15, 0));
        assert_eq!(major_minor("PostgreSQL"), (0, 0));
    }
}
