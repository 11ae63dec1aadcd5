//! `DATA_DIR`: its creation, its lock, the socket's directory, the JWT secret.

use std::{
    env,
    fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::geteuid;
use tokio::time::{Instant, sleep};

use super::{
    Error, OsUser,
    file::{is_trusted, open_own, replace_file},
    path_error,
};

/// The kernel takes a moment to release the lock of a killed service.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
const POLL_INTERVAL: Duration = Duration::from_millis(10);
const LOCK: &str = "lock";
pub(super) const SOCKET_NAME: &str = ".s.PGSQL.5432";
/// PostgreSQL's own limit is 1,023 bytes, for the longest path in the cluster.
const PATH_LIMIT: usize = 900;
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
    if !data_dir.exists() {
        let os_user = check_missing(data_dir)?;
        // The user that runs PostgreSQL has to pass through it, but need not list it.
        let mode = if os_user.is_some() { 0o711 } else { 0o700 };
        let mut directories = DirBuilder::new();
        let created = directories.recursive(true).mode(mode).create(data_dir);
        created
            // Undoes the umask.
            .and_then(|()| fs::set_permissions(data_dir, Permissions::from_mode(mode)))
            .map_err(path_error("create DATA_DIR", data_dir))?;
    }
    check(data_dir)
}

/// The deepest directory on the way to `data_dir` that exists.
pub(super) fn existing_ancestor(data_dir: &Path) -> PathBuf {
    let absolute = std::path::absolute(data_dir).unwrap_or_default();
    let mut ancestors = absolute.ancestors();
    ancestors
        .find_map(|ancestor| ancestor.canonicalize().ok())
        .unwrap_or_default()
}

/// Checks whether `DATA_DIR`, which does not exist, can be created.
pub(super) fn check_missing(data_dir: &Path) -> Result<Option<OsUser>, Error> {
    let existing = existing_ancestor(data_dir);
    if !existing.is_dir() {
        return Err(Error(format!(
            "cannot create DATA_DIR {}: {} is not a directory",
            data_dir.display(),
            existing.display()
        )));
    }
    let absolute = std::path::absolute(data_dir).map_err(path_error("find DATA_DIR", data_dir))?;
    check_length(&absolute)?;
    let os_user = OsUser::for_cluster(&absolute.join("cluster"))?;
    if let Some(os_user) = &os_user {
        os_user.check_traversable(&absolute)?;
    }
    Ok(os_user)
}

fn check_length(data_dir: &Path) -> Result<(), Error> {
    match data_dir.as_os_str().len() {
        0..=PATH_LIMIT => Ok(()),
        length => Err(Error(format!(
            "DATA_DIR is too long a path for PostgreSQL: {length} bytes, and at most {PATH_LIMIT} are possible"
        ))),
    }
}

/// Checks that `DATA_DIR`, which exists, is safe: no other user can have put a secret, a link or a
/// cluster there.
pub(super) fn check(data_dir: &Path) -> Result<(PathBuf, Option<OsUser>), Error> {
    let refuse = |reason: &str| Err(Error(format!("DATA_DIR {} {reason}", data_dir.display())));
    // Without a slash at the end, which would follow a link.
    let link = fs::symlink_metadata(data_dir.components().as_path());
    let link = link.map_err(path_error("find DATA_DIR", data_dir))?;
    let resolved = data_dir
        .canonicalize()
        .map_err(path_error("find DATA_DIR", data_dir))?;
    let meta = fs::metadata(&resolved).map_err(path_error("find DATA_DIR", data_dir))?;
    if !meta.is_dir() {
        return refuse("is not a directory");
    }
    if let Some(owner) = [link.uid(), meta.uid()]
        .iter()
        .find(|uid| !is_trusted(**uid))
    {
        let user = geteuid();
        return refuse(&format!(
            "belongs to another user (id {owner}) than runs todo-api (id {user}): \
             run todo-api as its owner, or set DATA_DIR to another directory"
        ));
    }
    // A group may share the directory of a user that is not root: each file's owner is checked.
    let group_is_root = meta.gid() == 0 || !geteuid().is_root();
    if meta.mode() & if group_is_root { 0o002 } else { 0o022 } != 0 {
        return refuse("can be written by other users: close it (chmod go-w)");
    }
    check_length(&resolved)?;
    let cluster = resolved.join("cluster");
    if fs::symlink_metadata(&cluster).is_ok_and(|meta| !meta.is_dir()) {
        return refuse("contains a “cluster” that is not a directory");
    }
    let os_user = OsUser::for_cluster(&cluster)?;
    if let Some(os_user) = &os_user {
        os_user.check_traversable(&resolved)?;
    }
    Ok((resolved, os_user))
}

/// Creates a directory that only `os_user` can enter, or makes an existing one so.
pub(super) fn create_private_dir(path: &Path, os_user: Option<&OsUser>) -> Result<(), Error> {
    let created = match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            match fs::symlink_metadata(path) {
                Ok(meta) if meta.is_dir() => Ok(()),
                _ => Err(error),
            }
        }
        created => created,
    };
    created
        // Undoes the umask.
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(0o700)))
        .map_err(path_error("create", path))?;
    os_user.map_or(Ok(()), |user| {
        lchown(path, Some(user.uid), Some(user.gid))
            .map_err(path_error("change the owner of", path))
    })
}

/// Locks `DATA_DIR`: two services on one directory would stop each other's PostgreSQL.
pub(super) async fn lock(data_dir: &Path) -> Result<File, Error> {
    let path = data_dir.join(LOCK);
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        let file = open_own(
            &path,
            OpenOptions::new().create(true).write(true).mode(0o600),
        )
        .map_err(|error| {
            Error(format!(
                "cannot use DATA_DIR {}: {error}",
                data_dir.display()
            ))
        })?;
        match file.try_lock() {
            // Otherwise a start that failed has removed the file meanwhile.
            Ok(()) if is_at(&file, &path) => return Ok(file),
            Ok(()) => {}
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

fn is_at(file: &File, path: &Path) -> bool {
    let inode = |meta: io::Result<fs::Metadata>| meta.ok().map(|meta| (meta.dev(), meta.ino()));
    inode(file.metadata()) == inode(fs::symlink_metadata(path))
}

/// Whether a service runs on this directory.
pub(super) fn is_locked(data_dir: &Path) -> bool {
    let lock = open_own(&data_dir.join(LOCK), OpenOptions::new().write(true));
    lock.is_ok_and(|lock| matches!(lock.try_lock(), Err(TryLockError::WouldBlock)))
}

/// Removes what a first start that failed has created below `existing`; the caller holds the lock.
pub(super) fn remove_new(data_dir: &Path, existing: &Path) {
    for file in [LOCK, "pg_hba.conf", "pg_ident.conf"] {
        fs::remove_file(data_dir.join(file)).ok();
    }
    // A directory that is not empty stays.
    let directories = data_dir.ancestors().take_while(|path| *path != existing);
    for directory in [&*data_dir.join("socket")].into_iter().chain(directories) {
        fs::remove_dir(directory).ok();
    }
}

/// Reads the secret that signs tokens; creates it if there is none.
pub fn jwt_secret(data_dir: &Path) -> Result<String, Error> {
    let (data_dir, _) = create(data_dir)?;
    let path = data_dir.join("jwt-secret");
    if fs::symlink_metadata(&path).is_err() {
        replace_file(&path, 0o600, &format!("{}\n", random_secret()?))?;
    }
    let mut file = open_own(&path, OpenOptions::new().read(true))?;
    let mode = file.metadata().map_err(path_error("read", &path))?.mode();
    if mode & 0o077 != 0 {
        return Err(Error(format!(
            "{} can be read by others: close it (chmod 600), or remove it for a new one",
            path.display()
        )));
    }
    let mut secret = String::new();
    file.read_to_string(&mut secret)
        .map_err(path_error("read", &path))?;
    let secret = secret.trim();
    if secret.len() < 32 {
        return Err(Error(format!(
            "{} has fewer than 32 bytes: remove it for a new one",
            path.display()
        )));
    }
    Ok(secret.to_owned())
}

fn random_secret() -> Result<String, Error> {
    let mut bytes = [0; 32];
    let source = Path::new("/dev/urandom");
    File::open(source)
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(path_error("read", source))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Creates the directory of the socket: in `DATA_DIR`, or in a temporary directory if the path is too long.
pub(super) fn create_socket_dir(
    data_dir: &Path,
    os_user: Option<&OsUser>,
) -> Result<PathBuf, Error> {
    let inside = data_dir.join("socket");
    if fits_a_socket(&inside) {
        create_private_dir(&inside, os_user)?;
        return Ok(inside);
    }
    let mut hash = DefaultHasher::new();
    data_dir.hash(&mut hash);
    let name = format!("todo-api-{:016x}", hash.finish());
    let outside = [env::temp_dir(), PathBuf::from("/tmp")]
        .into_iter()
        .map(|directory| directory.join(&name))
        .find(|path| fits_a_socket(path))
        .unwrap_or_default();
    // Anybody can create files there: another user's directory, or a link, is not used.
    let usable = fs::symlink_metadata(&outside).map_or(true, |meta| {
        meta.is_dir()
            && (is_trusted(meta.uid()) || os_user.is_some_and(|user| user.uid == meta.uid()))
    });
    let created = match usable {
        true => create_private_dir(&outside, os_user),
        false => Err(Error(format!(
            "{} belongs to another user",
            outside.display()
        ))),
    };
    created.map_err(|error| {
        Error(format!(
            "DATA_DIR {} is too long a path for a socket, and the directory used instead fails: {error}",
            data_dir.display()
        ))
    })?;
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
