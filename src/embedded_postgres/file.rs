//! Files below `DATA_DIR`. Symbolic links are not followed, and other users' files are not used.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

use rustix::{fs::OFlags, process::geteuid};

use super::{Error, path_error};

/// Larger than any file that is read as a whole.
const READ_LIMIT: u64 = 64 << 10;

/// Whether files of this user are as trustworthy as the service's own.
pub(super) fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

fn open_regular(path: &Path, options: &OpenOptions) -> io::Result<File> {
    // NONBLOCK: opening a FIFO must not wait for its other end.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let file = options.clone().custom_flags(flags).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is not a regular file")),
    }
}

/// Opens a file that no user other than this one or root can have created.
pub(super) fn open_own(path: &Path, options: &OpenOptions) -> Result<File, Error> {
    let file = open_regular(path, options).map_err(path_error("open", path))?;
    let owner = file.metadata().map_err(path_error("open", path))?.uid();
    if !is_trusted(owner) {
        let path = path.display();
        let reason = format!("{path} belongs to another user (id {owner}): remove it");
        return Err(reason);
    }
    Ok(file)
}

/// Reads a text file of the cluster, which the user that runs PostgreSQL owns.
pub(super) fn read(path: &Path) -> io::Result<String> {
    let file = open_regular(path, OpenOptions::new().read(true))?;
    let mut text = String::new();
    file.take(READ_LIMIT).read_to_string(&mut text)?;
    Ok(text)
}

/// Writes a file under a temporary name and renames it, so that it is never incomplete.
pub(super) fn replace_file(path: &Path, mode: u32, text: &str) -> Result<(), Error> {
    let unfinished = path.with_added_extension("unfinished");
    let write = || {
        remove_if_exists(&unfinished)?;
        let mut options = OpenOptions::new();
        let mut file = options
            .create_new(true)
            .write(true)
            .mode(mode)
            .open(&unfinished)?;
        // Not subject to the umask.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&unfinished, path)
    };
    write().map_err(|error| {
        fs::remove_file(&unfinished).ok();
        path_error("write", path)(error)
    })
}

pub(super) fn remove_if_exists(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
