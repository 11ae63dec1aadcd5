//! The rules that let only root and the service's own user connect, authenticated by the kernel (`peer`).
//!
//! They are in files of `DATA_DIR`, written at each start, and not in the cluster's own `pg_hba.conf`:
//! if root runs the service, another user owns the cluster, and that user must not connect.

use std::path::Path;

use rustix::process::geteuid;

use super::{Error, SUPERUSER, file::replace_file, os_user::user_name};

/// Writes the rules and returns the settings that make PostgreSQL use them.
pub(super) fn write_rules(data_dir: &Path) -> Result<Vec<String>, Error> {
    let user = user_name(geteuid().as_raw())?.replace('"', "\"\"");
    let rules = format!("local all {SUPERUSER} peer map=todo-api\n");
    let mapping = format!("todo-api root {SUPERUSER}\ntodo-api \"{user}\" {SUPERUSER}\n");
    let write = |(setting, name, text)| {
        let path = data_dir.join(name);
        let text = format!("# todo-api writes this file at each start.\n{text}");
        replace_file(&path, 0o644, &text)?;
        Ok(format!("{setting}={}", path.display()))
    };
    let files = [
        ("hba_file", "pg_hba.conf", rules),
        ("ident_file", "pg_ident.conf", mapping),
    ];
    files.into_iter().map(write).collect()
}
