//! Nobody reaches what is another's: not to read it, not to change it, not to learn that it is.

use hyper::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::{Response, Server, User};
use crate::tasks::path_of;

/// Every method on a path below `/api/v1/{user_id}`, with a body where it takes one.
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

async fn send(
    server: &Server,
    token: &str,
    (method, path, body): &(Method, String, Option<Value>),
) -> Response {
    let request = server.request(method.clone(), path).bearer(token);
    match body {
        Some(body) => request.json(body.clone()).send().await,
        None => request.send().await,
    }
}

/// All that the database holds of `user`, with the place and the writer of each row, so that even
/// a change that changes nothing is seen.
async fn everything_of(server: &Server, user: &User) -> Vec<String> {
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

/// Bob with two tasks, one of them completed and made under a key.
async fn bob_and_his_tasks(server: &Server) -> (User, Value, Value) {
    let bob = server.user().await;
    let open = bob.create_task(server, "secret").await;
    let body = json!({"title": "secret, done", "completed": true});
    let request = server
        .post(bob.tasks())
        .bearer(&bob.access_token)
        .header("idempotency-key", "k");
    let done = request.json(body).send().await.expect(201).json();
    (bob, open, done)
}

// FR-003, FR-007, FR-008, SC-002, SC-004
#[tokio::test]
async fn every_path_with_anothers_id_is_forbidden_and_leaves_their_rows_as_they_were() {
    let server = Server::start().await;
    let (bob, open, done) = bob_and_his_tasks(&server).await;
    let ann = server.user().await;
    let mine = ann.create_task(&server, "mine").await;
    let before = everything_of(&server, &bob).await;
    assert_eq!(before.len(), 6);

    let unknown = Uuid::now_v7().to_string();
    let ids = [&open, &done, &mine].map(|task| task["id"].as_str().unwrap());
    for id in ids.into_iter().chain([unknown.as_str(), "no-uuid"]) {
        for operation in operations(&bob.tasks(), id) {
            let problem = send(&server, &ann.access_token, &operation)
                .await
                .problem(403, "forbidden");
            let text = problem.to_string();
            assert!(
                !text.contains("secret") && !text.contains(&bob.email),
                "{text}"
            );
        }
    }
    assert_eq!(everything_of(&server, &bob).await, before);
}

// FR-003: any other value, well-formed or not.
#[tokio::test]
async fn only_ones_own_id_written_as_it_is_opens_a_path() {
    let server = Server::start().await;
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
            let answer = send(&server, &ann.access_token, &operation).await;
            assert_eq!(answer.status, 403, "{} {}", operation.0, operation.1);
            answer.problem(403, "forbidden");
        }
    }
}

// FR-007, FR-008, SC-002, SC-004
#[tokio::test]
async fn a_task_of_another_user_cannot_be_told_from_one_that_never_was() {
    let server = Server::start().await;
    let (bob, open, done) = bob_and_his_tasks(&server).await;
    let ann = server.user().await;
    ann.create_task(&server, "mine").await;
    let before = everything_of(&server, &bob).await;

    let unknown = Uuid::now_v7().to_string();
    for task in [&open, &done] {
        let theirs = operations(&ann.tasks(), task["id"].as_str().unwrap());
        let nobodys = operations(&ann.tasks(), &unknown);
        let garbage = operations(&ann.tasks(), "no-uuid");
        // Those on one task: the first four are on the list.
        for n in 4..theirs.len() {
            for tag in [None, Some("*"), Some("\"stale\"")] {
                let mut told = Vec::new();
                for (method, path, body) in [&theirs[n], &nobodys[n], &garbage[n]] {
                    let mut request = server
                        .request(method.clone(), path)
                        .bearer(&ann.access_token);
                    if let Some(tag) = tag {
                        request = request.header("if-match", tag).header("if-none-match", tag);
                    }
                    if let Some(body) = body {
                        request = request.json(body.clone());
                    }
                    let answer = request.send().await;
                    let mut headers = answer.headers.clone();
                    headers.remove("x-request-id");
                    headers.remove("date");
                    let mut problem = answer.problem(404, "task_not_found");
                    problem["instance"].take();
                    told.push((headers, problem));
                }
                assert_eq!(told[0], told[1], "{} {}", theirs[n].0, theirs[n].1);
                assert_eq!(told[2], told[1], "{} {}", theirs[n].0, theirs[n].1);
            }
        }
    }
    assert_eq!(everything_of(&server, &bob).await, before);
}

// FR-007, SC-004
#[tokio::test]
async fn what_works_on_many_tasks_works_on_ones_own_only() {
    let server = Server::start().await;
    let (bob, ..) = bob_and_his_tasks(&server).await;
    let ann = server.user().await;
    let before = everything_of(&server, &bob).await;
    let token = &ann.access_token;

    for query in [
        "",
        "?completed=true",
        "?q=secret",
        "?q=",
        "?sort=created_at",
        "?total=true",
    ] {
        let answer = server
            .get(format!("{}{query}", ann.tasks()))
            .bearer(token)
            .send()
            .await
            .expect(200);
        assert_eq!(answer.json(), json!([]), "{query}");
        assert!(
            answer
                .headers
                .get("x-total-count")
                .is_none_or(|total| total == "0"),
            "{query}"
        );
    }
    let clear = format!("{}?completed=true", ann.tasks());
    let cleared = server.delete(&clear).bearer(token).send().await.expect(200);
    assert_eq!(cleared.json(), json!({"deleted": 0}));
    // Bob's key means nothing here, nor does the place in his list.
    let request = server
        .post(ann.tasks())
        .bearer(token)
        .header("idempotency-key", "k");
    let mine = request
        .json(json!({"title": "mine"}))
        .send()
        .await
        .expect(201)
        .json();
    let place = server
        .get(format!("{}?limit=1", bob.tasks()))
        .bearer(&bob.access_token)
        .send()
        .await;
    let link = place.header("link");
    let query = link[link.find('?').unwrap()..].split('>').next().unwrap();
    let answer = server
        .get(format!("{}{query}", ann.tasks()))
        .bearer(token)
        .send()
        .await;
    if answer.status != 422 {
        for task in answer.expect(200).json().as_array().unwrap() {
            assert_eq!(task, &mine);
        }
    }
    assert_eq!(everything_of(&server, &bob).await, before);
}

// FR-007, SC-004: sessions are as private as tasks.
#[tokio::test]
async fn a_session_of_another_user_can_neither_be_seen_nor_ended() {
    let server = Server::start().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let before = everything_of(&server, &bob).await;
    let sessions = server
        .get("/api/v1/auth/sessions")
        .bearer(&ann.access_token)
        .send()
        .await
        .expect(200)
        .json();
    assert_eq!(sessions.as_array().unwrap().len(), 1);
    assert_eq!(sessions[0]["id"], json!(ann.session_id));
    let end = |id: &str| {
        server
            .delete(format!("/api/v1/auth/sessions/{id}"))
            .bearer(&ann.access_token)
            .send()
    };
    let theirs = end(&bob.session_id).await.problem(404, "session_not_found");
    let nobodys = end(&Uuid::now_v7().to_string())
        .await
        .problem(404, "session_not_found");
    assert_eq!(theirs["detail"], nobodys["detail"]);
    server
        .delete("/api/v1/auth/sessions")
        .bearer(&ann.access_token)
        .send()
        .await
        .expect(204);
    assert_eq!(everything_of(&server, &bob).await, before);
    server
        .get("/api/v1/auth/me")
        .bearer(&bob.access_token)
        .send()
        .await
        .expect(200);
}

// The tag of another's task opens nothing, and its owner's path is closed whatever is sent along.
#[tokio::test]
async fn no_header_or_body_moves_a_request_to_another_user() {
    let server = Server::start().await;
    let (bob, open, _) = bob_and_his_tasks(&server).await;
    let ann = server.user().await;
    let mine = ann.create_task(&server, "mine").await;
    let before = everything_of(&server, &bob).await;
    let path = path_of(&ann, &mine);
    for (name, value) in [
        ("x-user-id", bob.id.as_str()),
        ("x-forwarded-user", &bob.email),
        ("x-original-url", &bob.tasks()),
        ("x-rewrite-url", &bob.tasks()),
        ("x-http-method-override", "DELETE"),
        ("cookie", &format!("access_token={}", bob.access_token)),
    ] {
        let read = server
            .get(&path)
            .bearer(&ann.access_token)
            .header(name, value)
            .send()
            .await;
        assert_eq!(read.expect(200).json(), mine, "{name}");
        let answer = server
            .get(path_of(&bob, &open))
            .bearer(&ann.access_token)
            .header(name, value)
            .send()
            .await;
        answer.problem(403, "forbidden");
    }
    let body = json!({"title": "b", "user_id": bob.id, "id": open["id"]});
    let changed = server
        .put(&path)
        .bearer(&ann.access_token)
        .json(body)
        .send()
        .await
        .expect(200)
        .json();
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
    let list = server
        .get(&query)
        .bearer(&ann.access_token)
        .send()
        .await
        .expect(200)
        .json();
    assert_eq!(list, json!([changed]));
    assert_eq!(everything_of(&server, &bob).await, before);
}
