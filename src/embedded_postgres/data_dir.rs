//! `DATA_DIR`: its creation, its lock, the socket's directory, the JWT secret.

use std::{
    env,
    fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::geteuid;
use tokio::time::{Instant, sleep};

use super::{Error, OsUser, path_error};

/// The kernel takes a moment to release the lock of a killed service.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
const POLL_INTERVAL: Duration = Duration::from_millis(10);
pub(super) const SOCKET_NAME: &str = ".s.PGSQL.5432";
/// The shortest `sun_path` of the supported systems is macOS's: 104 bytes with the final NUL.
const SOCKET_PATH_LIMIT: usize = 103;

/// The default of `DATA_DIR`: `.todo-api` in the current directory, or `/var/lib/todo-api` if the
/// service is root and the user that runs PostgreSQL cannot reach the current directory.
pub fn default_data_dir() -> PathBuf {
    let closed = geteuid().is_root()
        && env::current_dir().is_ok_and(|here| {
            OsUser::unprivileged().is_some_and(|user| user.check_traversable(&here).is_err())
        });
    PathBuf::from(if closed {
        "/var/lib/todo-api"
    } else {
        ".todo-api"
    })
}

/// Creates `DATA_DIR` if it is missing. Returns its absolute path and the user that runs PostgreSQL in it.
pub(super) fn create(data_dir: &Path) -> Result<(PathBuf, Option<OsUser>), Error> {
    let os_user = OsUser::for_cluster(&data_dir.join("cluster"))?;
    if !data_dir.exists() {
        if let Some(os_user) = &os_user {
            // Before anything is created in a directory that cannot be used.
            let absolute =
                std::path::absolute(data_dir).map_err(path_error("find DATA_DIR", data_dir))?;
            os_user.check_traversable(&absolute)?;
        }
        // The user that runs PostgreSQL has to pass through it, but need not list it.
        let mode = if os_user.is_some() { 0o711 } else { 0o700 };
        create_dir(data_dir, mode).map_err(path_error("create DATA_DIR", data_dir))?;
    }
    if !data_dir.is_dir() {
        return Err(Error(format!(
            "DATA_DIR {} is not a directory",
            data_dir.display()
        )));
    }
    let data_dir = data_dir
        .canonicalize()
        .map_err(path_error("find DATA_DIR", data_dir))?;
    if let Some(os_user) = &os_user {
        // Again, now that links are resolved and the umask has been applied.
        os_user.check_traversable(&data_dir)?;
    }
    Ok((data_dir, os_user))
}

pub(super) fn create_dir(path: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(path)?;
    // Undoes the umask.
    fs::set_permissions(path, Permissions::from_mode(mode))
}

pub(super) fn chown_to(path: &Path, os_user: Option<&OsUser>) -> Result<(), Error> {
    os_user.map_or(Ok(()), |user| {
        chown(path, Some(user.uid), Some(user.gid)).map_err(path_error("change the owner of", path))
    })
}

/// Locks `DATA_DIR`: two services on one directory would stop each other's PostgreSQL.
pub(super) async fn lock(data_dir: &Path) -> Result<File, Error> {
    let path = data_dir.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(path_error("open", &path))?;
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(path_error("lock", &path)(error)),
            Err(TryLockError::WouldBlock) if Instant::now() > deadline => {
                return Err(Error(format!(
                    "another todo-api runs on DATA_DIR {}",
                    data_dir.display()
                )));
            }
            Err(TryLockError::WouldBlock) => sleep(POLL_INTERVAL).await,
        }
    }
}

/// Whether a service runs on this directory.
pub(super) fn is_locked(data_dir: &Path) -> bool {
    let lock = OpenOptions::new().write(true).open(data_dir.join("lock"));
    lock.is_ok_and(|lock| matches!(lock.try_lock(), Err(TryLockError::WouldBlock)))
}

/// Reads the secret that signs tokens; creates it if there is none.
pub fn jwt_secret(data_dir: &Path) -> Result<String, Error> {
    let (data_dir, _) = create(data_dir)?;
    let path = data_dir.join("jwt-secret");
    if !path.exists() {
        create_secret(&data_dir, &path).map_err(path_error("create", &path))?;
    }
    let mode = fs::metadata(&path)
        .map_err(path_error("read", &path))?
        .mode();
    if mode & 0o077 != 0 {
        return Err(Error(format!(
            "{} can be read by others: close it (chmod 600), or remove it for a new one",
            path.display()
        )));
    }
    let secret = fs::read_to_string(&path).map_err(path_error("read", &path))?;
    let secret = secret.trim();
    if secret.len() < 32 {
        return Err(Error(format!(
            "{} has fewer than 32 bytes: remove it for a new one",
            path.display()
        )));
    }
    Ok(secret.to_owned())
}

/// Writes the secret under a temporary name first, so that a partial secret is never used.
fn create_secret(data_dir: &Path, path: &Path) -> io::Result<()> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();

    let unfinished = data_dir.join(format!("jwt-secret.unfinished-{}", std::process::id()));
    let written = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&unfinished)
        .and_then(|mut file| {
            writeln!(file, "{hex}")?;
            file.sync_all()
        })
        // A link, unlike a rename, does not replace what another process created meanwhile.
        .and_then(|()| match fs::hard_link(&unfinished, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            linked => linked,
        });
    let removed = fs::remove_file(&unfinished);
    written.and(removed)
}

/// Creates the directory of the socket: in `DATA_DIR`, or in a temporary directory if the path is too long.
pub(super) fn create_socket_dir(
    data_dir: &Path,
    os_user: Option<&OsUser>,
) -> Result<PathBuf, Error> {
    let inside = data_dir.join("socket");
    if fits_a_socket(&inside) {
        create_dir(&inside, 0o700).map_err(path_error("create", &inside))?;
        chown_to(&inside, os_user)?;
        return Ok(inside);
    }
    let mut hash = DefaultHasher::new();
    data_dir.hash(&mut hash);
    let name = format!("todo-api-{:016x}", hash.finish());
    let outside = [env::temp_dir(), PathBuf::from("/tmp")]
        .into_iter()
        .map(|directory| directory.join(&name))
        .find(|path| fits_a_socket(path))
        .ok_or_else(|| {
            Error(format!(
                "the path of DATA_DIR {} is too long",
                data_dir.display()
            ))
        })?;
    // Anybody can create files there: another user's directory, or a link, is not used.
    let created = DirBuilder::new().mode(0o700).create(&outside);
    let meta = created
        .or_else(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Ok(()),
            _ => Err(error),
        })
        .and_then(|()| fs::symlink_metadata(&outside))
        .map_err(path_error("create", &outside))?;
    let us = geteuid().as_raw();
    let owners = [us, os_user.map_or(us, |user| user.uid)];
    if !meta.is_dir() || !owners.contains(&meta.uid()) || meta.mode() & 0o077 != 0 {
        return Err(Error(format!(
            "{} is needed for the socket (DATA_DIR is too long a path) and belongs to another user",
            outside.display()
        )));
    }
    chown_to(&outside, os_user)?;
    Ok(outside)
}

/// Whether a socket in this directory has a valid path, which the quotes around it in the setting can hold.
fn fits_a_socket(directory: &Path) -> bool {
    directory.join(SOCKET_NAME).as_os_str().len() <= SOCKET_PATH_LIMIT
        && directory.to_str().is_some_and(|path| !path.contains('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_path_has_its_limit() {
        let longest = SOCKET_PATH_LIMIT - "/".len() - SOCKET_NAME.len();
        assert!(fits_a_socket(Path::new(&"x".repeat(longest))));
        assert!(!fits_a_socket(Path::new(&"x".repeat(longest + 1))));
    }
}
