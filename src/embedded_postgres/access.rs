//! Who may connect: only the service's own user and root, as the kernel names them (`peer`).
//!
//! The rules are in files of `DATA_DIR` that are written at each start. If root runs the service,
//! PostgreSQL runs as another user, which owns the cluster and must not connect, so the cluster's
//! own `pg_hba.conf` is not used.

use std::path::Path;

use rustix::process::geteuid;

use super::{Error, SUPERUSER, file::replace_file, os_user::user_name};

/// Writes the rules and returns the settings that make PostgreSQL use them.
pub(super) fn write_rules(data_dir: &Path) -> Result<Vec<String>, Error> {
    let user = user_name(geteuid().as_raw())?.replace('"', "\"\"");
    let rules = format!("local all {SUPERUSER} peer map=todo-api\n");
    let mapping = format!("todo-api root {SUPERUSER}\ntodo-api \"{user}\" {SUPERUSER}\n");
    let files = [
        ("hba_file", "pg_hba.conf", rules),
        ("ident_file", "pg_ident.conf", mapping),
    ];
    let write = |(setting, file, text)| {
        let path = data_dir.join(file);
        let text = format!("# todo-api writes this file at each start.\n{text}");
        replace_file(&path, 0o644, &text)?;
        Ok(format!("{setting}={}", path.display()))
    };
    files.into_iter().map(write).collect()
}
