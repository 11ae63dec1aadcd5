//! The system user that runs PostgreSQL if the service is root: PostgreSQL refuses to run as root.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use rustix::process::geteuid;

use super::Error;

#[derive(Clone)]
pub(super) struct OsUser {
    pub(super) name: String,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl OsUser {
    /// The owner of the cluster, or of a cluster to be created. `None` unless the service is root.
    pub(super) fn for_cluster(cluster: &Path) -> Result<Option<OsUser>, Error> {
        if !geteuid().is_root() {
            return Ok(None);
        }
        if let Ok(owner) = fs::symlink_metadata(cluster)
            && owner.uid() != 0
        {
            return Ok(Some(OsUser {
                name: format!("with id {}", owner.uid()),
                uid: owner.uid(),
                gid: owner.gid(),
            }));
        }
        OsUser::unprivileged().map(Some).ok_or_else(|| {
            Error("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as".into())
        })
    }

    pub(super) fn unprivileged() -> Option<OsUser> {
        ["postgres", "nobody"].into_iter().find_map(|name| {
            Some(OsUser {
                name: name.to_owned(),
                uid: id("-u", name)?.parse().ok()?,
                gid: id("-g", name)?.parse().ok()?,
            })
        })
    }

    /// Checks that PostgreSQL can reach its files: every directory on the way must let this user pass.
    pub(super) fn check_traversable(&self, directory: &Path) -> Result<(), Error> {
        match directory
            .ancestors()
            .find(|ancestor| !self.may_traverse(ancestor))
        {
            None => Ok(()),
            Some(closed) => Err(Error(format!(
                "DATA_DIR {} cannot be reached by user {}, as which PostgreSQL runs if todo-api runs as root: \
                 {} is closed to it; set DATA_DIR to another directory, such as /var/lib/todo-api",
                directory.display(),
                self.name,
                closed.display()
            ))),
        }
    }

    fn may_traverse(&self, directory: &Path) -> bool {
        let Ok(directory) = fs::metadata(directory) else {
            // A missing directory will be created with the right mode.
            return true;
        };
        // The first class that applies decides, as it does in the kernel.
        let needed = if directory.uid() == self.uid {
            0o100
        } else if directory.gid() == self.gid {
            0o010
        } else {
            0o001
        };
        directory.mode() & needed != 0
    }
}

/// The name under which PostgreSQL knows this user.
pub(super) fn user_name(uid: u32) -> Result<String, Error> {
    id("-un", &uid.to_string()).ok_or_else(|| {
        Error(format!(
            "user id {uid} has no name on this machine, which PostgreSQL needs \
             (with systemd's DynamicUser: apt install libnss-systemd)"
        ))
    })
}

fn id(which: &str, user: &str) -> Option<String> {
    let output = std::process::Command::new("id")
        .args([which, user])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success()).then(|| text.trim().to_owned())
}
