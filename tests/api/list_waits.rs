//! `Prefer: wait=N`: requests that wait until a list changes.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use tokio::time::{sleep, timeout};

use crate::conditional_lists::assert_unchanged;
use crate::harness::{Request, Response, Server, User, until};
use crate::metrics::gauge;

/// Shorter than the 30 s after which the requests return without a change.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

impl User {
    /// Builds a request for the list that waits while the list has this tag.
    pub(crate) fn wait_for_list(&self, tag: &str) -> Request {
        let list = self.get(self.tasks()).header("prefer", "wait=30");
        list.header("if-none-match", tag)
    }

    /// Builds a request that waits for changes after this cursor.
    fn wait_for_changes(&self, cursor: &str) -> Request {
        let path = format!("{}?since={cursor}", self.changes());
        self.get(path).header("prefer", "wait=30")
    }
}

async fn start() -> Server {
    Server::with(&[("METRICS_ADDR", "127.0.0.1:0"), ("DB_POOL_SIZE", "2")]).await
}

/// Waits until this many requests wait for a change.
async fn until_waiting(server: &Server, count: usize) {
    let name = "todo_api_http_waiting_requests";
    until("the requests are waiting", async || {
        gauge(server, name).await == count
    })
    .await;
}

/// Sends requests, performs the action once all of them are waiting, and returns the responses.
async fn while_waiting(
    server: &Server,
    requests: impl IntoIterator<Item = Request>,
    action: impl AsyncFnOnce(),
) -> Vec<Response> {
    let sent: Vec<_> = requests
        .into_iter()
        .map(|request| tokio::spawn(request.send()))
        .collect();
    until_waiting(server, sent.len()).await;
    action().await;
    let responses = timeout(RESPONSE_TIMEOUT, join_all(sent)).await;
    let responses = responses.expect("the requests still wait");
    responses.into_iter().map(Result::unwrap).collect()
}

/// The pool has two connections, so waiting requests must not hold any.
#[tokio::test]
async fn a_change_wakes_the_requests_that_wait_for_its_list() {
    let server = start().await;
    let there = server.sibling(&[]).await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    for from in [&ann, &ann.on(&there)] {
        let (tag, cursor) = (ann.list_tag().await, ann.changes_since("", 99).await.cursor);
        let requests = [ann.wait_for_list(&tag), ann.wait_for_changes(&cursor)];
        let responses = while_waiting(&server, requests, async || {
            let change = from.put(from.path_of(&task)).json(json!({"title": "b"}));
            change.await.expect(200);
        })
        .await;
        for response in &responses {
            assert_eq!(response.status, 200);
            assert_eq!(response.header("preference-applied"), "wait=30");
        }
        assert_eq!(responses[0].header("etag"), ann.list_tag().await);
        assert_eq!(responses[0].json()[0]["title"], "b");
        assert_eq!(responses[1].json()["tasks"][0]["title"], "b");
    }
    // Waiting requests are not logged as slow.
    let log = server.log();
    let slow = |line: &&str| line.contains("slow request") && line.contains("method=GET");
    assert_eq!(log.lines().find(slow), None);
}

#[tokio::test]
async fn a_change_does_not_wake_requests_that_wait_for_another_list() {
    let server = start().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let waiting = tokio::spawn(bob.wait_for_list(&bob.list_tag().await).send());
    let own = tokio::spawn(ann.wait_for_list(&ann.list_tag().await).send());
    until_waiting(&server, 2).await;
    ann.create_task("a").await;
    own.await.unwrap().expect(200);
    // Longer than changes take to reach other instances.
    sleep(Duration::from_secs(2)).await;
    assert!(!waiting.is_finished());
    bob.create_task("b").await;
    waiting.await.unwrap().expect(200);
}

#[tokio::test]
async fn a_wait_ends_after_the_preferred_seconds() {
    let server = Server::start().await;
    let ann = server.user().await;
    let tag = ann.list_tag().await;
    let list = |prefer: &str| {
        let list = ann.get(ann.tasks()).header("if-none-match", &tag);
        list.header("prefer", prefer)
    };
    for prefer in [
        "wait=1",
        "respond-async, WAIT=\"1\"; foo=bar",
        "wait=1, wait=20",
    ] {
        let start = Instant::now();
        assert_unchanged(&list(prefer).await, &tag, Some("wait=1"));
        assert!(start.elapsed() >= Duration::from_secs(1), "{prefer}");
    }
    let start = Instant::now();
    let changes = ann.get(ann.changes()).header("prefer", "wait=1").await;
    assert!(start.elapsed() >= Duration::from_secs(1));
    assert_eq!(changes.header("preference-applied"), "wait=1");
    let page = changes.expect(200).json();
    assert_eq!((&page["tasks"], &page["more"]), (&json!([]), &json!(false)));

    let immediate_status = async |ann: &User, request: Request| {
        let response = timeout(RESPONSE_TIMEOUT, request.send())
            .await
            .expect("the request waits");
        assert_eq!(
            response.headers.get("preference-applied"),
            None,
            "{}",
            ann.email
        );
        response.status
    };
    for prefer in [
        "wait",
        "wait=x",
        "wait=-1",
        "wait=",
        "wait=1.5",
        "wait=0",
        "waiting=30",
        "wait, wait=30",
        "wait=30\"",
        "foo=\"a, wait=30\"",
    ] {
        assert_eq!(immediate_status(&ann, list(prefer)).await, 304, "{prefer}");
    }
    // These requests have nothing to wait for.
    let plain = ann.get(ann.tasks()).header("prefer", "wait=30");
    assert_eq!(immediate_status(&ann, plain).await, 200);
    assert_eq!(
        immediate_status(&ann, ann.wait_for_list("\"other\"")).await,
        200
    );

    let limited = server.sibling(&[("WAIT_MAX", "1")]).await;
    for prefer in ["wait=30", "wait=99999999999999999999999"] {
        let list = ann.on(&limited).get(ann.tasks()).header("prefer", prefer);
        assert_unchanged(
            &list.header("if-none-match", &tag).await,
            &tag,
            Some("wait=1"),
        );
    }
    let off = server.sibling(&[("WAIT_MAX", "0")]).await;
    let list = ann.on(&off).wait_for_list(&tag);
    assert_eq!(immediate_status(&ann, list).await, 304);
}

/// The poll of the lists alone would take half a second for each change on average.
#[tokio::test]
async fn changes_of_the_same_instance_wake_requests_at_once() {
    let server = start().await;
    let ann = server.user().await;
    let mut total = Duration::ZERO;
    for _ in 0..10 {
        let waiting = tokio::spawn(ann.wait_for_list(&ann.list_tag().await).send());
        until_waiting(&server, 1).await;
        let start = Instant::now();
        ann.create_task("a").await;
        waiting.await.unwrap().expect(200);
        total += start.elapsed();
        until_waiting(&server, 0).await;
    }
    assert!(
        total < Duration::from_millis(2500),
        "{total:?} for ten changes"
    );
}

#[tokio::test]
async fn four_requests_of_a_user_can_wait_and_further_ones_return_immediately() {
    let server = start().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let (tag, cursor) = (ann.list_tag().await, ann.changes_since("", 9).await.cursor);
    let bobs = bob.wait_for_list(&bob.list_tag().await);
    let four = [
        ann.wait_for_list(&tag),
        ann.wait_for_list(&tag),
        ann.wait_for_changes(&cursor),
        ann.wait_for_changes(&cursor),
    ];
    let responses = while_waiting(&server, four, async || {
        assert_unchanged(&ann.wait_for_list(&tag).await, &tag, None);
        let changes = ann.wait_for_changes(&cursor).await;
        assert_eq!(changes.headers.get("preference-applied"), None);
        let bobs = tokio::spawn(bobs.send());
        until_waiting(&server, 5).await;
        bob.create_task("b").await;
        bobs.await.unwrap().expect(200);
        ann.create_task("a").await;
    })
    .await;
    assert!(responses.iter().all(|response| response.status == 200));
}

#[tokio::test]
async fn a_wait_ends_with_its_session() {
    let server = start().await;
    let there = server.sibling(&[]).await;
    for revoker in [&server, &there] {
        let ann = server.user().await;
        let waiting = [ann.wait_for_list(&ann.list_tag().await)];
        let responses = while_waiting(&server, waiting, async || {
            let logout = ann.on(revoker).post("/api/v1/auth/logout");
            logout.await.expect(204);
        })
        .await;
        responses[0].problem(401, "invalid_token");
    }
}

#[tokio::test]
async fn a_wait_ends_when_the_service_stops() {
    let server = start().await;
    let ann = server.user().await;
    let (tag, cursor) = (ann.list_tag().await, ann.changes_since("", 9).await.cursor);
    let waiting = [ann.wait_for_list(&tag), ann.wait_for_changes(&cursor)];
    let responses = while_waiting(&server, waiting, async || {
        assert!(server.stop().await.success());
    })
    .await;
    assert_unchanged(&responses[0], &tag, Some("wait=30"));
    assert_eq!(responses[1].status, 200);
    for response in &responses {
        assert_eq!(response.header("connection"), "close");
    }
}

/// One query is for the lists, the other for the revocations.
#[tokio::test]
async fn all_waiting_requests_share_two_queries_per_second_and_none_follow() {
    let server = start().await;
    let mut users = Vec::new();
    for _ in 0..10 {
        users.push(server.user().await);
    }
    let mut requests = Vec::new();
    for user in &users {
        let tag = user.list_tag().await;
        requests.extend([user.wait_for_list(&tag), user.wait_for_list(&tag)]);
    }
    let statements = async || gauge(&server, "todo_api_db_query_duration_seconds_count").await;
    while_waiting(&server, requests, async || {
        let (before, start) = (statements().await, Instant::now());
        sleep(Duration::from_secs(3)).await;
        let count = statements().await - before;
        let seconds = start.elapsed().as_secs() as usize + 1;
        assert!((2..=2 * seconds).contains(&count), "{count} in {seconds} s");
        for user in &users {
            user.create_task("a").await;
        }
    })
    .await;
    // Let the last poll finish.
    sleep(Duration::from_secs(2)).await;
    let before = statements().await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!(statements().await, before);
}
