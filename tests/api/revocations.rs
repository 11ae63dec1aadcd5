//! No revocation is missed, however its transaction goes.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::auth::assert_signed_in;
use crate::harness::Server;
use crate::purge::age;
use crate::sessions::assert_revoked;

/// Whether the whole form of the tests was asked for, which takes minutes.
fn is_full() -> bool {
    std::env::var("FAULTS").is_ok_and(|form| form == "full")
}

/// Sends requests with a token that is still good to both instances, so that both refresh what
/// they know of revocations all the time.
async fn use_for(time: Duration, servers: [&Server; 2], token: &str) {
    let since = Instant::now();
    while since.elapsed() < time {
        for server in servers {
            assert_signed_in(server, token).await;
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Deletes a session in a transaction that commits after this time, of which only the last seconds
/// are waited for: the rest is subtracted from the time that the revocation was written at.
async fn end_in_a_long_transaction(took: Duration, waited: Duration) {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let sql = here.sql().await;
    let ann = here.user().await;
    let bystander = here.user().await;
    let condition = format!("id = '{}'", ann.session_id);
    sql.batch_execute(&format!("begin; delete from sessions where {condition}"))
        .await
        .expect("the session is deleted");
    if took > waited {
        let condition = format!("session_id = '{}'", ann.session_id);
        let before = format!("{} seconds", (took - waited).as_secs());
        age(&sql, "revocations", &before, &condition).await;
    }
    use_for(waited, [&here, &there], &ann.access_token).await;
    // Others come and go meanwhile, and theirs are seen.
    let other = here.login(&bystander.email, &bystander.password).await;
    here.delete(format!("/api/v1/auth/sessions/{}", other.session_id))
        .bearer(&bystander.access_token)
        .await
        .expect(204);
    assert_revoked(&there, &other.access_token, Instant::now()).await;
    use_for(Duration::from_secs(1), [&here, &there], &ann.access_token).await;

    sql.batch_execute("commit").await.expect("the commit");
    let ended = Instant::now();
    tokio::join!(
        assert_revoked(&here, &ann.access_token, ended),
        assert_revoked(&there, &ann.access_token, ended),
    );
    assert_signed_in(&there, &bystander.access_token).await;
}

#[tokio::test]
async fn a_revocation_that_commits_late_is_seen_on_every_instance() {
    let (took, waited) = match is_full() {
        false => (Duration::from_secs(3600), Duration::from_secs(2)),
        true => (Duration::from_secs(40), Duration::from_secs(40)),
    };
    end_in_a_long_transaction(took, waited).await;
}

#[tokio::test]
async fn a_revocation_that_is_rolled_back_is_none() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.user().await;
    sql.batch_execute("begin; delete from sessions")
        .await
        .expect("the session is deleted");
    use_for(Duration::from_secs(1), [&server; 2], &ann.access_token).await;
    sql.batch_execute("rollback").await.expect("the rollback");
    use_for(Duration::from_secs(2), [&server; 2], &ann.access_token).await;
}

/// Instances may be set to different lifetimes: one that was set to a shorter one remembers what is
/// revoked until the tokens of the others have expired.
#[tokio::test]
async fn a_short_lifetime_of_tokens_does_not_shorten_the_memory_of_revocations() {
    let here = Server::start().await;
    let there = here.sibling(&[("ACCESS_TOKEN_TTL", "1")]).await;
    let ann = here.user().await;
    let other = here.login(&ann.email, &ann.password).await;
    here.delete(format!("/api/v1/auth/sessions/{}", other.session_id))
        .bearer(&ann.access_token)
        .await
        .expect(204);
    assert_revoked(&there, &other.access_token, Instant::now()).await;
    if is_full() {
        use_for(Duration::from_secs(125), [&here, &there], &ann.access_token).await;
        assert_revoked(&there, &other.access_token, Instant::now()).await;
    }
}
