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
    let is_closed = geteuid().is_root()
        && env::current_dir().is_ok_and(|here| {
            OsUser::unprivileged()
                .next()
                .is_some_and(|user| user.check_traversable(&here).is_err())
        });
    match is_closed {
        true => "/var/lib/todo-api".into(),
        false => ".todo-api".into(),
    }
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
        let reason = format!("cannot create DATA_DIR {data_dir}: {existing} is not a directory");
        return Err(Error(reason));
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
            "DATA_DIR is too long a path for PostgreSQL: {length} bytes, the limit is {PATH_LIMIT}"
        ))),
    }
}

/// Checks that an existing `DATA_DIR` is safe, meaning that no other user can have created files in
/// it.
pub(super) fn check(data_dir: &Path) -> Result<(PathBuf, Option<OsUser>), Error> {
    let refuse = |reason: &str| Err(Error(format!("DATA_DIR {} {reason}", data_dir.display())));
    let resolve = || {
        // Components omit a trailing slash, which would follow a symbolic link.
        let link = fs::symlink_metadata(data_dir.components().as_path())?;
        let resolved = data_dir.canonicalize()?;
        let meta = fs::metadata(&resolved)?;
        Ok((link, resolved, meta))
    };
    let (link, resolved, meta) = resolve().map_err(path_error("find DATA_DIR", data_dir))?;
    if !meta.is_dir() {
        return refuse("is not a directory");
    }
    if let Some(owner) = [link.uid(), meta.uid()]
        .into_iter()
        .find(|uid| !is_trusted(*uid))
    {
        let user = geteuid();
        return refuse(&format!(
            "belongs to another user (id {owner}) than the one that runs todo-api (id {user}): \
             run todo-api as its owner, or set DATA_DIR to another directory"
        ));
    }
    // Group write access is allowed unless root runs the service, because the owner of each file is
    // checked.
    let group_is_root = meta.gid() == 0 || !geteuid().is_root();
    if meta.mode() & if group_is_root { 0o002 } else { 0o022 } != 0 {
        return refuse("is writable by other users: close it (chmod go-w)");
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
            .map_err(|error| Error(format!("cannot use DATA_DIR {data_dir}: {error}")))?;
        match file.try_lock() {
            Ok(()) if is_at(&file, &path) => return Ok(file),
            // A failed start has removed the file since it was opened.
            Ok(()) => {}
            Err(TryLockError::Error(error)) => return Err(path_error("lock", &path)(error)),
            Err(TryLockError::WouldBlock) if Instant::now() > deadline => {
                return Err(Error(format!(
                    "another todo-api runs on DATA_DIR {data_dir}"
                )));
            }
            Err(TryLockError::WouldBlock) => sleep(POLL_INTERVAL).await,
        }
    }
}

/// Returns whether `path` still refers to this file.
fn is_at(file: &File, path: &Path) -> bool {
    let inode = |meta: io::Result<fs::Metadata>| meta.ok().map(|meta| (meta.dev(), meta.ino()));
    inode(file.metadata()) == inode(fs::symlink_metadata(path))
}

/// Returns whether a service is using this directory.
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
        replace_file(&path, 0o600, &format!("{}\n", random_secret()?))?;
    }
    let mut file = open_own(&path, OpenOptions::new().read(true))?;
    let mode = file.metadata().map_err(path_error("read", &path))?.mode();
    let mut secret = String::new();
    file.read_to_string(&mut secret)
        .map_err(path_error("read", &path))?;
    let secret = secret.trim();
    let reason = if mode & 0o077 != 0 {
        "is readable by others: close it (chmod 600), or remove it to create a new one"
    } else if secret.len() < 32 {
        "has fewer than 32 bytes: remove it to create a new one"
    } else {
        return Ok(secret.to_owned());
    };
    Err(Error(format!("{} {reason}", path.display())))
}

fn random_secret() -> Result<String, Error> {
    let mut bytes = [0; 32];
    let source = Path::new("/dev/urandom");
    File::open(source)
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(path_error("read", source))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Creates the socket directory: in `DATA_DIR`, or in a temporary directory if that path is too
/// long.
pub(super) fn create_socket_dir(
    data_dir: &Path,
    os_user: Option<&OsUser>,
) -> Result<PathBuf, Error> {
    let inside = data_dir.join("socket");
    if is_valid_socket_dir(&inside) {
        create_private_dir(&inside, os_user)?;
        return Ok(inside);
    }
    let mut hash = DefaultHasher::new();
    data_dir.hash(&mut hash);
    let name = format!("todo-api-{:016x}", hash.finish());
    let candidates = [env::temp_dir(), "/tmp".into()].map(|directory| directory.join(&name));
    let outside = candidates
        .into_iter()
        .find(|path| is_valid_socket_dir(path));
    let outside = outside.unwrap_or_default();
    // Every user can create files there, so a link or another user's directory is rejected.
    let is_usable = fs::symlink_metadata(&outside).map_or(true, |meta| {
        let is_own = is_trusted(meta.uid()) || os_user.is_some_and(|user| user.uid == meta.uid());
        meta.is_dir() && is_own
    });
    let created = match is_usable {
        true => create_private_dir(&outside, os_user),
        false => Err(Error(format!(
            "{} belongs to another user",
            outside.display()
        ))),
    };
    created.map_err(|error| {
        let data_dir = data_dir.display();
        Error(format!(
            "DATA_DIR {data_dir} is too long a path for a socket, and another directory cannot be used: {error}"
        ))
    })?;
    Ok(outside)
}

/// Returns whether a socket path in this directory is short enough, and the directory can be quoted
/// in the setting.
fn is_valid_socket_dir(directory: &Path) -> bool {
    directory.join(SOCKET_NAME).as_os_str().len() <= SOCKET_PATH_LIMIT
        && directory.to_str().is_some_and(|path| !path.contains('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_paths_are_limited_to_103_bytes() {
        let longest = SOCKET_PATH_LIMIT - "/".len() - SOCKET_NAME.len();
        assert!(is_valid_socket_dir(Path::new(&"x".repeat(longest))));
        assert!(!is_valid_socket_dir(Path::new(&"x".repeat(longest + 1))));
    }
}
