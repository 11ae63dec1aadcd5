//! The system user that runs PostgreSQL if the service is root: PostgreSQL refuses to run as root.

use std::{fs, os::unix::fs::MetadataExt, path::Path, process::Command};

use rustix::process::geteuid;

use super::Error;

#[derive(Clone)]
pub(super) struct OsUser {
    name: &'static str,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl OsUser {
    /// The owner of the cluster, or of a cluster to be created. `None` unless the service is root.
    pub(super) fn for_cluster(cluster: &Path) -> Result<Option<OsUser>, Error> {
        if !geteuid().is_root() {
            return Ok(None);
        }
        let owner = fs::symlink_metadata(cluster).map_or(0, |meta| meta.uid());
        let user = OsUser::unprivileged().find(|user| owner == 0 || user.uid == owner);
        user.map(Some).ok_or_else(|| match owner {
            0 => "PostgreSQL cannot run as root, and there is no user postgres or nobody to run it as".into(),
            _ => format!(
                "{} belongs to another user (id {owner}): run todo-api as that user",
                cluster.display()
            ),
        })
    }

    /// The users that may run PostgreSQL for root, the preferred one first.
    pub(super) fn unprivileged() -> impl Iterator<Item = OsUser> {
        ["postgres", "nobody"].into_iter().filter_map(|name| {
            Some(OsUser {
                name,
                uid: id("-u", name)?.parse().ok()?,
                gid: id("-g", name)?.parse().ok()?,
            })
        })
    }

    /// Checks that this user can reach `directory`. Missing parts will be created with access for
    /// this user.
    pub(super) fn check_traversable(&self, directory: &Path) -> Result<(), Error> {
        let mut ancestors = directory.ancestors();
        let Some(closed) = ancestors.find(|ancestor| !self.may_traverse(ancestor)) else {
            return Ok(());
        };
        let (directory, closed, user) = (directory.display(), closed.display(), &self.name);
        Err(format!(
            "user {user}, which runs PostgreSQL when todo-api is root, cannot reach DATA_DIR {directory}: \
             it has no access to {closed}; set DATA_DIR to another directory, such as /var/lib/todo-api"
        ))
    }

    fn may_traverse(&self, directory: &Path) -> bool {
        // As in the kernel, the first class that applies decides.
        fs::metadata(directory).map_or(true, |meta| {
            let needed = if meta.uid() == self.uid {
                0o100
            } else if meta.gid() == self.gid {
                0o010
            } else {
                0o001
            };
            meta.mode() & needed != 0
        })
    }
}

/// The name under which PostgreSQL knows this user.
pub(super) fn user_name(uid: u32) -> Result<String, Error> {
    id("-un", &uid.to_string()).ok_or_else(|| {
        format!(
            "user id {uid} has no name on this machine, which PostgreSQL requires \
             (with systemd's DynamicUser: apt install libnss-systemd)"
        )
    })
}

fn id(option: &str, user: &str) -> Option<String> {
    let output = Command::new("id").args([option, user]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success()).then(|| text.trim().to_owned())
}
