//! No revocation is missed, regardless of when its transaction commits.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::auth::assert_signed_in;
use crate::faults::short_or_full;
use crate::harness::Server;
use crate::purge::age;
use crate::sessions::assert_revoked;

/// Sends requests with a valid token to both instances for this long, so that both keep refreshing
/// their revocations.
async fn send_requests(duration: Duration, servers: [&Server; 2], token: &str) {
    let start = Instant::now();
    while start.elapsed() < duration {
        for server in servers {
            assert_signed_in(server, token).await;
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// In the short form, the test waits only for the last two seconds of the transaction, and moves
/// the time of the revocation into the past.
#[tokio::test]
async fn a_revocation_that_commits_late_takes_effect_on_every_instance() {
    let duration = Duration::from_secs(short_or_full(3600, 40));
    let waited = Duration::from_secs(short_or_full(2, 40));
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let sql = here.sql().await;
    let ann = here.user().await;
    let bob = here.user().await;
    let condition = format!("id = '{}'", ann.session_id);
    sql.batch_execute(&format!("begin; delete from sessions where {condition}"))
        .await
        .expect("the session is deleted");
    if duration > waited {
        let condition = format!("session_id = '{}'", ann.session_id);
        let earlier = format!("{} seconds", (duration - waited).as_secs());
        age(&sql, "revocations", &earlier, &condition).await;
    }
    send_requests(waited, [&here, &there], &ann.access_token).await;
    // Other revocations take effect while the transaction is open.
    let other = here.login(&bob.email, &bob.password).await;
    bob.delete(format!("/api/v1/auth/sessions/{}", other.session_id))
        .await
        .expect(204);
    assert_revoked(&there, &other.access_token, Instant::now()).await;
    let second = Duration::from_secs(1);
    send_requests(second, [&here, &there], &ann.access_token).await;

    sql.batch_execute("commit").await.expect("the commit");
    let ended = Instant::now();
    tokio::join!(
        assert_revoked(&here, &ann.access_token, ended),
        assert_revoked(&there, &ann.access_token, ended),
    );
    assert_signed_in(&there, &bob.access_token).await;
}

#[tokio::test]
async fn a_revocation_that_is_rolled_back_has_no_effect() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.user().await;
    sql.batch_execute("begin; delete from sessions")
        .await
        .expect("the session is deleted");
    send_requests(Duration::from_secs(1), [&server; 2], &ann.access_token).await;
    sql.batch_execute("rollback").await.expect("the rollback");
    send_requests(Duration::from_secs(2), [&server; 2], &ann.access_token).await;
}

/// Instances can have different token lifetimes. Each keeps a revocation until the tokens of all
/// instances have expired.
#[tokio::test]
async fn a_short_token_lifetime_does_not_shorten_revocations() {
    let here = Server::start().await;
    let there = here.sibling(&[("ACCESS_TOKEN_TTL", "1")]).await;
    let ann = here.user().await;
    let other = here.login(&ann.email, &ann.password).await;
    ann.delete(format!("/api/v1/auth/sessions/{}", other.session_id))
        .await
        .expect(204);
    assert_revoked(&there, &other.access_token, Instant::now()).await;
    let duration = Duration::from_secs(short_or_full(0, 125));
    send_requests(duration, [&here, &there], &ann.access_token).await;
    assert_revoked(&there, &other.access_token, Instant::now()).await;
}
