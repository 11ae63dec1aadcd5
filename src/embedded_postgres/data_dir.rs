//! `DATA_DIR`: its creation and checks, its lock, the socket directory and the JWT secret.

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
use uuid::Uuid;

use super::{
    Error, OsUser,
    file::{is_trusted, open_own, replace_file},
    path_error,
};

/// The kernel may take a moment to release the lock of a killed service.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
const POLL_INTERVAL: Duration = Duration::from_millis(10);
const LOCK: &str = "lock";
pub(super) const SOCKET_NAME: &str = ".s.PGSQL.5432";
/// PostgreSQL's limit is 1,023 bytes for the longest path in the cluster.
const PATH_LIMIT: usize = 900;
/// macOS has the shortest `sun_path` of the supported systems: 104 bytes including the final NUL.
const SOCKET_PATH_LIMIT: usize = 103;

/// The default of `DATA_DIR`: `.todo-api` in the current directory, or `/var/lib/todo-api` if the
/// service is root and the user that runs PostgreSQL cannot reach the current directory.
pub fn default_data_dir() -> PathBuf {
    let mut users = OsUser::unprivileged();
    let is_closed = geteuid().is_root()
        && env::current_dir().is_ok_and(|here| {
            let user = users.next();
            user.is_some_and(|user| user.check_traversable(&here).is_err())
        });
    let directory = if is_closed {
        "/var/lib/todo-api"
    } else {
        ".todo-api"
    };
    directory.into()
}

/// Creates `DATA_DIR` if it is missing. Returns its absolute path and the user that runs PostgreSQL in it.
pub(super) fn create(data_dir: &Path) -> Result<(PathBuf, Option<OsUser>), Error> {
    if !data_dir.exists() {
        let os_user = check_missing(data_dir)?;
        // The user that runs PostgreSQL must be able to traverse the directory, but not to list it.
        let mode = if os_user.is_some() { 0o711 } else { 0o700 };
        let mut builder = DirBuilder::new();
        let created = builder.recursive(true).mode(mode).create(data_dir);
        created
            // Unlike the mode passed to `mkdir`, these permissions are not subject to the umask.
            .and_then(|()| fs::set_permissions(data_dir, Permissions::from_mode(mode)))
            .map_err(path_error("create DATA_DIR", data_dir))?;
    }
    check(data_dir)
}

/// The deepest ancestor of `data_dir` that exists.
pub(super) fn existing_ancestor(data_dir: &Path) -> PathBuf {
    let absolute = std::path::absolute(data_dir).unwrap_or_default();
    let existing = absolute
        .ancestors()
        .find_map(|path| path.canonicalize().ok());
    existing.unwrap_or_default()
}

/// Checks whether `DATA_DIR`, which does not exist yet, can be created.
pub(super) fn check_missing(data_dir: &Path) -> Result<Option<OsUser>, Error> {
    let existing = existing_ancestor(data_dir);
    if !existing.is_dir() {
        let (data_dir, existing) = (data_dir.display(), existing.display());
        return Err(format!(
            "cannot create DATA_DIR {data_dir}: {existing} is not a directory"
        ));
    }
    check_path(&std::path::absolute(data_dir).map_err(path_error("find DATA_DIR", data_dir))?)
}

/// Checks that PostgreSQL can use the absolute path, and returns the user that runs it.
fn check_path(data_dir: &Path) -> Result<Option<OsUser>, Error> {
    let length = data_dir.as_os_str().len();
    if length > PATH_LIMIT {
        return Err(format!(
            "DATA_DIR is too long a path for PostgreSQL: {length} bytes, the limit is {PATH_LIMIT}"
        ));
    }
    let os_user = OsUser::for_cluster(&data_dir.join("cluster"))?;
    if let Some(os_user) = &os_user {
        os_user.check_traversable(data_dir)?;
    }
    Ok(os_user)
}

/// Checks that an existing `DATA_DIR` is safe, meaning that no other user can have created files in
/// it.
pub(super) fn check(data_dir: &Path) -> Result<(PathBuf, Option<OsUser>), Error> {
    let refuse = |reason: &str| Err(format!("DATA_DIR {} {reason}", data_dir.display()));
    // Components omit a trailing slash, which would follow a symbolic link.
    let link = fs::symlink_metadata(data_dir.components().as_path());
    let link = link.map_err(path_error("find DATA_DIR", data_dir))?;
    let resolved = data_dir.canonicalize();
    let resolved = resolved.map_err(path_error("find DATA_DIR", data_dir))?;
    let meta = fs::metadata(&resolved).map_err(path_error("find DATA_DIR", data_dir))?;
    if !meta.is_dir() {
        return refuse("is not a directory");
    }
    if let Some(owner) = [link.uid(), meta.uid()]
        .into_iter()
        .find(|uid| !is_trusted(*uid))
    {
        let user = geteuid();
        return refuse(&format!(
            "belongs to another user (id {owner}), but todo-api runs as user id {user}: \
             run todo-api as the owner, or set DATA_DIR to another directory"
        ));
    }
    // Group write access is allowed unless root runs the service, because the owner of each file is
    // checked.
    let group_is_root = meta.gid() == 0 || !geteuid().is_root();
    if meta.mode() & if group_is_root { 0o002 } else { 0o022 } != 0 {
        return refuse("is writable by other users: restrict its permissions (chmod go-w)");
    }
    if fs::symlink_metadata(resolved.join("cluster")).is_ok_and(|meta| !meta.is_dir()) {
        return refuse("contains a “cluster” that is not a directory");
    }
    let os_user = check_path(&resolved)?;
    Ok((resolved, os_user))
}

/// Creates a directory that only `os_user` can enter, or restricts an existing one accordingly.
pub(super) fn create_private_dir(path: &Path, os_user: Option<&OsUser>) -> Result<(), Error> {
    let is_directory = || fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    let created = match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_directory() => Ok(()),
        created => created,
    };
    created
        // Unlike the mode passed to `mkdir`, these permissions are not subject to the umask.
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(0o700)))
        .map_err(path_error("create", path))?;
    let Some(user) = os_user else { return Ok(()) };
    let changed = lchown(path, Some(user.uid), Some(user.gid));
    changed.map_err(path_error("change the owner of", path))
}

/// Locks `DATA_DIR`. Two services sharing a directory would stop each other's PostgreSQL.
pub(super) async fn lock(data_dir: &Path) -> Result<File, Error> {
    let path = data_dir.join(LOCK);
    let data_dir = data_dir.display();
    let mut options = OpenOptions::new();
    options.create(true).write(true).mode(0o600);
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        let file = open_own(&path, &options)
            .map_err(|error| format!("cannot use DATA_DIR {data_dir}: {error}"))?;
        match file.try_lock() {
            Ok(()) if is_at(&file, &path) => return Ok(file),
            // A failed start has removed the file since it was opened.
            Ok(()) => {}
            Err(TryLockError::Error(error)) => return Err(path_error("lock", &path)(error)),
            Err(TryLockError::WouldBlock) if Instant::now() > deadline => {
                return Err(format!("another todo-api is using DATA_DIR {data_dir}"));
            }
            Err(TryLockError::WouldBlock) => sleep(POLL_INTERVAL).await,
        }
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let inode = |meta: io::Result<fs::Metadata>| meta.ok().map(|meta| (meta.dev(), meta.ino()));
    inode(file.metadata()) == inode(fs::symlink_metadata(path))
}

pub(super) fn is_locked(data_dir: &Path) -> bool {
    let lock = open_own(&data_dir.join(LOCK), OpenOptions::new().write(true));
    lock.is_ok_and(|lock| matches!(lock.try_lock(), Err(TryLockError::WouldBlock)))
}

/// Removes everything that a failed first start created below `existing`. The caller holds the
/// lock.
pub(super) fn remove_new(data_dir: &Path, existing: &Path) {
    for file in [LOCK, "pg_hba.conf", "pg_ident.conf"] {
        fs::remove_file(data_dir.join(file)).ok();
    }
    // Directories that are not empty are kept.
    let directories = data_dir.ancestors().take_while(|path| *path != existing);
    for directory in [&*data_dir.join("socket")].into_iter().chain(directories) {
        fs::remove_dir(directory).ok();
    }
}

/// Reads the secret that signs tokens, creating it if it is missing.
pub fn jwt_secret(data_dir: &Path) -> Result<String, Error> {
    let path = create(data_dir)?.0.join("jwt-secret");
    if fs::symlink_metadata(&path).is_err() {
        // Each of the two has 122 random bits.
        let secret = [Uuid::new_v4(), Uuid::new_v4()].map(|half| half.simple().to_string());
        replace_file(&path, 0o600, &format!("{}\n", secret.concat()))?;
    }
    let mut file = open_own(&path, OpenOptions::new().read(true))?;
    let mode = file.metadata().map_err(path_error("read", &path))?.mode();
    let mut secret = String::new();
    file.read_to_string(&mut secret)
        .map_err(path_error("read", &path))?;
    let secret = secret.trim();
    let reason = if mode & 0o077 != 0 {
        "is readable by other users: restrict its permissions (chmod 600), or remove it so that a new one is created"
    } else if secret.len() < 32 {
        "has fewer than 32 bytes: remove it so that a new one is created"
    } else {
        return Ok(secret.to_owned());
    };
    Err(format!("{} {reason}", path.display()))
}

/// Creates the socket directory: in `DATA_DIR`, or in a temporary directory if that path is too
/// long.
pub(super) fn create_socket_dir(
    data_dir: &Path,
    os_user: Option<&OsUser>,
) -> Result<PathBuf, Error> {
    let mut hash = DefaultHasher::new();
    data_dir.hash(&mut hash);
    let name = format!("todo-api-{:016x}", hash.finish());
    let temporary = [env::temp_dir(), "/tmp".into()].map(|directory| directory.join(&name));
    let directory = [data_dir.join("socket")]
        .into_iter()
        .chain(temporary)
        .find(|path| is_valid_socket_dir(path))
        .ok_or_else(|| {
            format!(
                "DATA_DIR {} is too long a path for a socket",
                data_dir.display()
            )
        })?;
    // Every user can create files in a temporary directory.
    let is_usable = |meta: fs::Metadata| {
        let is_own = is_trusted(meta.uid()) || os_user.is_some_and(|user| user.uid == meta.uid());
        meta.is_dir() && is_own
    };
    if !fs::symlink_metadata(&directory).map_or(true, is_usable) {
        let directory = directory.display();
        return Err(format!(
            "{directory} is not a directory of this user: remove it"
        ));
    }
    create_private_dir(&directory, os_user)?;
    Ok(directory)
}

/// Returns whether a socket path in this directory is short enough, and the directory can be quoted
/// in the setting.
fn is_valid_socket_dir(directory: &Path) -> bool {
    directory.join(SOCKET_NAME).as_os_str().len() <= SOCKET_PATH_LIMIT
        && directory.to_str().is_some_and(|path| !path.contains('"'))
}
