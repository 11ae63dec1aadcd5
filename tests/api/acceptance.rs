//! The index of the requirements, and the tests of requirements that span several areas.

use std::{collections::BTreeMap, fs, path::Path};

use futures_util::future::{join, join_all};
use serde_json::json;

use crate::harness::{Server, Wire, forge, until};

/// Each requirement, and the files with its tests, which name its number in a comment.
const REQUIREMENTS: &[(&str, &str, &[&str])] = &[
    (
        "FR-001",
        "verify each request's JWT before processing it",
        &["auth.rs", "http.rs", "tokens.rs"],
    ),
    (
        "FR-002",
        "take the user's id and e-mail address from the token",
        &["auth.rs"],
    ),
    (
        "FR-003",
        "the token's user must be the user in the path",
        &["isolation.rs"],
    ),
    (
        "FR-004",
        "401 for expired tokens",
        &["acceptance.rs", "tokens.rs"],
    ),
    (
        "FR-005",
        "titles of 1 to 200 characters, descriptions of up to 1000",
        &["tasks.rs", "validation.rs"],
    ),
    (
        "FR-006",
        "use at most 20 database connections",
        &["faults/overload.rs"],
    ),
    (
        "FR-007",
        "users reach only their own tasks",
        &["acceptance.rs", "isolation.rs", "sql.rs"],
    ),
    (
        "FR-008",
        "return 401, 403, 404 and 422 as documented",
        &["http.rs", "isolation.rs", "validation.rs"],
    ),
    (
        "FR-009",
        "create, read, update, delete and complete tasks",
        &["tasks.rs"],
    ),
    (
        "FR-010",
        "log failed authentication as a warning",
        &["log.rs"],
    ),
    ("FR-011", "registration", &["auth.rs"]),
    (
        "FR-012",
        "store passwords as bcrypt hashes",
        &["auth.rs", "passwords.rs"],
    ),
    ("FR-013", "return a JWT from login", &["auth.rs"]),
    (
        "FR-014",
        "store an id, an e-mail address, a hash and times for each user",
        &["auth.rs", "validation.rs"],
    ),
    (
        "FR-015",
        "e-mail addresses are unique",
        &["auth.rs", "validation.rs"],
    ),
    (
        "FR-016",
        "access tokens are valid for 24 hours",
        &["auth.rs"],
    ),
    ("FR-017", "refresh tokens extend a session", &["refresh.rs"]),
    (
        "SC-001",
        "95 % of operations on a user's own tasks succeed",
        &["acceptance.rs"],
    ),
    (
        "SC-002",
        "99.9 % of decisions on tokens and isolation are correct",
        &["isolation.rs"],
    ),
    (
        "SC-003",
        "95 % of responses within a second under normal load",
        &["faults/overload.rs"],
    ),
    (
        "SC-004",
        "no access to another user's data",
        &["acceptance.rs", "isolation.rs", "sql.rs"],
    ),
];

#[test]
fn every_requirement_has_tests_in_the_indexed_files() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/api");
    let mut sources = BTreeMap::new();
    for (number, description, files) in REQUIREMENTS {
        for file in *files {
            let source = sources
                .entry(file)
                .or_insert_with(|| fs::read_to_string(directory.join(file)).unwrap());
            let mut comments = source.lines().filter(|l| l.trim_start().starts_with("//"));
            assert!(
                comments.any(|line| line.contains(number)),
                "{file} does not name {number}: {description}"
            );
        }
    }
}

// SC-001
#[tokio::test]
async fn every_operation_on_a_users_own_tasks_succeeds() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for n in 0..20 {
        let path = ann.path_of(&ann.create_task(&format!("task {n}")).await);
        ann.get(&path).await.expect(200);
        let change = json!({"title": "changed"});
        ann.patch(&path).json(change).await.expect(200);
        ann.patch(format!("{path}/complete")).await.expect(200);
        ann.get(ann.tasks()).await.expect(200);
        ann.delete(&path).await.expect(204);
    }
}

// FR-004: a token is verified once, when its request arrives.
#[tokio::test]
async fn serves_a_request_whose_token_expires_before_its_body_arrives() {
    let server = Server::shared().await;
    let mut ann = server.user().await;
    let exp = jiff::Timestamp::now().as_second() + 4;
    ann.access_token = forge(
        server.secret(),
        json!({"alg": "HS256", "typ": "JWT"}),
        json!({
            "user_id": ann.id, "sub": ann.id, "email": ann.email, "sid": ann.session_id,
            "iat": exp - 86_400, "exp": exp,
        }),
    );

    // The status 100 shows that the token has been verified.
    let mut wire = Wire::open(server).await;
    wire.send(format!(
        "POST {} HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer {}\r\nExpect: 100-continue\r\n\
         Content-Type: application/json\r\nContent-Length: 16\r\n\r\n",
        ann.tasks(),
        ann.access_token
    ))
    .await;
    assert_eq!(wire.response().await.status, 100);
    until("the token expires", async || {
        ann.get("/api/v1/auth/me").await.status == 401
    })
    .await;
    wire.send(r#"{"title":"late"}"#).await;
    assert_eq!(wire.response().await.status, 201);
}

// FR-007, SC-004
#[tokio::test]
async fn concurrent_users_see_only_their_own_tasks() {
    let server = Server::shared().await;
    let users = join_all((0..10).map(|_| server.user())).await;
    join_all(users.iter().map(async |user| {
        for n in 0..20 {
            user.create_task(&format!("{} {n}", user.email)).await;
        }
    }))
    .await;
    for user in &users {
        let tasks = user.get(user.tasks()).await.expect(200).json();
        let tasks = tasks.as_array().unwrap();
        assert_eq!(tasks.len(), 20);
        for task in tasks {
            let title = task["title"].as_str().unwrap();
            assert!(title.starts_with(&user.email), "{task}");
            assert_eq!(task["user_id"], json!(user.id));
        }
    }
}

// FR-008
#[tokio::test]
async fn returns_503_and_changes_nothing_if_the_database_fails_during_a_write() {
    let server = Server::start().await;
    let ann = server.user().await;
    let task = ann.create_task("before").await;
    let path = ann.path_of(&task);
    let change = || ann.patch(&path).json(json!({"title": "after"}));

    let lock = server.lock("select 1 from tasks for update").await;
    let (response, ()) = join(change().send(), async {
        lock.wait_for_blocked(1).await;
        lock.terminate_blocked().await;
    })
    .await;
    assert!(!response.header("retry-after").is_empty());
    response.problem(503, "database_unavailable");
    lock.release().await;

    assert_eq!(ann.get(&path).await.expect(200).json(), task);
    change().await.expect(200);
}
