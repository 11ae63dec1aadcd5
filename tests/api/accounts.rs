//! The operator's commands on accounts.

use std::process::Output;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::commands::{run, stderr, stdout};
use crate::harness::{PASSWORD, Process, SECRET, Server, User};
use crate::sessions::assert_revoked;

/// Runs `todo-api user` with these arguments on the server's database, and expects this exit status.
fn user(server: &Server, arguments: &[&str], status: i32) -> Output {
    let url = server.database_url();
    let variables = [("DATABASE_URL", url.as_str()), ("JWT_SECRET", SECRET)];
    let output = run(&[&["user"], arguments].concat(), &variables, "");
    assert_eq!(output.status.code(), Some(status), "{}", stderr(&output));
    output
}

fn json_of(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Asserts that the command logged exactly one line, at INFO.
fn assert_logged(output: &Output, line: &str) {
    let log = stderr(output);
    assert!(
        log.lines().count() == 1 && log.contains(&format!("INFO  {line}")),
        "{log}"
    );
}

fn credentials(user: &User, password: &str) -> Value {
    json!({"email": user.email, "password": password})
}

#[tokio::test]
async fn a_disabled_account_can_be_used_nowhere_until_it_is_enabled() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let (ann, ben) = (here.user().await, here.user().await);
    ann.create_task("Outlive it").await;
    let second = there.login(&ann.email, PASSWORD).await;
    for session in [&ann, &second.on(&there)] {
        session.get(session.tasks()).await.expect(200);
    }

    let output = user(&here, &["disable", &ann.email], 0);
    let disabled_at = Instant::now();
    assert_logged(
        &output,
        &format!("account disabled user_id={} sessions_revoked=2", ann.id),
    );
    assert_eq!(stdout(&output), "account disabled, 2 sessions revoked\n");
    assert_revoked(&here, &second.access_token, disabled_at).await;
    assert_revoked(&there, &ann.access_token, disabled_at).await;
    let login = |password| {
        there
            .post("/api/v1/auth/login")
            .json(credentials(&ann, password))
    };
    login(PASSWORD).await.problem(403, "account_disabled");
    login("wrong").await.problem(401, "invalid_credentials");
    there
        .wait_for_log("authentication failed reason=account_disabled")
        .await;
    let refresh = json!({"refresh_token": second.refresh_token});
    let refresh = here.post("/api/v1/auth/refresh").json(refresh).await;
    refresh.problem(401, "invalid_refresh_token");
    ben.get("/api/v1/auth/me").await.expect(200);
    let shown = json_of(&user(&here, &["show", &ann.email, "--json"], 0));
    assert!(shown["disabled_at"].is_string(), "{shown}");

    let output = user(&here, &["enable", "--json", &ann.email], 0);
    assert_logged(
        &output,
        &format!("account enabled user_id={} sessions_revoked=0", ann.id),
    );
    assert_eq!(
        json_of(&output),
        json!({"user_id": ann.id, "sessions_revoked": 0})
    );
    let again = there.login(&ann.email, PASSWORD).await.on(&there);
    let tasks = again.get(again.tasks()).await.expect(200).json();
    assert_eq!(tasks[0]["title"], "Outlive it");
}

/// The previous release can create a session for a disabled account.
#[tokio::test]
async fn a_disabled_account_cannot_refresh_a_session_that_is_left() {
    let server = Server::start().await;
    let ann = server.user().await;
    let sql = server.sql().await;
    sql.batch_execute("update users set disabled_at = now()")
        .await
        .expect("an update");
    let refresh = json!({"refresh_token": ann.refresh_token});
    let refresh = server.post("/api/v1/auth/refresh").json(refresh).await;
    refresh.problem(401, "invalid_refresh_token");
}

#[tokio::test]
async fn a_login_at_the_same_time_does_not_survive_the_disabling() {
    let server = Server::start().await;
    let (ann, ben) = (server.user().await, server.user().await);
    let url = server.database_url();
    let login = |user: &User| {
        server
            .post("/api/v1/auth/login")
            .json(credentials(user, PASSWORD))
    };

    // The account is disabled between the check of the password and the creation of the session.
    let disabled = format!(
        "update users set disabled_at = now() where id = '{}'",
        ann.id
    );
    let lock = server.lock(&disabled).await;
    let (response, ()) = tokio::join!(login(&ann).send(), lock.release_after(1));
    response.problem(403, "account_disabled");

    // The session is created while the command waits.
    let locked = format!("select from users where id = '{}' for update", ben.id);
    let lock = server.lock(&locked).await;
    let variables = [("DATABASE_URL", url.as_str()), ("JWT_SECRET", SECRET)];
    let (response, command) = tokio::join!(login(&ben).send(), async {
        lock.wait_for_blocked(1).await;
        let command = Process::spawn(&["user", "disable", &ben.email], &variables);
        lock.release_after(2).await;
        command
    });
    assert!(command.ended().await.success(), "{}", command.log());
    let tokens = response.expect(200).json();
    let token = tokens["access_token"].as_str().expect("a token");
    assert_revoked(&server, token, Instant::now()).await;
}

#[tokio::test]
async fn an_export_contains_every_row_of_a_person_and_no_other() {
    let server = Server::start().await;
    let (ann, ben) = (server.user().await, server.user().await);
    let task = ann
        .create(json!({"title": "Buy milk"}))
        .header("idempotency-key", "milk")
        .await;
    let deleted = ann.create_task("short-lived").await;
    ann.delete(ann.path_of(&deleted)).await.expect(204);
    ben.create_task("secret").await;
    for password in [
        credentials(&ann, "wrong"),
        json!({"email": ann.email, "password": "bad"}),
    ] {
        server
            .post("/api/v1/auth/login")
            .json(password)
            .await
            .expect(401);
    }
    // Rows of mails, and of the first release.
    let sql = server.sql().await;
    for table in [
        "sign_in_failures (email, failures, last_failure_at) select email, 1, now()",
        "mail_requests (email, latest_at) select email, now()",
        "pending_registrations (email, id, password_hash, registered_at)
         select email, gen_random_uuid(), password_hash, now()",
    ] {
        let insert = format!("insert into {table} from users");
        sql.batch_execute(&insert).await.expect("rows");
    }
    let output = user(&server, &["export", &ann.email], 0);
    let document = json_of(&output);
    let query = "select distinct table_name::text from information_schema.columns
                 where table_schema = 'public' and table_name <> 'users'
                 and column_name in ('user_id', 'email', 'account')";
    let tables = sql.query(query, &[]).await.expect("the tables");
    assert!(tables.len() >= 10);
    for table in tables.iter().map(|row| row.get::<_, String>(0)) {
        let rows = document[&table].as_array().map_or(0, Vec::len);
        assert!(rows > 0, "{table} is not in {document}");
    }
    assert_eq!(document["user"]["email"], ann.email.as_str());
    assert_eq!(document["tasks"][0]["id"], task.json()["id"]);
    let text = stdout(&output);
    for absent in ["$2b$", "secret", &ben.email, &ben.id] {
        assert!(!text.contains(absent), "{absent} is in {text}");
    }
}

#[tokio::test]
async fn list_and_show_print_accounts() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    ann.create_task("Buy milk").await;
    let sql = server.sql().await;
    sql.batch_execute(
        "insert into users (id, email, password_hash, created_at, updated_at)
         select gen_random_uuid(), 'user' || n || '@example.com', rpad('$2b$', 60, 'x'), now(), now()
         from generate_series(1, 2001) n;
         insert into login_failures values ('user7@example.com', '192.0.2.7', 10, now(), now() + interval '1 hour')",
    )
    .await
    .expect("users");
    let output = stdout(&user(&server, &["list"], 0));
    let mut lines: Vec<&str> = output.lines().collect();
    assert_eq!(
        lines.remove(0),
        "CREATED     LAST USED   SESSIONS    TASKS  STATE     EMAIL"
    );
    assert!(
        lines[0].ends_with("         1        1  active    ann@example.com"),
        "{}",
        lines[0]
    );
    let locked = lines
        .iter()
        .find(|line| line.ends_with(" user7@example.com"));
    assert!(
        locked.is_some_and(|line| line.contains(" locked ")),
        "{locked:?}"
    );
    assert_eq!(lines.len(), 2002);

    let output = stdout(&user(&server, &["list", "--json"], 0));
    let first = output.lines().next().expect("a line");
    let shown = json_of(&user(&server, &["show", " Ann@example.com", "--json"], 0));
    assert_eq!(serde_json::from_str::<Value>(first).expect("JSON"), shown);
    assert_eq!((&shown["tasks"], &shown["id"]), (&json!(1), &json!(ann.id)));
    let output = stdout(&user(&server, &["show", "ann@example.com"], 0));
    assert!(
        output.contains("disabled_at     -\n") && output.contains(&ann.id),
        "{output}"
    );
}

/// The limit of a statement of a request is 5 s. An export of many tasks takes longer over a slow network.
#[tokio::test]
async fn commands_have_more_time_than_requests() {
    let server = Server::start().await;
    let ann = server.user().await;
    let tasks = "lock table tasks in access exclusive mode";
    let lock = server.lock(tasks).await;
    let url = server.database_url();
    let variables = [("DATABASE_URL", url.as_str()), ("JWT_SECRET", SECRET)];
    let command = Process::spawn(&["user", "export", &ann.email], &variables);
    lock.wait_for_blocked(1).await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    lock.release().await;
    assert!(command.ended().await.success(), "{}", command.log());
    assert!(command.output().contains(&ann.id));
}

#[tokio::test]
async fn a_deletion_that_fails_changes_nothing() {
    let server = Server::start().await;
    let ann = server.user().await;
    let lockout = format!(
        "insert into login_failures values ('{}', 'session', 10, now(), now() + interval '1 hour')",
        ann.id
    );
    server.sql().await.batch_execute(&lockout).await.unwrap();
    let list = format!(
        "select from task_lists where user_id = '{}' for update",
        ann.id
    );
    let lock = server.lock(&list).await;
    let url = server.database_url();
    let variables = [("DATABASE_URL", url.as_str()), ("JWT_SECRET", SECRET)];
    let command = Process::spawn(&["user", "delete", &ann.email], &variables);
    lock.wait_for_blocked(1).await;
    lock.terminate_blocked().await;
    assert_eq!(command.ended().await.code(), Some(1));
    assert!(
        command.log().contains("`user delete` failed"),
        "{}",
        command.log()
    );
    lock.release().await;
    let shown = json_of(&user(&server, &["show", &ann.email, "--json"], 0));
    assert!(shown["locked_until"].is_string(), "{shown}");
    ann.get("/api/v1/auth/me").await.expect(200);
}

#[tokio::test]
async fn delete_removes_an_account_and_unknown_addresses_exit_with_3() {
    let server = Server::start().await;
    let (ann, ben) = (server.user().await, server.user().await);
    ann.create_task("Buy milk").await;
    // A lockout of the password confirmation does not prevent the deletion.
    for _ in 0..10 {
        let delete = ann
            .delete("/api/v1/auth/me")
            .json(json!({"password": "wrong"}));
        delete.await.expect(403);
    }
    let output = user(&server, &["delete", &ann.email], 0);
    let deleted_at = Instant::now();
    assert_logged(
        &output,
        &format!("account deleted user_id={} sessions_revoked=1", ann.id),
    );
    assert_revoked(&server, &ann.access_token, deleted_at).await;
    ben.get("/api/v1/auth/me").await.expect(200);
    let left = "select (select count(*) from users) + (select count(*) from tasks)
                     + (select count(*) from login_failures)";
    let left = server
        .sql()
        .await
        .query_one(left, &[])
        .await
        .expect("a count");
    assert_eq!(left.get::<_, i64>(0), 1);
    for command in ["show", "export", "disable", "enable", "delete"] {
        let output = user(&server, &[command, &ann.email], 3);
        assert!(
            stderr(&output).contains("there is no account"),
            "{}",
            stderr(&output)
        );
        assert_eq!(stdout(&output), "");
    }
}
