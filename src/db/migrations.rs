//! The schema: what is missing of `sql/migrations` is applied in one transaction, under a lock
//! that makes instances which start together take turns.

use tokio_postgres::Client;

/// Every migration in order. They only add, so that the binary before still runs.
pub(crate) const MIGRATIONS: &[(i32, &str, &str)] = &[(
    1,
    "people_tasks_sessions",
    include_str!("../../sql/migrations/V1__people_tasks_sessions.sql"),
)];

/// Any number, as long as every version of the service uses the same: the ASCII of "todo-api".
const LOCK: i64 = 0x746f_646f_2d61_7069;

/// Applies what is missing and says how many that were.
pub(crate) async fn apply(client: &Client) -> Result<usize, tokio_postgres::Error> {
    // Nothing due, nothing asked: the service may run as a role that cannot make tables.
    if due(client).await? == 0 {
        return Ok(0);
    }
    // Plain statements in an explicit transaction: a transaction pooler carries them, and the
    // lock goes with the transaction, however that ends.
    client.batch_execute("begin").await?;
    let applied = apply_missing(client).await;
    let end = if applied.is_ok() {
        "commit"
    } else {
        "rollback"
    };
    let ended = client.batch_execute(end).await;
    let applied = applied?;
    ended?;
    Ok(applied)
}

async fn apply_missing(client: &Client) -> Result<usize, tokio_postgres::Error> {
    client
        .batch_execute(&format!(
            "set local client_min_messages = warning;
             select pg_advisory_xact_lock({LOCK});
             create table if not exists migrations (
                 version    integer     primary key,
                 name       text        not null,
                 applied_at timestamptz not null default now()
             )"
        ))
        .await?;
    let current = version(client).await?;
    let missing = MIGRATIONS.iter().filter(|(version, ..)| *version > current);
    let mut applied = 0;
    for (version, name, text) in missing {
        client.batch_execute(text).await?;
        client
            .batch_execute(&format!(
                "insert into migrations (version, name) values ({version}, '{name}')"
            ))
            .await?;
        applied += 1;
    }
    Ok(applied)
}

/// How many migrations a database lacks; 0 as well where a newer version of the service was.
pub(crate) async fn due(client: &Client) -> Result<usize, tokio_postgres::Error> {
    let known = client
        .simple_query("select from pg_tables where schemaname = any(current_schemas(false)) and tablename = 'migrations'")
        .await?;
    let exists = known
        .iter()
        .any(|message| matches!(message, tokio_postgres::SimpleQueryMessage::Row(_)));
    let current = if exists { version(client).await? } else { 0 };
    Ok(MIGRATIONS
        .iter()
        .filter(|(version, ..)| *version > current)
        .count())
}

async fn version(client: &Client) -> Result<i32, tokio_postgres::Error> {
    let messages = client
        .simple_query("select coalesce(max(version), 0) from migrations")
        .await?;
    let version = messages.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0)?.parse().ok(),
        _ => None,
    });
    Ok(version.unwrap_or(0))
}
