//! Login rate limiting: failed logins are counted per account in the database, requests per client
//! network in memory.

use futures_util::future::join_all;
use serde_json::json;

use crate::auth::{
    ANOTHER_PASSWORD, change_password, delete_account, login, logout, refresh, register,
};
use crate::harness::{PASSWORD, Response, Server};
use crate::purge::age;

/// Asserts that the response is a 429, and returns its `Retry-After` in seconds.
pub(crate) fn expect_429(response: Response) -> u32 {
    let seconds = response
        .header("retry-after")
        .parse()
        .expect("whole seconds");
    response.problem(429, "too_many_attempts");
    seconds
}

async fn fail_ten_logins(server: &Server, email: &str) {
    fail_logins(server, email, 10).await;
}

/// Fails two logins with a wrong password, and counts the others in between, because verifying a
/// password is slow.
async fn fail_logins(server: &Server, email: &str, count: i32) {
    let fail = async || {
        let response = login(server, email, ANOTHER_PASSWORD).await;
        response.problem(401, "invalid_credentials");
    };
    fail().await;
    let add = "update login_failures set failures = failures + $2 where account = $1";
    let sql = server.sql().await;
    let changed = sql.execute(add, &[&email, &(count - 2)]).await;
    assert!(changed.expect("an update") > 0);
    fail().await;
}

/// Moves all failed logins into the past by `interval`.
pub(crate) async fn age_failures(server: &Server, interval: &str) {
    let sql = server.sql().await;
    age(&sql, "login_failures", interval, "true").await;
}

/// The first lockout lasts 30 s, later ones up to an hour. During a lockout the correct password is
/// rejected as well. Addresses without an account are treated equally.
#[tokio::test]
async fn each_failure_after_the_tenth_doubles_the_lockout() {
    let server = Server::start().await;
    let ann = server.user().await;
    for (email, password) in [
        (ann.email.as_str(), ann.password.as_str()),
        ("nobody@example.com", PASSWORD),
    ] {
        fail_ten_logins(&server, email).await;
        for (round, wait) in [30, 60, 120, 240, 480, 960, 1920, 3600, 3600]
            .into_iter()
            .enumerate()
        {
            let longest = expect_429(login(&server, email, ANOTHER_PASSWORD).await);
            assert!(
                longest <= wait && longest > wait - 10,
                "{longest} of {wait} s in round {round}"
            );
            // Attempts during a lockout are not verified and do not extend it.
            for password in [password, ANOTHER_PASSWORD, ""] {
                let left = expect_429(login(&server, email, password).await);
                assert!(left <= longest);
            }
            age_failures(&server, &format!("{} seconds", wait + 1)).await;
            login(&server, email, ANOTHER_PASSWORD)
                .await
                .problem(401, "invalid_credentials");
        }
    }
}

#[tokio::test]
async fn a_successful_login_resets_the_count() {
    let server = Server::start().await;
    let ann = server.user().await;
    fail_logins(&server, &ann.email, 9).await;
    login(&server, &ann.email, &ann.password).await.expect(200);
    fail_ten_logins(&server, &ann.email).await;
    expect_429(login(&server, &ann.email, &ann.password).await);
    age_failures(&server, "31 seconds").await;
    login(&server, &ann.email, &ann.password).await.expect(200);
    fail_ten_logins(&server, &ann.email).await;
    let wait = expect_429(login(&server, &ann.email, ANOTHER_PASSWORD).await);
    assert!(wait <= 30, "the count was not reset: {wait} s");
}

#[tokio::test]
async fn the_count_resets_a_day_after_the_last_failure() {
    let server = Server::start().await;
    let ann = server.user().await;
    fail_ten_logins(&server, &ann.email).await;
    age_failures(&server, "24 hours 1 second").await;
    fail_ten_logins(&server, &ann.email).await;
    let wait = expect_429(login(&server, &ann.email, ANOTHER_PASSWORD).await);
    assert!(wait <= 30, "the count was not reset: {wait} s");

    // Within a day of the last failure, the count continues.
    age_failures(&server, "23 hours").await;
    login(&server, &ann.email, ANOTHER_PASSWORD)
        .await
        .expect(401);
    let wait = expect_429(login(&server, &ann.email, ANOTHER_PASSWORD).await);
    assert!(wait > 30, "{wait}");
}

#[tokio::test]
async fn all_spellings_of_an_address_share_one_count() {
    let server = Server::start().await;
    server.register("ann@example.com").await;
    for n in 0..10 {
        let spelling = ["ann@example.com", "ANN@example.com", " Ann@Example.com\t"][n % 3];
        login(&server, spelling, ANOTHER_PASSWORD).await.expect(401);
    }
    for spelling in ["ann@example.com", "aNN@example.com", "ann@example.com  "] {
        expect_429(login(&server, spelling, PASSWORD).await);
    }
}

#[tokio::test]
async fn instances_share_lockouts() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let ann = here.user().await;
    for server in [&here, &there].into_iter().cycle().take(10) {
        login(server, &ann.email, ANOTHER_PASSWORD)
            .await
            .expect(401);
    }
    for server in [&here, &there] {
        expect_429(login(server, &ann.email, &ann.password).await);
    }
    let later = here.sibling(&[]).await;
    expect_429(login(&later, &ann.email, &ann.password).await);
}

/// Sends 40 concurrent attempts to two instances. A 401 means that the password was verified.
#[tokio::test]
async fn at_most_ten_of_forty_concurrent_logins_are_verified() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let ann = here.user().await;
    for email in [ann.email.as_str(), "nobody@example.com"] {
        let statuses = join_all((0..40).map(|n| {
            let server = if n % 2 == 0 { &here } else { &there };
            async move {
                let response = login(server, email, ANOTHER_PASSWORD).await;
                let status = response.status;
                match status {
                    401 => drop(response.problem(401, "invalid_credentials")),
                    // A busy machine may reject a login without verifying it.
                    503 => drop(response.problem(503, "overloaded")),
                    _ => assert!(expect_429(response) >= 1),
                }
                status
            }
        }))
        .await;
        let verified = statuses.iter().filter(|&&status| status == 401).count();
        assert!((1..=10).contains(&verified), "{verified} of 40 for {email}");
        // The account is locked after ten failures in total.
        for _ in verified..10 {
            login(&here, email, ANOTHER_PASSWORD).await.expect(401);
        }
        expect_429(login(&here, email, PASSWORD).await);
        expect_429(login(&there, email, PASSWORD).await);
    }
}

#[tokio::test]
async fn a_lockout_affects_no_other_user_and_no_existing_session() {
    let server = Server::start().await;
    let ann = server.user().await;
    let bob = server.user().await;
    fail_ten_logins(&server, &ann.email).await;
    expect_429(login(&server, &ann.email, &ann.password).await);

    ann.create_task("water the plants").await;
    ann.get(ann.tasks()).await.expect(200);
    refresh(&server, &ann.refresh_token).await.expect(200);
    login(&server, &bob.email, &bob.password).await.expect(200);
    change_password(&server, &bob.access_token, &bob.password, ANOTHER_PASSWORD)
        .await
        .expect(200);
    register(&server, "cid@example.com", PASSWORD)
        .await
        .expect(201);
    logout(&server, &ann.access_token).await.expect(204);
}

/// A thief cannot use a stolen token to guess the password or to lock out the owner's logins. Failed
/// logins do not prevent the owner from changing the password.
#[tokio::test]
async fn failed_password_confirmations_are_counted_separately_from_failed_logins() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    fail_ten_logins(&server, &ann.email).await;
    for _ in 0..5 {
        change_password(&server, &ann.access_token, "wrong", ANOTHER_PASSWORD)
            .await
            .problem(403, "wrong_password");
        delete_account(&server, &ann.access_token, "wrong")
            .await
            .problem(403, "wrong_password");
    }
    for password in ["wrong", ann.password.as_str()] {
        let wait = expect_429(
            change_password(&server, &ann.access_token, password, ANOTHER_PASSWORD).await,
        );
        assert!(wait <= 30, "{wait}");
        expect_429(delete_account(&server, &ann.access_token, password).await);
    }
    // A login does not reset the count of failed confirmations, and the two counts are separate.
    let sql = server.sql().await;
    age(
        &sql,
        "login_failures",
        "31 seconds",
        "account = 'ann@example.com'",
    )
    .await;
    let again = server.login(&ann.email, &ann.password).await;
    expect_429(change_password(&server, &again.access_token, &ann.password, PASSWORD).await);

    age_failures(&server, "31 seconds").await;
    change_password(&server, &ann.access_token, "wrong", ANOTHER_PASSWORD)
        .await
        .expect(403);
    let wait = expect_429(delete_account(&server, &ann.access_token, "wrong").await);
    assert!(wait > 30, "{wait}");
    age_failures(&server, "61 seconds").await;
    let changed =
        change_password(&server, &ann.access_token, &ann.password, ANOTHER_PASSWORD).await;
    assert!(changed.status < 300, "{}", changed.status);
    // Success resets the count.
    let again = server.login(&ann.email, ANOTHER_PASSWORD).await;
    for _ in 0..9 {
        delete_account(&server, &again.access_token, "wrong")
            .await
            .expect(403);
    }
    delete_account(&server, &again.access_token, ANOTHER_PASSWORD)
        .await
        .expect(204);
}

/// Sends 40 concurrent requests to the two endpoints that require the password.
#[tokio::test]
async fn at_most_ten_of_forty_concurrent_password_confirmations_are_verified() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let ann = here.user().await;
    let statuses = join_all((0..40).map(|n| {
        let (server, ann) = (if n % 2 == 0 { &here } else { &there }, &ann);
        async move {
            if n % 4 < 2 {
                change_password(server, &ann.access_token, "wrong", ANOTHER_PASSWORD)
                    .await
                    .status
            } else {
                delete_account(server, &ann.access_token, "wrong")
                    .await
                    .status
            }
        }
    }))
    .await;
    let verified = statuses.iter().filter(|&&status| status == 403).count();
    let rejected = statuses
        .iter()
        .filter(|&&status| [429, 503].contains(&status))
        .count();
    assert_eq!(verified + rejected, 40, "{statuses:?}");
    assert!(verified <= 10, "{verified} of 40 were verified");
}

/// Sends an invalid refresh token, the cheapest request that the rate limit counts.
async fn limited_status(server: &Server, forwarded_for: &[&str]) -> u16 {
    let mut request = server.post("/api/v1/auth/refresh");
    for value in forwarded_for {
        request = request.header("x-forwarded-for", *value);
    }
    let response = request.json(json!({"refresh_token": "x"})).await;
    let status = response.status;
    if status == 429 {
        assert!(expect_429(response) >= 1);
    } else {
        response.problem(401, "invalid_refresh_token");
    }
    status
}

/// Registration, login, refresh, password changes and account deletion share one rate limit.
#[tokio::test]
async fn limits_the_attempts_per_minute_from_one_address() {
    let server = Server::with(&[("AUTH_RATE_PER_MINUTE", "3")]).await;
    let ann = register(&server, "ann@example.com", PASSWORD)
        .await
        .expect(201)
        .json();
    let token = crate::auth::text(&ann, "access_token");
    login(&server, "ann@example.com", PASSWORD)
        .await
        .expect(200);
    refresh(&server, "x").await.expect(401);
    for response in [
        register(&server, "bob@example.com", PASSWORD).await,
        login(&server, "ann@example.com", PASSWORD).await,
        refresh(&server, "x").await,
        change_password(&server, &token, PASSWORD, ANOTHER_PASSWORD).await,
        delete_account(&server, &token, PASSWORD).await,
    ] {
        // 3 per minute is one every 20 s.
        let wait = expect_429(response);
        assert!((1..=20).contains(&wait), "{wait}");
    }
    // Requests with an access token are not affected.
    for path in ["/api/v1/auth/me", "/api/v1/auth/sessions"] {
        server.get(path).bearer(&token).await.expect(200);
    }
    logout(&server, &token).await.expect(204);
}

#[tokio::test]
async fn a_rate_of_0_disables_the_rate_limit() {
    let server = Server::with(&[("AUTH_RATE_PER_MINUTE", "0")]).await;
    let statuses = join_all((0..400).map(|_| limited_status(&server, &[]))).await;
    assert!(statuses.iter().all(|&status| status == 401));
}

/// Any client can send the header.
#[tokio::test]
async fn ignores_x_forwarded_for_unless_a_trusted_proxy_sent_it() {
    for trusted in ["", "192.0.2.1,10.0.0.0/8,::2"] {
        let server =
            Server::with(&[("AUTH_RATE_PER_MINUTE", "1"), ("TRUSTED_PROXIES", trusted)]).await;
        assert_eq!(limited_status(&server, &["203.0.113.2"]).await, 401);
        assert_eq!(limited_status(&server, &["203.0.113.3"]).await, 429);
        assert_eq!(
            limited_status(&server, &["127.0.0.1, 203.0.113.4"]).await,
            429
        );
        let log = crate::log::read_log(&server).await;
        assert!(!log.contains("203.0.113."), "{log}");
        assert!(log.contains("client=127.0.0.1"), "{log}");
    }
}

#[tokio::test]
async fn behind_trusted_proxies_the_last_untrusted_hop_is_the_client() {
    let server = Server::with(&[
        ("AUTH_RATE_PER_MINUTE", "1"),
        (
            "TRUSTED_PROXIES",
            "127.0.0.0/8,10.0.0.0/8,2001:db8:ffff::/48",
        ),
    ])
    .await;
    let use_up = async |forwarded_for: &[&str]| {
        assert_eq!(limited_status(&server, forwarded_for).await, 401);
    };

    use_up(&["203.0.113.9"]).await;
    for same in [
        &["203.0.113.9"][..],
        // The client itself may have sent the preceding entries.
        &["198.51.100.1, 203.0.113.9"],
        &["198.51.100.2,203.0.113.9"],
        &["unknown, 203.0.113.9"],
        &["<script>, 203.0.113.9"],
        // Trusted proxies at the end are skipped, whether in one header or in several.
        &["198.51.100.3, 203.0.113.9, 10.1.2.3"],
        &["203.0.113.9, 10.1.2.3, 2001:db8:ffff::7, 127.0.0.1"],
        &["198.51.100.4", "203.0.113.9"],
        &["203.0.113.9", "10.1.2.3"],
        // Some proxies append the port.
        &["203.0.113.9:41234"],
    ] {
        assert_eq!(limited_status(&server, same).await, 429, "{same:?}");
    }
    assert_eq!(limited_status(&server, &["203.0.113.10"]).await, 401);
    assert_eq!(
        limited_status(&server, &["203.0.113.9, 203.0.113.11"]).await,
        401
    );

    // All addresses of an IPv6 /64 count as one client, as do both forms of an IPv4 address.
    use_up(&["2001:db8:1:2::1"]).await;
    assert_eq!(
        limited_status(&server, &["2001:db8:1:2:ffff::9"]).await,
        429
    );
    assert_eq!(
        limited_status(&server, &["2001:DB8:1:2:0:0:0:3"]).await,
        429
    );
    assert_eq!(
        limited_status(&server, &["[2001:db8:1:2::7]:443"]).await,
        429
    );
    assert_eq!(limited_status(&server, &["2001:db8:1:3::1"]).await, 401);
    use_up(&["::ffff:203.0.113.50"]).await;
    assert_eq!(limited_status(&server, &["203.0.113.50"]).await, 429);
    assert_eq!(limited_status(&server, &["::ffff:203.0.113.51"]).await, 401);

    // If the entry is not an address, the proxy itself counts as the client.
    use_up(&["nonsense"]).await;
    for nonsense in [
        "",
        "203.0.113.256",
        "203.0.113.10;x",
        ", ,",
        "\"203.0.113.10\"",
    ] {
        assert_eq!(
            limited_status(&server, &[nonsense]).await,
            429,
            "{nonsense:?}"
        );
    }
    assert_eq!(limited_status(&server, &["203.0.113.12"]).await, 401);
}
