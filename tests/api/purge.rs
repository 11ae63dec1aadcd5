//! Expired rows are purged after requests.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::auth::{ANOTHER_PASSWORD, login, refresh, register};
use crate::harness::{MailServer, PASSWORD, Response, Server, User, unique};

/// Moves all timestamps of the matching rows into the past, as if that time had passed. Reads the names
/// of the columns from the schema, so that it includes new columns.
pub(crate) async fn age(
    sql: &tokio_postgres::Client,
    table: &str,
    interval: &str,
    condition: &str,
) {
    let columns: Vec<String> = sql
        .query(
            "select column_name::text from information_schema.columns
             where table_schema = 'public' and table_name = $1
               and data_type = 'timestamp with time zone'",
            &[&table],
        )
        .await
        .expect("the columns")
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!(!columns.is_empty(), "{table} has no timestamps");
    let changes: Vec<String> = columns
        .iter()
        .map(|column| format!("{column} = {column} - interval '{interval}'"))
        .collect();
    let changed = sql
        .execute(
            &format!(
                "update {table} set {} where {condition}",
                changes.join(", ")
            ),
            &[],
        )
        .await
        .expect("an update");
    assert!(changed > 0, "no rows in {table} where {condition}");
}

/// The tables whose rows expire.
const PURGED: [&str; 8] = [
    "deleted_tasks",
    "sessions",
    "revocations",
    "login_failures",
    "login_networks",
    "idempotency_keys",
    "mail_requests",
    "pending_registrations",
];

async fn counts(sql: &tokio_postgres::Client) -> [i64; 8] {
    let mut counts = [0; 8];
    for (count, table) in counts.iter_mut().zip(PURGED) {
        *count = sql
            .query_one(&format!("select count(*) from {table}"), &[])
            .await
            .expect("a count")
            .get(0);
    }
    counts
}

/// Creates a task with an idempotency key.
async fn create_with_key(user: &User) -> Response {
    let create = user.create(json!({"title": "water the plants"}));
    create.header("idempotency-key", "the-only-one").await
}

/// Creates a row in each of these tables with requests of a new user. `requiring` is an instance that
/// requires verified addresses.
async fn create_rows(server: &Server, requiring: &Server) -> User {
    let email = format!("pending{}@example.com", unique());
    register(requiring, &email, PASSWORD).await.expect(202);
    let user = server.user().await;
    let second = login(server, &user.email, &user.password)
        .await
        .expect(200)
        .json();
    server
        .post("/api/v1/auth/logout")
        .json(json!({"refresh_token": second["refresh_token"]}))
        .await
        .expect(204);
    login(server, &user.email, ANOTHER_PASSWORD)
        .await
        .problem(401, "invalid_credentials");
    create_with_key(&user).await.expect(201);
    let task = user.create_task("a").await;
    user.delete(user.path_of(&task)).await.expect(204);
    user
}

#[tokio::test]
async fn expired_rows_are_purged_after_requests() {
    let first = Server::start().await;
    let sql = first.sql().await;
    let mails = MailServer::start();
    let variables = [
        &mails.variables()[..],
        &[("EMAIL_VERIFICATION", "required")],
    ]
    .concat();
    let requiring = first.sibling(&variables).await;
    create_rows(&first, &requiring).await;
    create_rows(&first, &requiring).await;
    for table in PURGED {
        age(&sql, table, "91 days", "true").await;
    }
    let live = create_rows(&first, &requiring).await;
    assert_eq!(counts(&sql).await, [3; 8]);

    // An idle instance sends no queries, so that its database can suspend. Waiting until it is ready
    // would send a request.
    let second = Server::listening(&[("DATABASE_URL", &first.database_url())]).await;
    let until = Instant::now() + Duration::from_millis(1500);
    while Instant::now() < until {
        assert_eq!(counts(&sql).await, [3; 8]);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    let deadline = Instant::now() + Duration::from_secs(15);
    while counts(&sql).await != [1; 8] {
        assert!(
            Instant::now() < deadline,
            "{:?} rows are left in {PURGED:?}",
            counts(&sql).await
        );
        let status = live.on(&second).get(live.tasks()).await.status;
        // 503 until the instance is connected.
        assert!([200, 503].contains(&status), "{status}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    // The live session and key still work.
    let again = create_with_key(&live.on(&second)).await.expect(201);
    assert_eq!(again.json()["title"], "water the plants");
    let tasks: i64 = sql
        .query_one(
            &format!("select count(*) from tasks where user_id = '{}'", live.id),
            &[],
        )
        .await
        .expect("a count")
        .get(0);
    assert_eq!(tasks, 1);
    refresh(&second, &live.refresh_token).await.expect(200);
}

#[tokio::test]
async fn requests_continue_while_many_rows_are_purged() {
    let first = Server::start().await;
    let sql = first.sql().await;
    sql.batch_execute(
        "insert into login_failures (account, network, failures, last_failure_at)
         select n || '@example.com', '192.0.2.1', 1, now() - interval '25 hours' from generate_series(1, 3000) n;
         insert into revocations (session_id, ended_at)
         select gen_random_uuid(), now() - interval '2 days' from generate_series(1, 3000)",
    )
    .await
    .expect("old rows");
    // Each instance purges after its first request, and then every ten minutes.
    let server = first.sibling(&[]).await;
    let user = server.user().await;
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        user.get(user.tasks()).await.expect(200);
        let [_, _, revocations, failures, ..] = counts(&sql).await;
        if revocations == 0 && failures == 0 {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "{revocations} revocations and {failures} failures are left"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
