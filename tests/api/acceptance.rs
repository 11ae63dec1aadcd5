//! What was asked for, story by story and edge case by edge case, end to end.

use std::cell::Cell;

use futures_util::future::{join, join_all};
use serde_json::json;

use crate::harness::{PASSWORD, Server, User, claims, forge, until};
use crate::http::Wire;
use crate::preconditions::blocked_statements;

/// An access token for `user`'s session as the service makes it, but with an end of our choice.
fn token_until(server: &Server, user: &User, exp: i64) -> String {
    forge(
        server.secret(),
        json!({"alg": "HS256", "typ": "JWT"}),
        json!({
            "user_id": user.id, "sub": user.id, "email": user.email, "sid": user.session_id,
            "iat": exp - 86_400, "exp": exp,
        }),
    )
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

// ---- Story: register and log in ----

// FR-011, FR-013, FR-016
#[tokio::test]
async fn somebody_registers_signs_in_and_reads_who_they_are() {
    let server = Server::start().await;
    let body = json!({"email": "  Ann@Example.COM ", "password": PASSWORD});
    let registered = server
        .post("/api/v1/auth/register")
        .json(body)
        .send()
        .await
        .expect(201);
    assert_eq!(registered.header("location"), "/api/v1/auth/me");
    assert_eq!(registered.header("cache-control"), "no-store");

    let body = json!({"email": "ann@example.com", "password": PASSWORD});
    let signed_in = server
        .post("/api/v1/auth/login")
        .json(body)
        .send()
        .await
        .expect(200);
    for tokens in [registered.json(), signed_in.json()] {
        assert_eq!(tokens["token_type"], "bearer");
        assert_eq!(tokens["expires_in"], 86_400);
        assert_eq!(tokens["refresh_expires_in"], 2_592_000);
        assert_eq!(tokens["user"]["email"], "ann@example.com");

        let token = tokens["access_token"].as_str().expect("a token");
        let me = server
            .get("/api/v1/auth/me")
            .bearer(token)
            .send()
            .await
            .expect(200)
            .json();
        assert_eq!(me, tokens["user"]);
        let members: Vec<_> = me.as_object().expect("an object").keys().cloned().collect();
        assert_eq!(members, ["created_at", "email", "id", "updated_at"]);
    }
}

// FR-002, FR-016
#[tokio::test]
async fn an_access_token_names_its_user_and_lives_a_day() {
    let server = Server::start().await;
    let ann = server.user().await;
    let claims = claims(&ann.access_token);
    assert_eq!(claims["user_id"], json!(ann.id));
    assert_eq!(claims["sub"], json!(ann.id));
    assert_eq!(claims["email"], json!(ann.email));
    assert_eq!(claims["sid"], json!(ann.session_id));
    let lifetime = claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap();
    assert_eq!(lifetime, 86_400);
}

// FR-012, FR-014
#[tokio::test]
async fn a_password_is_stored_as_a_bcrypt_hash_and_nowhere_else() {
    let server = Server::start().await;
    let ann = server.user().await;
    let row = server
        .sql()
        .await
        .query_one(
            "select password_hash, email, created_at is not null and updated_at is not null
             from users where id::text = $1",
            &[&ann.id],
        )
        .await
        .unwrap();
    let hash: String = row.get(0);
    assert!(hash.starts_with("$2b$10$") && hash.len() == 60, "{hash}");
    assert_eq!(row.get::<_, String>(1), ann.email);
    assert!(row.get::<_, bool>(2));
    assert!(
        !server.log().contains(PASSWORD),
        "the password is in the log"
    );
}

// FR-017
#[tokio::test]
async fn a_refresh_token_extends_the_session() {
    let server = Server::start().await;
    let ann = server.user().await;
    let body = json!({"refresh_token": ann.refresh_token});
    let tokens = server
        .post("/api/v1/auth/refresh")
        .json(body)
        .send()
        .await
        .expect(200)
        .json();
    assert_ne!(tokens["refresh_token"], json!(ann.refresh_token));
    assert_eq!(
        claims(tokens["access_token"].as_str().unwrap())["sid"],
        json!(ann.session_id)
    );
    let token = tokens["access_token"].as_str().unwrap();
    server
        .get(ann.tasks())
        .bearer(token)
        .send()
        .await
        .expect(200);
}

#[tokio::test]
async fn who_signs_out_is_out() {
    let server = Server::start().await;
    let ann = server.user().await;
    let signed_out = server
        .post("/api/v1/auth/logout")
        .bearer(&ann.access_token)
        .send()
        .await;
    assert!(signed_out.expect(204).body.is_empty());
    // Within a second, on every instance.
    until("the token of an ended session stops working", async || {
        server
            .get(ann.tasks())
            .bearer(&ann.access_token)
            .send()
            .await
            .status
            == 401
    })
    .await;
    let body = json!({"refresh_token": ann.refresh_token});
    let again = server.post("/api/v1/auth/refresh").json(body).send().await;
    again.problem(401, "invalid_refresh_token");
}

// ---- Story: manage tasks securely ----

// FR-005, FR-006, FR-009
#[tokio::test]
async fn a_task_is_created_read_changed_completed_and_deleted() {
    let server = Server::start().await;
    let ann = server.user().await;
    let token = &ann.access_token;
    let body = json!({"title": "Buy milk", "description": "Two litres"});
    let created = server
        .post(ann.tasks())
        .bearer(token)
        .json(body)
        .send()
        .await
        .expect(201);
    let path = created.header("location").to_owned();
    let task = created.json();
    assert_eq!(
        path,
        format!("{}/{}", ann.tasks(), task["id"].as_str().unwrap())
    );

    let rows = server
        .sql()
        .await
        .query("select title from tasks", &[])
        .await
        .unwrap();
    assert_eq!(rows.len(), 1, "the task is in PostgreSQL");

    assert_eq!(
        server
            .get(&path)
            .bearer(token)
            .send()
            .await
            .expect(200)
            .json(),
        task
    );
    let list = server
        .get(ann.tasks())
        .bearer(token)
        .send()
        .await
        .expect(200)
        .json();
    assert_eq!(list, json!([task]));

    let body = json!({"title": "Buy oat milk"});
    let changed = server
        .put(&path)
        .bearer(token)
        .json(body)
        .send()
        .await
        .expect(200)
        .json();
    assert_eq!(changed["title"], "Buy oat milk");
    assert_eq!(changed["description"], "Two litres");

    let complete = format!("{path}/complete");
    let done = server
        .patch(&complete)
        .bearer(token)
        .send()
        .await
        .expect(200)
        .json();
    assert_eq!(done["completed"], true);

    assert!(
        server
            .delete(&path)
            .bearer(token)
            .send()
            .await
            .expect(204)
            .body
            .is_empty()
    );
    server
        .get(&path)
        .bearer(token)
        .send()
        .await
        .problem(404, "task_not_found");
}

// SC-001
#[tokio::test]
async fn every_operation_on_ones_own_tasks_succeeds() {
    let server = Server::start().await;
    let ann = server.user().await;
    let token = &ann.access_token;
    for n in 0..50 {
        let task = ann.create_task(&server, &format!("task {n}")).await;
        let path = format!("{}/{}", ann.tasks(), task["id"].as_str().unwrap());
        server.get(&path).bearer(token).send().await.expect(200);
        server
            .patch(&path)
            .bearer(token)
            .json(json!({"title": "changed"}))
            .send()
            .await
            .expect(200);
        server
            .patch(format!("{path}/complete"))
            .bearer(token)
            .send()
            .await
            .expect(200);
        server
            .get(ann.tasks())
            .bearer(token)
            .send()
            .await
            .expect(200);
        server.delete(&path).bearer(token).send().await.expect(204);
    }
}

// ---- Story: be refused without or with a bad token ----

// FR-001, FR-008, FR-010
#[tokio::test]
async fn without_a_token_nothing_is_done_and_the_log_says_so() {
    let server = Server::start().await;
    let ann = server.user().await;
    let answer = server
        .post(ann.tasks())
        .json(json!({"title": "no"}))
        .send()
        .await;
    assert_eq!(answer.header("www-authenticate"), r#"Bearer realm="todo""#);
    let id = answer.header("x-request-id").to_owned();
    answer.problem(401, "missing_token");
    server.wait_for_log(&id).await;
    let log = server.log();
    let line = log.lines().find(|line| line.contains(&id)).unwrap();
    for part in [
        "WARN",
        "authentication failed",
        "reason=",
        "method=POST",
        "client=127.0.0.1",
    ] {
        assert!(line.contains(part), "{part} is missing in: {line}");
    }
    assert!(line.contains(&format!("path={}", ann.tasks())), "{line}");
    assert_eq!(log.matches(&id).count(), 1, "one line a refusal:\n{log}");
    let count = server
        .sql()
        .await
        .query_one("select count(*) from tasks", &[])
        .await
        .unwrap();
    assert_eq!(count.get::<_, i64>(0), 0);
}

// FR-001, FR-004, FR-010, SC-002
#[tokio::test]
async fn an_expired_a_forged_and_a_garbled_token_are_refused() {
    let server = Server::start().await;
    let ann = server.user().await;
    let good = token_until(&server, &ann, now() + 3600);
    server
        .get(ann.tasks())
        .bearer(&good)
        .send()
        .await
        .expect(200);

    let expired = token_until(&server, &ann, now() - 31);
    let mut forged = good.clone();
    forged.truncate(forged.len() - 4);
    forged.push_str("AAAA");
    for bad in [expired, forged, "garbage".to_owned(), "a.b.c".to_owned()] {
        let answer = server.get(ann.tasks()).bearer(&bad).send().await;
        let challenge = answer.header("www-authenticate").to_owned();
        assert!(
            challenge.starts_with(r#"Bearer realm="todo""#),
            "{challenge}"
        );
        assert!(
            challenge.contains(r#"error="invalid_token""#),
            "{challenge}"
        );
        answer.problem(401, "invalid_token");
    }
    server.wait_for_log("reason=expired_token").await;
    assert!(!server.log().contains(&good), "a token is in the log");
}

// ---- Story: be refused another's tasks, be told of what does not exist ----

// FR-003, FR-007, FR-008, SC-004
#[tokio::test]
async fn anothers_path_is_forbidden_and_an_unknown_task_is_not_found() {
    let server = Server::start().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let task = bob.create_task(&server, "bob's").await;
    let id = task["id"].as_str().unwrap();
    let token = &ann.access_token;
    server
        .get(bob.tasks())
        .bearer(token)
        .send()
        .await
        .problem(403, "forbidden");
    let theirs = format!("{}/{id}", bob.tasks());
    server
        .get(&theirs)
        .bearer(token)
        .send()
        .await
        .problem(403, "forbidden");
    let under_mine = format!("{}/{id}", ann.tasks());
    server
        .get(&under_mine)
        .bearer(token)
        .send()
        .await
        .problem(404, "task_not_found");
    let nowhere = format!("{}/0198c0de-0000-7000-8000-000000000000", ann.tasks());
    server
        .get(&nowhere)
        .bearer(token)
        .send()
        .await
        .problem(404, "task_not_found");
}

// ---- Edge cases ----

// FR-004: valid when it came; checked once, at the door.
#[tokio::test]
async fn a_token_that_expires_while_its_request_runs_still_serves_that_request() {
    let server = Server::start().await;
    let ann = server.user().await;
    let accepted = async |token: &str| {
        server
            .get("/api/v1/auth/me")
            .bearer(token)
            .send()
            .await
            .status
            == 200
    };
    // Some leeway for clocks is allowed: find out how much, then stay just inside it.
    let mut leeway = 0;
    while leeway < 40 && accepted(&token_until(&server, &ann, now() - leeway)).await {
        leeway += 1;
    }
    assert!(
        leeway <= 31,
        "a token must not outlive its end by more than 30 s"
    );
    let token = token_until(&server, &ann, now() - leeway + 5);

    // The 100 tells that the token was looked at and the body is now waited for.
    let mut wire = Wire::open(&server).await;
    wire.send(format!(
        "POST {} HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer {token}\r\nExpect: 100-continue\r\n\
         Content-Type: application/json\r\nContent-Length: 16\r\n\r\n",
        ann.tasks()
    ))
    .await;
    assert_eq!(wire.answer().await.status, 100);
    until("the token expires", async || !accepted(&token).await).await;
    wire.send(r#"{"title":"late"}"#).await;
    assert_eq!(wire.answer().await.status, 201);
}

// FR-007, SC-004
#[tokio::test]
async fn many_users_at_once_see_their_own_tasks_only() {
    let server = Server::start().await;
    let mut users = Vec::new();
    for _ in 0..10 {
        users.push(server.user().await);
    }
    join_all(users.iter().map(async |user| {
        for n in 0..20 {
            let title = format!("{} {n}", user.email);
            user.create_task(&server, &title).await;
        }
    }))
    .await;
    for user in &users {
        let answer = server
            .get(user.tasks())
            .bearer(&user.access_token)
            .send()
            .await
            .expect(200);
        let tasks = answer.json();
        let tasks = tasks.as_array().unwrap();
        assert_eq!(tasks.len(), 20);
        for task in tasks {
            assert!(
                task["title"].as_str().unwrap().starts_with(&user.email),
                "{task}"
            );
            assert_eq!(task["user_id"], json!(user.id));
        }
    }
}

// FR-005, FR-008
#[tokio::test]
async fn a_task_with_invalid_data_is_refused_with_every_fault_named() {
    let server = Server::start().await;
    let ann = server.user().await;
    let body = json!({"title": "", "description": "x".repeat(1001)});
    let answer = server
        .post(ann.tasks())
        .bearer(&ann.access_token)
        .json(body)
        .send()
        .await;
    let problem = answer.problem(422, "validation_failed");
    assert_eq!(problem["errors"].as_array().unwrap().len(), 2, "{problem}");
    let list = server
        .get(ann.tasks())
        .bearer(&ann.access_token)
        .send()
        .await
        .expect(200);
    assert_eq!(list.json(), json!([]));
}

// FR-008
#[tokio::test]
async fn a_database_that_fails_in_mid_operation_is_a_503_that_changed_nothing() {
    let server = Server::start().await;
    let ann = server.user().await;
    let task = ann.create_task(&server, "before").await;
    let path = format!("{}/{}", ann.tasks(), task["id"].as_str().unwrap());
    let token = &ann.access_token;

    let mut holder = server.sql().await;
    let control = server.sql().await;
    let held = holder.transaction().await.unwrap();
    held.execute("select 1 from tasks for update", &[])
        .await
        .unwrap();
    let change = server
        .patch(&path)
        .bearer(token)
        .json(json!({"title": "after"}))
        .send();
    let (answer, ()) = join(change, async {
        blocked_statements(&control, 1).await;
        let ended = "select pg_terminate_backend(pid) from pg_stat_activity
                     where datname = current_database() and wait_event_type = 'Lock'";
        control.execute(ended, &[]).await.unwrap();
    })
    .await;
    assert!(!answer.header("retry-after").is_empty());
    answer.problem(503, "database_unavailable");
    held.rollback().await.unwrap();

    assert_eq!(
        server
            .get(&path)
            .bearer(token)
            .send()
            .await
            .expect(200)
            .json(),
        task
    );
    let body = json!({"title": "after"});
    server
        .patch(&path)
        .bearer(token)
        .json(body)
        .send()
        .await
        .expect(200);
}

// FR-015
#[tokio::test]
async fn an_address_can_register_once_however_it_is_written_and_however_many_try() {
    let server = Server::start().await;
    let attempts = [
        "eve@example.com",
        "EVE@example.com",
        " eve@EXAMPLE.com",
        "Eve@Example.Com ",
    ];
    let answers = join_all(attempts.map(|email| {
        let body = json!({"email": email, "password": PASSWORD});
        server.post("/api/v1/auth/register").json(body).send()
    }))
    .await;
    let (taken, made): (Vec<_>, Vec<_>) = answers.into_iter().partition(|a| a.status != 201);
    assert_eq!(made.len(), 1);
    for answer in taken {
        answer.problem(409, "email_taken");
    }
    let sql = server.sql().await;
    let count = sql
        .query_one("select count(*) from users", &[])
        .await
        .unwrap();
    assert_eq!(count.get::<_, i64>(0), 1);
    let bad = "insert into users select gen_random_uuid(), email, password_hash from users";
    assert!(
        sql.execute(bad, &[]).await.is_err(),
        "the schema takes an address twice"
    );
}

// FR-008, FR-010
#[tokio::test]
async fn a_wrong_password_and_no_account_at_all_are_told_alike() {
    let server = Server::start().await;
    let ann = server.user().await;
    let mut problems = Vec::new();
    for email in [ann.email.as_str(), "nobody@example.com"] {
        let body = json!({"email": email, "password": "not the right one"});
        let answer = server.post("/api/v1/auth/login").json(body).send().await;
        let mut names: Vec<_> = answer.headers.keys().map(|name| name.to_string()).collect();
        names.sort();
        let mut problem = answer.problem(401, "invalid_credentials");
        problem["instance"].take();
        problems.push((names, problem));
    }
    assert_eq!(problems[0], problems[1]);
    server.wait_for_log("nobody@example.com").await;
    let log = server.log();
    assert_eq!(
        log.lines()
            .filter(|l| l.contains("WARN") && l.contains("authentication failed"))
            .count(),
        2,
        "{log}"
    );
    assert!(
        !log.contains("not the right one"),
        "a password is in the log"
    );
}

// FR-006
#[tokio::test]
async fn the_database_never_sees_more_than_twenty_connections_of_ours() {
    let server = Server::with(&[("DB_POOL_SIZE", "20")]).await;
    let ann = server.user().await;
    let sql = server.sql().await;
    let finished = Cell::new(false);
    let requests = async {
        let create = async |n: i32| {
            let request = server.post(ann.tasks()).bearer(&ann.access_token);
            request.json(json!({"title": n.to_string()})).send().await
        };
        for answer in join_all((0..200).map(create)).await {
            // A slow machine may shed some.
            assert!(matches!(answer.status, 201 | 503), "{answer:?}");
        }
        finished.set(true);
    };
    let watch = async {
        let count = "select count(*) from pg_stat_activity
                     where datname = current_database() and pid <> pg_backend_pid()";
        let mut most: i64 = 0;
        while !finished.get() {
            most = most.max(sql.query_one(count, &[]).await.unwrap().get(0));
        }
        most
    };
    let ((), most) = join(requests, watch).await;
    assert!((2..=20).contains(&most), "{most} connections");
}
