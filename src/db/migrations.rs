//! Applies the migrations under `sql/migrations` that a database lacks, in one transaction and under
//! a lock, so that instances that start at the same time do not interfere.

use tokio_postgres::{Client, Error, IsolationLevel};

type Migration = (i32, &'static str, &'static str);

macro_rules! migrations {
    ($($version:literal $name:literal),* $(,)?) => {
        /// All migrations: version, name and text. They only add to the schema, so that the
        /// previous release still runs. A database may lack any of them, not only the last ones.
        const MIGRATIONS: &[Migration] = &[$((
            $version,
            $name,
            include_str!(concat!("../../sql/migrations/V", $version, "__", $name, ".sql")),
        )),*];
    };
}

migrations! {
    1 "initial",
    2 "fold_case",
    3 "revocation_cursor_and_session_epochs",
    4 "login_lockout",
    5 "list_revisions",
    6 "mail",
    7 "disabled_accounts",
    8 "tasks_reference_lists",
    9 "keys_reference_lists",
    10 "shared_steps",
}

/// The key of the advisory lock, the same in every release: "todo-api" in ASCII.
const LOCK: i64 = 0x746f_646f_2d61_7069;

/// Applies the missing migrations and returns their number. Needs a role that may create tables.
/// Neither waiting for another instance nor the migrations themselves have a timeout.
pub(super) async fn apply(client: &mut Client) -> Result<usize, Error> {
    // One transaction works through a transaction pooler, and releases the lock however it ends.
    // READ COMMITTED lets each statement see what the previous holder of the lock committed.
    let transaction = client
        .build_transaction()
        .isolation_level(IsolationLevel::ReadCommitted)
        .read_only(false);
    let transaction = transaction.start().await?;
    let applied = apply_missing(transaction.client()).await?;
    transaction.commit().await?;
    Ok(applied)
}

async fn apply_missing(client: &Client) -> Result<usize, Error> {
    // Timeouts of the role or the database would end a long migration. PostgreSQL 14 or later rolls
    // back as soon as this process is gone. The migrations themselves wait only briefly for a table
    // lock, because every other query on the table would queue behind them.
    client
        .batch_execute(&format!(
            "set local client_min_messages = warning;
             select set_config(name, '0', true) from pg_settings
             where name in ('statement_timeout', 'lock_timeout', 'transaction_timeout',
                            'idle_in_transaction_session_timeout');
             do $$ begin
                 perform set_config('client_connection_check_interval', '1s', true);
             exception when others then null;
             end $$;
             select pg_advisory_xact_lock({LOCK});
             set local lock_timeout = '1s';
             create table if not exists migrations (
                 version    integer     primary key,
                 name       text        not null,
                 applied_at timestamptz not null default now()
             )"
        ))
        .await?;
    let missing = missing(client).await?;
    for (version, name, text) in &missing {
        client.batch_execute(text).await?;
        client
            .batch_execute(&format!(
                "insert into migrations (version, name) values ({version}, '{name}')"
            ))
            .await?;
    }
    Ok(missing.len())
}

/// Returns how many migrations a database lacks. Migrations of newer releases do not count.
pub(super) async fn due(client: &Client) -> Result<usize, Error> {
    const TABLE: &str = "select from pg_tables where schemaname = any(current_schemas(false)) and tablename = 'migrations'";
    match client.query_typed(TABLE, &[]).await?.is_empty() {
        true => Ok(MIGRATIONS.len()),
        false => Ok(missing(client).await?.len()),
    }
}

async fn missing(client: &Client) -> Result<Vec<&'static Migration>, Error> {
    let applied = client
        .query_typed("select version from migrations", &[])
        .await?;
    let applied: Vec<i32> = applied.iter().map(|row| row.get("version")).collect();
    let missing = MIGRATIONS
        .iter()
        .filter(|(version, ..)| !applied.contains(version));
    Ok(missing.collect())
}
