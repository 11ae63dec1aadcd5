//! Preconditions: `ETag`, `If-Match` and `If-None-Match`.

use std::collections::BTreeSet;

use futures_util::future::{join, join_all};
use hyper::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::{Response, Server, User};

/// Returns the entity tag of a response, and checks that it is strong.
fn tag_of(response: &Response) -> String {
    let tag = response.header("etag").to_owned();
    assert!(
        tag.len() > 2 && tag.starts_with('"') && tag.ends_with('"'),
        "not a strong tag: {tag}"
    );
    assert!(
        !tag[1..tag.len() - 1].contains(['"', ' ', ',']),
        "cannot be used in a list: {tag}"
    );
    tag
}

/// Creates a task and returns its path and entity tag.
async fn new_task(user: &User) -> (String, String) {
    let response = user.create(json!({"title": "a"})).await.expect(201);
    (user.path_of(&response.json()), tag_of(&response))
}

/// Returns the four requests that change a task: method, path, body, and status.
fn changes(path: &str) -> Vec<(Method, String, Option<Value>, u16)> {
    vec![
        (
            Method::PUT,
            path.to_owned(),
            Some(json!({"title": "b"})),
            200,
        ),
        (
            Method::PATCH,
            path.to_owned(),
            Some(json!({"title": "c"})),
            200,
        ),
        (Method::PATCH, format!("{path}/complete"), None, 200),
        (Method::DELETE, path.to_owned(), None, 204),
    ]
}

async fn change(
    user: &User,
    change_to: &(Method, String, Option<Value>, u16),
    if_match: &str,
) -> Response {
    change_with(user, change_to, &[("if-match", if_match)]).await
}

async fn change_with(
    user: &User,
    (method, path, body, _): &(Method, String, Option<Value>, u16),
    headers: &[(&str, &str)],
) -> Response {
    let mut request = user.request(method.clone(), path);
    for (name, value) in headers {
        request = request.header(name, value);
    }
    match body {
        Some(body) => request.json(body.clone()).await,
        None => request.await,
    }
}

#[tokio::test]
async fn every_task_has_a_strong_tag_that_changes_with_the_task() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let (path, created) = new_task(&ann).await;
    let mut tags = BTreeSet::from([created.clone()]);
    let mut last = created;
    let complete = format!("{path}/complete");
    for (method, at, body) in [
        (Method::PUT, &path, Some(json!({"title": "b"}))),
        (Method::PUT, &path, Some(json!({"title": "b"}))),
        (Method::PATCH, &path, Some(json!({"description": "c"}))),
        (Method::PATCH, &complete, None),
        (Method::PATCH, &complete, None),
        (Method::PATCH, &complete, Some(json!({"completed": false}))),
    ] {
        for _ in 0..2 {
            let read = ann.get(&path).await.expect(200);
            assert_eq!(tag_of(&read), last, "the tag changed without an update");
        }
        let request = ann.request(method, at);
        let response = match body {
            Some(body) => request.json(body).await,
            None => request.await,
        };
        last = tag_of(&response.expect(200));
        assert!(tags.insert(last.clone()), "a tag was reused");
    }
}

#[tokio::test]
async fn returns_304_if_if_none_match_lists_the_version() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let (path, tag) = new_task(&ann).await;
    let get = |method: Method, known: String| {
        ann.request(method, &path)
            .header("if-none-match", &known)
            .send()
    };
    for known in [
        tag.clone(),
        format!("W/{tag}"),
        "*".into(),
        format!("\"other\", {tag}"),
        format!("{tag},\"other\""),
        format!("\"a,b\" , W/\"c\",,\t{tag}"),
    ] {
        for method in [Method::GET, Method::HEAD] {
            let response = get(method.clone(), known.clone()).await;
            assert_eq!(response.status, 304, "{method} {known}");
            assert_eq!(response.header("etag"), tag);
            assert!(response.body.is_empty());
        }
    }
    let bare = tag.trim_matches('"').to_owned();
    for unknown in [
        "\"other\"".into(),
        format!("\"x{bare}\""),
        bare.clone(),
        format!("\"{bare}"),
        "garbage".into(),
        String::new(),
        format!("w/{tag}"),
        format!("\"a,{bare}\""),
        // Malformed, so the whole header is ignored.
        format!("{tag} garbage"),
        format!("{tag}, garbage"),
        format!("{tag}{tag}"),
        format!("*, {tag}"),
        format!("\"a b\", {tag}"),
    ] {
        let response = get(Method::GET, unknown.clone()).await;
        assert_eq!(response.status, 200, "{unknown}");
    }
    // Two header lines form one list.
    let response = ann
        .get(&path)
        .header("if-none-match", "\"other\"")
        .header("if-none-match", &tag)
        .await;
    assert_eq!(response.status, 304);

    let body = json!({"title": "b"});
    ann.patch(&path).json(body).await.expect(200);
    assert_eq!(get(Method::GET, tag).await.expect(200).json()["title"], "b");
}

#[tokio::test]
async fn returns_412_unless_if_match_lists_the_version() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for n in 0..4 {
        let (path, tag) = new_task(&ann).await;
        let bare = tag.trim_matches('"').to_owned();
        let before = ann.get(&path).await.expect(200).json();
        for stale in [
            "\"stale\"".to_owned(),
            format!("W/{tag}"),
            format!("\"stale\", W/{tag}"),
            bare.clone(),
            "garbage".to_owned(),
            format!("\"{bare}"),
            format!("\"x{bare}\""),
            format!("\"{bare}0\""),
            format!("\"stale,{bare}\""),
            "\"\"".to_owned(),
            String::new(),
            // Malformed, so the whole header matches nothing.
            format!("{tag} garbage"),
            format!("{tag}, garbage"),
            format!("{tag}{tag}"),
            format!("*, {tag}"),
        ] {
            let change_to = &changes(&path)[n];
            let response = change(&ann, change_to, &stale).await;
            assert_eq!(
                response.status, 412,
                "{} {} {stale}",
                change_to.0, change_to.1
            );
            response.problem(412, "precondition_failed");
        }
        let after = ann.get(&path).await.expect(200).json();
        assert_eq!(after, before, "a rejected request changed the task");

        for good in ["\"stale\", {tag}", "{tag},\"stale\"", "{tag}", "*"] {
            let (path, tag) = new_task(&ann).await;
            let change_to = &changes(&path)[n];
            let good = good.replace("{tag}", &tag);
            let response = change(&ann, change_to, &good).await;
            assert_eq!(
                response.status, change_to.3,
                "{} {} {good}",
                change_to.0, change_to.1
            );
            // The old tag no longer matches.
            let expected = if change_to.0 == Method::DELETE {
                404
            } else {
                412
            };
            assert_eq!(change(&ann, change_to, &tag).await.status, expected);
        }
        let (path, tag) = new_task(&ann).await;
        let (method, at, body, status) = &changes(&path)[n];
        let mut request = ann.request(method.clone(), at);
        request = request
            .header("if-match", "\"stale\"")
            .header("if-match", &tag);
        if let Some(body) = body {
            request = request.json(body.clone());
        }
        assert_eq!(
            request.await.status,
            *status,
            "two header lines form one list"
        );
    }
}

#[tokio::test]
async fn the_tag_of_each_response_matches_in_the_next_request() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let (path, mut tag) = new_task(&ann).await;
    for n in [0, 1, 2, 1, 0, 2] {
        let response = change(&ann, &changes(&path)[n], &tag).await.expect(200);
        tag = tag_of(&response);
    }
    change(&ann, &changes(&path)[3], &tag).await.expect(204);
}

#[tokio::test]
async fn returns_404_for_a_missing_task_with_any_precondition() {
    let server = Server::shared().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let (theirs, tag) = new_task(&bob).await;
    let theirs = theirs.replace(&bob.id, &ann.id);
    let nowhere = format!("{}/{}", ann.tasks(), Uuid::now_v7());
    for path in [theirs, nowhere, format!("{}/no-uuid", ann.tasks())] {
        for change_to in changes(&path) {
            for expected in ["*", "\"stale\"", &tag, "garbage"] {
                change(&ann, &change_to, expected)
                    .await
                    .problem(404, "task_not_found");
            }
        }
        for known in ["*", "\"stale\"", &tag] {
            ann.get(&path)
                .header("if-none-match", known)
                .await
                .problem(404, "task_not_found");
        }
    }
}

// Both requests have the same tag and wait for the lock on the row.
#[tokio::test]
async fn one_of_two_concurrent_changes_with_the_same_tag_succeeds() {
    let server = Server::start().await;
    let ann = server.user().await;
    for (first, second) in [
        (0, 0),
        (0, 1),
        (1, 2),
        (2, 2),
        (3, 0),
        (1, 3),
        (3, 3),
        (2, 3),
    ] {
        let (path, tag) = new_task(&ann).await;
        let lock = server.lock("select 1 from tasks for update").await;
        let all = changes(&path);
        let pair = join_all([first, second].map(|n| change(&ann, &all[n], &tag)));
        let (responses, ()) = join(pair, lock.release_after(2)).await;
        let succeeded: Vec<bool> = responses
            .iter()
            .map(|response| matches!(response.status, 200 | 204))
            .collect();
        assert!(
            succeeded[0] ^ succeeded[1],
            "{first} and {second}: {} {}",
            responses[0].status,
            responses[1].status
        );
        let failed = responses
            .into_iter()
            .zip(succeeded)
            .find(|(_, succeeded)| !succeeded)
            .unwrap()
            .0;
        // 404 if the other request deleted the task.
        match failed.status {
            404 => drop(failed.problem(404, "task_not_found")),
            _ => drop(failed.problem(412, "precondition_failed")),
        }
    }
}

#[tokio::test]
async fn returns_412_for_changes_to_a_version_that_if_none_match_lists() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let (path, tag) = new_task(&ann).await;
    let read = || ann.get(&path).send();
    let before = read().await.expect(200).json();
    for change_to in &changes(&path) {
        for seen in [&tag, &format!("W/{tag}"), "*", &format!("\"other\", {tag}")] {
            change_with(&ann, change_to, &[("if-none-match", seen)])
                .await
                .problem(412, "precondition_failed");
        }
    }
    assert_eq!(read().await.expect(200).json(), before);
    for n in 0..4 {
        for unseen in ["\"other\"", "W/\"other\"", "garbage", "", "{tag} garbage"] {
            let (path, tag) = new_task(&ann).await;
            let unseen = unseen.replace("{tag}", &tag);
            let change_to = &changes(&path)[n];
            let response = change_with(&ann, change_to, &[("if-none-match", &unseen)]).await;
            assert_eq!(response.status, change_to.3, "{} {unseen}", change_to.0);
        }
    }
}

// RFC 9110 section 13.2.2
#[tokio::test]
async fn if_match_is_evaluated_before_if_none_match_on_every_method() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for (if_match, if_none_match, read, changed) in [
        ("{tag}", "\"other\"", 200, true),
        ("*", "\"other\"", 200, true),
        ("{tag}", "{tag}", 304, false),
        ("{tag}", "*", 304, false),
        ("*", "*", 304, false),
        ("*", "{tag}", 304, false),
        ("\"other\"", "{tag}", 412, false),
        ("\"other\"", "*", 412, false),
        ("\"other\"", "\"another\"", 412, false),
        ("W/{tag}", "{tag}", 412, false),
        ("garbage", "*", 412, false),
    ] {
        for n in 0..4 {
            let (path, tag) = new_task(&ann).await;
            let [if_match, if_none_match] =
                [if_match, if_none_match].map(|value| value.replace("{tag}", &tag));
            let headers = [
                ("if-match", if_match.as_str()),
                ("if-none-match", if_none_match.as_str()),
            ];
            for method in [Method::GET, Method::HEAD] {
                let get = (method.clone(), path.clone(), None, 200);
                let response = change_with(&ann, &get, &headers).await;
                assert_eq!(response.status, read, "{method} {headers:?}");
            }
            let change_to = &changes(&path)[n];
            let response = change_with(&ann, change_to, &headers).await;
            let status = if changed { change_to.3 } else { 412 };
            assert_eq!(response.status, status, "{} {headers:?}", change_to.0);
        }
    }
}

#[tokio::test]
async fn accepts_tags_with_the_suffix_of_a_compressing_proxy() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for suffix in ["-gzip", "-br", "-zstd", "-gzip-br"] {
        for n in 0..4 {
            let (path, tag) = new_task(&ann).await;
            let suffixed = format!("{}{suffix}\"", tag.trim_end_matches('"'));
            let change_to = &changes(&path)[n];
            for (name, value, read) in [
                ("if-none-match", &suffixed, 304),
                ("if-none-match", &format!("W/{suffixed}"), 304),
                ("if-match", &suffixed, 200),
                ("if-match", &format!("W/{suffixed}"), 412),
            ] {
                let get = (Method::GET, path.clone(), None, 200);
                let response = change_with(&ann, &get, &[(name, value)]).await;
                assert_eq!(response.status, read, "{name} {value}");
            }
            for (name, value) in [
                ("if-none-match", &suffixed),
                ("if-match", &format!("W/{suffixed}")),
            ] {
                change_with(&ann, change_to, &[(name, value)])
                    .await
                    .problem(412, "precondition_failed");
            }
            let response = change(&ann, change_to, &suffixed).await;
            assert_eq!(response.status, change_to.3, "{} {suffixed}", change_to.0);
        }
    }
    let (path, tag) = new_task(&ann).await;
    let bare = tag.trim_matches('"');
    for other in ["-deflate", "-gz", "gzip", "-gzip-", "-GZIP"] {
        change(&ann, &changes(&path)[0], &format!("\"{bare}{other}\""))
            .await
            .problem(412, "precondition_failed");
    }
}

// A select before the statement would read the old version, which the header does not list.
#[tokio::test]
async fn preconditions_are_checked_by_the_statement_that_changes_the_task() {
    let server = Server::start().await;
    let ann = server.user().await;
    for n in 0..4 {
        let (path, tag) = new_task(&ann).await;
        let touch = "update tasks set updated_at = updated_at + interval '1 second'";
        let lock = server.lock(touch).await;
        let all = changes(&path);
        let version = i64::from_str_radix(tag.trim_matches('"'), 16).unwrap();
        let next = format!("\"{:x}\"", version + 1_000_000);
        let headers = [("if-none-match", next.as_str())];
        let waiting = change_with(&ann, &all[n], &headers);
        let (response, ()) = join(waiting, lock.release_after(1)).await;
        response.problem(412, "precondition_failed");
    }
}
