//! Migrations: one of several starting instances applies them, without a timeout, without data loss, and
//! without breaking an instance of the previous release.

use rustix::process::Signal;
use serde_json::Value;
use tokio::time::{Duration, Instant, sleep};
use tokio_postgres::{Client, SimpleQueryMessage};

use crate::faults::short_or_full;
use crate::harness::{Database, PASSWORD, Process, SECRET, Server, until};

const V1: &str = include_str!("../../sql/migrations/V1__initial.sql");

/// The inserts of the first release into all its columns, for the user `N`.
const V1_INSERTS: &str = "
    insert into users (id, email, password_hash, created_at, updated_at)
    values ('00000000-0000-7000-8000-00000000000N', 'userN@example.com', 'HASH', now(), now());
    insert into tasks (user_id, id, title, description, completed, created_at, updated_at)
    values ('00000000-0000-7000-8000-00000000000N', '00000000-0000-7000-8000-0000000000aN',
            'an old task', 'from version 1', false, now(), now());
    insert into sessions (id, user_id, generation, rotated_at, created_at, last_used_at, expires_at, user_agent)
    values ('00000000-0000-7000-8000-0000000000bN', '00000000-0000-7000-8000-00000000000N', 1,
            now(), now(), now(), now() + interval '30 days', 'curl/8');
    insert into revocations (session_id, ended_at)
    values ('00000000-0000-7000-8000-0000000000cN', now());
    insert into sign_in_failures as f (email, failures, last_failure_at)
    values ('userN@example.com', 1, now()) on conflict (email) do update set failures = f.failures + 1;
    insert into idempotency_keys (user_id, key, task_id, title, description, completed, created_at)
    values ('00000000-0000-7000-8000-00000000000N', 'a key', '00000000-0000-7000-8000-0000000000aN',
            'an old task', null, false, now())";

/// The other statements of the first release, shortened.
const V1_CHANGES: &str = "
    update tasks set title = 'changed', updated_at = now()
    where user_id = '00000000-0000-7000-8000-00000000000N';
    update sessions set generation = generation + 1, rotated_at = now()
    where user_id = '00000000-0000-7000-8000-00000000000N';
    delete from tasks where user_id = '00000000-0000-7000-8000-00000000000N';
    delete from sign_in_failures where email = 'userN@example.com';
    delete from users where id = '00000000-0000-7000-8000-00000000000N'";

const V1_TABLES: [&str; 6] = [
    "users",
    "tasks",
    "sessions",
    "revocations",
    "sign_in_failures",
    "idempotency_keys",
];

/// The revision, the number of tasks and the tombstones of each user.
const LISTS: &str = "
    select row(revision, tasks, (select array_agg(revision) from deleted_tasks d where d.user_id = l.user_id))::text
    from task_lists l order by user_id";

/// Creates a database with the schema of the first release.
async fn create_version_1_database() -> (Database, Client) {
    let database = Database::create().await;
    let sql = database.sql().await;
    sql.batch_execute(V1).await.unwrap();
    sql.batch_execute(
        "create table migrations (version integer primary key, name text not null,
                                  applied_at timestamptz not null default now());
         insert into migrations (version, name) values (1, 'people_tasks_sessions')",
    )
    .await
    .unwrap();
    (database, sql)
}

/// Makes each transaction that changes the schema take this long.
async fn slow_down(sql: &Client, seconds: u32) {
    sql.batch_execute(&format!(
        "create function slow_down() returns event_trigger language plpgsql as $$
         begin
             if current_setting('slow.done', true) is distinct from 'yes' then
                 perform set_config('slow.done', 'yes', true);
                 perform pg_sleep({seconds});
             end if;
         end $$;
         create event trigger slow_down on ddl_command_start
         when tag in ('CREATE FUNCTION') execute function slow_down()"
    ))
    .await
    .unwrap();
}

async fn is_sleeping(sql: &Client) -> bool {
    let row = sql
        .query_one(
            "select count(*) from pg_stat_activity
             where datname = current_database() and wait_event = 'PgSleep'",
            &[],
        )
        .await
        .unwrap();
    row.get::<_, i64>(0) > 0
}

async fn rows_of(sql: &Client, table: &str, columns: &[String]) -> Vec<String> {
    let text = format!(
        "select row({}) ::text from {table} order by 1",
        columns.join(", ")
    );
    let rows = sql.query(&text, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn an_older_schema_is_migrated_and_the_previous_release_still_runs() {
    let (database, sql) = create_version_1_database().await;
    let hash = bcrypt::hash(PASSWORD, 10).unwrap();
    let with = |text: &str, user: &str| text.replace('N', user).replace("HASH", &hash);
    sql.batch_execute(&with(V1_INSERTS, "1")).await.unwrap();
    let mut before = Vec::new();
    for table in V1_TABLES {
        let columns = sql
            .query(
                "select column_name::text from information_schema.columns
                 where table_schema = 'public' and table_name = $1 order by 1",
                &[&table],
            )
            .await
            .unwrap();
        let columns: Vec<String> = columns.iter().map(|row| row.get(0)).collect();
        let rows = rows_of(&sql, table, &columns).await;
        assert_eq!(rows.len(), 1, "{table}");
        before.push((table, columns, rows));
    }

    let server = Server::with(&[("DATABASE_URL", &database.url())]).await;
    for (table, columns, rows) in before {
        assert_eq!(rows_of(&sql, table, &columns).await, rows, "{table}");
    }
    let user = server.login("user1@example.com", PASSWORD).await;
    let list = user.get(user.tasks()).await.expect(200).json();
    assert_eq!(list.as_array().map(Vec::len), Some(1), "{list}");
    assert_eq!(list[0]["title"], "an old task");
    assert_eq!(list[0]["description"], "from version 1");

    // The previous release may still be running, or may be started again.
    sql.batch_execute(&with(V1_INSERTS, "2")).await.unwrap();
    let user = server.login("user2@example.com", PASSWORD).await;
    let list = user.get(user.tasks()).await.expect(200).json();
    assert_eq!(list[0]["title"], "an old task", "{list}");
    // Its changes raise the revision and leave tombstones as well.
    let changes = with(V1_CHANGES, "2");
    let (change, delete) = changes.split_once("delete from users").unwrap();
    sql.batch_execute(change).await.unwrap();
    let mut lists = Vec::new();
    for message in sql.simple_query(LISTS).await.unwrap() {
        if let SimpleQueryMessage::Row(row) = message {
            lists.push(row.get(0).unwrap().to_owned());
        }
    }
    assert_eq!(lists, ["(0,1,)", "(3,0,{3})"]);
    sql.batch_execute(&format!("delete from users {delete}"))
        .await
        .unwrap();
    assert_eq!(sql.query(LISTS, &[]).await.unwrap().len(), 1);
    let tombstones = sql.query("select from deleted_tasks", &[]).await.unwrap();
    assert!(tombstones.is_empty());
}

#[tokio::test]
async fn a_missing_earlier_migration_is_still_applied() {
    let (database, sql) = create_version_1_database().await;
    sql.batch_execute("insert into migrations (version, name) values (999, 'of_a_newer_service')")
        .await
        .unwrap();
    let server = Server::with(&[("DATABASE_URL", &database.url())]).await;
    let user = server.user().await;
    user.create_task("Ärger").await;
    let list = user
        .get(format!("{}?q=%C3%A4rger", user.tasks()))
        .await
        .expect(200);
    assert_eq!(list.json().as_array().map(Vec::len), Some(1));
}

/// In the full form, the migration takes longer than any timeout of the service; in the short form,
/// longer than the database's default timeouts.
#[tokio::test]
async fn one_of_two_instances_that_start_together_applies_a_slow_migration() {
    let seconds = short_or_full(3, 70);
    let database = Database::create().await;
    let sql = database.sql().await;
    slow_down(&sql, seconds).await;
    for setting in [
        "statement_timeout = '1s'",
        "lock_timeout = '1s'",
        "default_transaction_isolation = serializable",
    ] {
        let name = database.name();
        sql.batch_execute(&format!("alter database {name} set {setting}"))
            .await
            .unwrap();
    }
    let url = database.url();
    let variables = [("DATABASE_URL", &*url)];
    let started = Instant::now();
    let (one, two) = tokio::join!(Server::listening(&variables), Server::listening(&variables));
    let deadline = Duration::from_secs(u64::from(2 * seconds + 30));
    let mut applied = [String::new(), String::new()];
    for (server, applied) in [&one, &two].into_iter().zip(&mut applied) {
        while !server.log().contains("database ready") {
            assert!(started.elapsed() < deadline, "{}", server.log());
            sleep(Duration::from_millis(50)).await;
        }
        server.get("/readyz").await.expect(200);
        let log = server.log();
        let line = log
            .lines()
            .find(|line| line.contains("database ready"))
            .unwrap();
        *applied = line.rsplit_once(' ').unwrap().1.to_owned();
        if seconds > 10 {
            assert!(log.contains("migrating the schema, or waiting"), "{log}");
        }
    }
    applied.sort();
    assert!(
        applied[0] == "migrations_applied=0" && applied[1] != applied[0],
        "{applied:?}"
    );
    assert!(started.elapsed() >= Duration::from_secs(seconds.into()));
    let user = one.user().await;
    user.on(&two).create_task("created by the other").await;
}

#[tokio::test]
async fn stopping_during_a_migration_is_immediate_and_rolls_it_back() {
    for signal in [Signal::TERM, Signal::KILL] {
        let database = Database::create().await;
        let sql = database.sql().await;
        slow_down(&sql, 600).await;
        let process = Process::spawn(
            &[],
            &[
                ("DATABASE_URL", &database.url()),
                ("JWT_SECRET", SECRET),
                ("LISTEN_ADDR", "127.0.0.1:0"),
            ],
        );
        until("the migration is running", async || is_sleeping(&sql).await).await;
        process.signal(signal);
        process.ended().await;
        // PostgreSQL 13 detects the lost connection only when the statement ends.
        until("the transaction is rolled back", async || {
            !is_sleeping(&sql).await
        })
        .await;
        let row = sql
            .query_one("select to_regclass('users') is null", &[])
            .await
            .unwrap();
        assert!(row.get::<_, bool>(0));
    }
}

#[tokio::test]
async fn a_migration_that_needs_a_locked_table_is_retried() {
    let (database, sql) = create_version_1_database().await;
    // Blocks the migration but not reads.
    sql.batch_execute("begin; lock table migrations in share mode")
        .await
        .unwrap();
    let server = Server::listening(&[("DATABASE_URL", &database.url())]).await;
    server
        .wait_for_log("a migration needs a table that another transaction has locked")
        .await;
    server.get("/readyz").await.expect(503);
    sql.batch_execute("rollback").await.unwrap();
    until("the migration is applied", async || {
        server.get("/readyz").await.status == 200
    })
    .await;
}

#[tokio::test]
async fn search_ignores_case_in_a_database_with_an_ascii_locale() {
    let database = Database::create_with("template template0 encoding 'UTF8' locale 'C'").await;
    let server = Server::with(&[("DATABASE_URL", &database.url())]).await;
    assert!(!server.log().contains("case-sensitive"), "{}", server.log());
    let user = server.user().await;
    let title = "Ärger über Привет, ΟΔΟΣΑ, Straße, naïve ΣΙΣΥΦΟΣ";
    user.create_task(title).await;
    let described = serde_json::json!({"title": "other", "description": "Größe ΌΛΟΣ Ёлка"});
    let post = user.create(described);
    post.await.expect(201);
    for (text, found) in [
        ("ärger", 1),
        ("ÜBER", 1),
        ("ПРИВЕТ", 1),
        ("привет", 1),
        ("οδος", 1),
        ("ΟΔΟΣ", 1),
        ("οδοσα", 1),
        ("straße", 1),
        ("NAÏVE", 1),
        ("σισυφος", 1),
        ("Σίσυφος", 0),
        ("größe", 1),
        ("όλος", 1),
        ("ёЛКА", 1),
        ("arger", 0),
        ("елка", 0),
        ("o", 1),
        ("R", 2),
    ] {
        for sort in ["created_at", "-created_at"] {
            let query: String = text.bytes().map(|byte| format!("%{byte:02X}")).collect();
            let path = format!("{}?q={query}&sort={sort}&total=true", user.tasks());
            let response = user.get(path).await.expect(200);
            let list: Value = response.json();
            assert_eq!(list.as_array().map(Vec::len), Some(found), "{text}: {list}");
            assert_eq!(
                response.header("x-total-count"),
                found.to_string(),
                "{text}"
            );
        }
    }
}

#[tokio::test]
async fn reports_a_server_on_which_search_is_case_sensitive() {
    let server = Server::start().await;
    let check = async || {
        let url = server.database_url();
        let check = Process::spawn(
            &["check"],
            &[("DATABASE_URL", &url), ("JWT_SECRET", SECRET)],
        );
        check.ended().await;
        check.output()
    };
    assert!(check().await.contains("search ignores case"));
    // Creates the function as the migration does without ICU and UTF-8 locales.
    let sql = server.sql().await;
    sql.batch_execute(
        "create or replace function fold_case(text) returns text language sql immutable parallel safe
         as 'select upper(lower($1 collate \"C\"))'",
    )
    .await
    .unwrap();
    assert!(
        check()
            .await
            .contains("search is case-sensitive beyond ASCII")
    );
    let second = server.sibling(&[]).await;
    second
        .wait_for_log("WARN  search is case-sensitive beyond ASCII")
        .await;
}
