//! Users cannot read or change another user's data, nor learn that it exists.

use hyper::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::{Response, Server, User};

/// Returns every operation below `/api/v1/{user_id}`: method, path and body.
fn operations(tasks: &str, id: &str) -> Vec<(Method, String, Option<Value>)> {
    let task = format!("{tasks}/{id}");
    let complete = format!("{task}/complete");
    vec![
        (Method::GET, tasks.to_owned(), None),
        (
            Method::GET,
            format!("{tasks}?completed=true&q=secret&limit=1&sort=created_at&total=true"),
            None,
        ),
        (
            Method::POST,
            tasks.to_owned(),
            Some(json!({"title": "planted"})),
        ),
        (Method::DELETE, format!("{tasks}?completed=true"), None),
        (Method::GET, task.clone(), None),
        (
            Method::PUT,
            task.clone(),
            Some(json!({"title": "overwritten"})),
        ),
        (
            Method::PATCH,
            task.clone(),
            Some(json!({"completed": true, "description": null})),
        ),
        (Method::DELETE, task, None),
        (Method::PATCH, complete.clone(), None),
        (Method::PATCH, complete, Some(json!({"completed": false}))),
    ]
}

async fn send(user: &User, (method, path, body): &(Method, String, Option<Value>)) -> Response {
    let request = user.request(method.clone(), path);
    match body {
        Some(body) => request.json(body.clone()).await,
        None => request.await,
    }
}

/// Returns every row of a user with its `ctid` and `xmin`, which also reveal an update that changes no
/// value.
async fn rows_of(server: &Server, user: &User) -> Vec<String> {
    let rows = "select r.ctid || ' ' || r.xmin || ' ' || r::text from users r where r.id = $1
                union all
                select r.ctid || ' ' || r.xmin || ' ' || r::text from sessions r where r.user_id = $1
                union all
                select r.ctid || ' ' || r.xmin || ' ' || r::text from tasks r where r.user_id = $1
                union all
                select r.ctid || ' ' || r.xmin || ' ' || r::text from idempotency_keys r where r.user_id = $1
                union all
                select r.ctid || ' ' || r.xmin || ' ' || r::text from login_networks r where r.user_id = $1
                order by 1";
    let id = Uuid::parse_str(&user.id).unwrap();
    let rows = server.sql().await.query(rows, &[&id]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Creates a user with two tasks, one of them completed and created with an idempotency key.
async fn create_user_with_tasks(server: &Server) -> (User, Value, Value) {
    let bob = server.user().await;
    let open = bob.create_task("secret").await;
    let body = json!({"title": "secret, done", "completed": true});
    let create = bob.create(body).header("idempotency-key", "k");
    let done = create.await.expect(201).json();
    (bob, open, done)
}

// FR-003, FR-007, FR-008, SC-002, SC-004
#[tokio::test]
async fn returns_403_for_another_users_paths_and_changes_nothing() {
    let server = Server::shared().await;
    let (bob, open, done) = create_user_with_tasks(server).await;
    let ann = server.user().await;
    let mine = ann.create_task("mine").await;
    let before = rows_of(server, &bob).await;
    assert_eq!(before.len(), 6);

    let unknown = Uuid::now_v7().to_string();
    let ids = [&open, &done, &mine].map(|task| task["id"].as_str().unwrap());
    for id in ids.into_iter().chain([unknown.as_str(), "no-uuid"]) {
        for operation in operations(&bob.tasks(), id) {
            let problem = send(&ann, &operation).await.problem(403, "forbidden");
            let text = problem.to_string();
            assert!(
                !text.contains("secret") && !text.contains(&bob.email),
                "{text}"
            );
        }
    }
    assert_eq!(rows_of(server, &bob).await, before);
}

// FR-003, for well-formed and malformed ids.
#[tokio::test]
async fn returns_403_unless_the_path_has_the_users_id_in_canonical_form() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let id = &ann.id;
    let others = [
        Uuid::now_v7().to_string(),
        id.to_uppercase(),
        id.replace('-', ""),
        format!("%7B{id}%7D"),
        format!("urn:uuid:{id}"),
        format!("{id}%20"),
        format!("%20{id}"),
        format!("{id}%00"),
        format!("{id},{id}"),
        id[..35].to_owned(),
        ann.email.clone(),
        "me".to_owned(),
        "*".to_owned(),
        "%25".to_owned(),
        "0".to_owned(),
        "null".to_owned(),
        "'%20or%20'1'='1".to_owned(),
    ];
    for other in others {
        for operation in operations(&format!("/api/v1/{other}/tasks"), "x") {
            let response = send(&ann, &operation).await;
            assert_eq!(response.status, 403, "{} {}", operation.0, operation.1);
            response.problem(403, "forbidden");
        }
    }
}

// FR-007, FR-008, SC-002, SC-004
#[tokio::test]
async fn returns_the_same_404_for_another_users_task_as_for_an_unknown_one() {
    let server = Server::shared().await;
    let (bob, open, done) = create_user_with_tasks(server).await;
    let ann = server.user().await;
    ann.create_task("mine").await;
    let before = rows_of(server, &bob).await;

    let unknown_id = Uuid::now_v7().to_string();
    for task in [&open, &done] {
        let theirs = operations(&ann.tasks(), task["id"].as_str().unwrap());
        let unknown = operations(&ann.tasks(), &unknown_id);
        let malformed = operations(&ann.tasks(), "no-uuid");
        // The first four operations are on the list.
        for n in 4..theirs.len() {
            for tag in [None, Some("*"), Some("\"stale\"")] {
                let mut responses = Vec::new();
                for (method, path, body) in [&theirs[n], &unknown[n], &malformed[n]] {
                    let mut request = ann.request(method.clone(), path);
                    if let Some(tag) = tag {
                        // A PUT with If-None-Match: * creates a task.
                        let other = "\"other\"";
                        request = request
                            .header("if-match", tag)
                            .header("if-none-match", other);
                    }
                    if let Some(body) = body {
                        request = request.json(body.clone());
                    }
                    let response = request.await;
                    let mut headers = response.headers.clone();
                    headers.remove("x-request-id");
                    headers.remove("date");
                    let mut problem = response.problem(404, "task_not_found");
                    problem["instance"].take();
                    responses.push((headers, problem));
                }
                assert_eq!(
                    responses[0], responses[1],
                    "{} {}",
                    theirs[n].0, theirs[n].1
                );
                assert_eq!(
                    responses[2], responses[1],
                    "{} {}",
                    theirs[n].0, theirs[n].1
                );
            }
        }
    }
    assert_eq!(rows_of(server, &bob).await, before);
}

// FR-007, SC-004
#[tokio::test]
async fn operations_on_lists_affect_only_the_users_own_tasks() {
    let server = Server::shared().await;
    let (bob, ..) = create_user_with_tasks(server).await;
    let ann = server.user().await;
    let before = rows_of(server, &bob).await;

    for query in [
        "",
        "?completed=true",
        "?q=secret",
        "?q=",
        "?sort=created_at",
        "?total=true",
    ] {
        let response = ann.get(format!("{}{query}", ann.tasks())).await.expect(200);
        assert_eq!(response.json(), json!([]), "{query}");
        assert!(
            response
                .headers
                .get("x-total-count")
                .is_none_or(|total| total == "0"),
            "{query}"
        );
    }
    let clear = format!("{}?completed=true", ann.tasks());
    let cleared = ann.delete(&clear).await.expect(200);
    assert_eq!(cleared.json(), json!({"deleted": 0}));
    // Bob's idempotency key and the cursor of his list have no meaning for Ann.
    let mine = ann
        .create(json!({"title": "mine"}))
        .header("idempotency-key", "k");
    let mine = mine.await.expect(201).json();
    let page = bob.get(format!("{}?limit=1", bob.tasks())).await;
    let link = page.header("link");
    let query = link[link.find('?').unwrap()..].split('>').next().unwrap();
    let response = ann.get(format!("{}{query}", ann.tasks())).await;
    if response.status != 422 {
        for task in response.expect(200).json().as_array().unwrap() {
            assert_eq!(task, &mine);
        }
    }
    assert_eq!(rows_of(server, &bob).await, before);
}

// FR-007, SC-004
#[tokio::test]
async fn sessions_of_another_user_cannot_be_listed_or_revoked() {
    let server = Server::shared().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let before = rows_of(server, &bob).await;
    let sessions = ann.get("/api/v1/auth/sessions").await.expect(200).json();
    assert_eq!(sessions.as_array().unwrap().len(), 1);
    assert_eq!(sessions[0]["id"], json!(ann.session_id));
    let end = |id: &str| ann.delete(format!("/api/v1/auth/sessions/{id}")).send();
    let theirs = end(&bob.session_id).await.problem(404, "session_not_found");
    let unknown = end(&Uuid::now_v7().to_string())
        .await
        .problem(404, "session_not_found");
    assert_eq!(theirs["detail"], unknown["detail"]);
    ann.delete("/api/v1/auth/sessions").await.expect(204);
    assert_eq!(rows_of(server, &bob).await, before);
    bob.get("/api/v1/auth/me").await.expect(200);
}

#[tokio::test]
async fn no_header_or_body_selects_another_user() {
    let server = Server::shared().await;
    let (bob, open, _) = create_user_with_tasks(server).await;
    let ann = server.user().await;
    let mine = ann.create_task("mine").await;
    let before = rows_of(server, &bob).await;
    let path = ann.path_of(&mine);
    for (name, value) in [
        ("x-user-id", bob.id.as_str()),
        ("x-forwarded-user", &bob.email),
        ("x-original-url", &bob.tasks()),
        ("x-rewrite-url", &bob.tasks()),
        ("x-http-method-override", "DELETE"),
        ("cookie", &format!("access_token={}", bob.access_token)),
    ] {
        let read = ann.get(&path).header(name, value).await;
        assert_eq!(read.expect(200).json(), mine, "{name}");
        let response = ann.get(bob.path_of(&open)).header(name, value).await;
        response.problem(403, "forbidden");
    }
    let body = json!({"title": "b", "user_id": bob.id, "id": open["id"]});
    let changed = ann.put(&path).json(body).await.expect(200).json();
    assert_eq!(
        (&changed["id"], &changed["user_id"]),
        (&mine["id"], &json!(ann.id))
    );
    let query = format!(
        "{}?user_id={}&access_token={}",
        ann.tasks(),
        bob.id,
        bob.access_token
    );
    let list = ann.get(&query).await.expect(200).json();
    assert_eq!(list, json!([changed]));
    assert_eq!(rows_of(server, &bob).await, before);
}
