//! Login rate limiting: failures are counted per account in the database, requests per address in
//! memory.

use futures_util::future::join_all;
use serde_json::json;

use crate::auth::{
    ANOTHER_PASSWORD, change_password, delete_account, login, logout, refresh, register,
};
use crate::harness::{PASSWORD, Response, Server};
use crate::purge::age;

/// Asserts that the response is a 429 from the service and returns its `Retry-After` in seconds.
pub(crate) fn wait_of(response: Response) -> u32 {
    let seconds = response
        .header("retry-after")
        .parse()
        .expect("whole seconds");
    response.problem(429, "too_many_attempts");
    seconds
}

/// Makes ten consecutive failed attempts, each of which is verified.
async fn ten_wrong(server: &Server, email: &str) {
    for _ in 0..10 {
        login(server, email, ANOTHER_PASSWORD)
            .await
            .problem(401, "invalid_credentials");
    }
}

/// Moves all failed logins into the past by `interval`.
pub(crate) async fn pass(server: &Server, interval: &str) {
    let sql = server.sql().await;
    age(&sql, "login_failures", interval, "true").await;
}

/// The lockout starts at 30 s and doubles up to an hour. During a lockout the correct password is
/// rejected as well. Addresses without an account are treated the same.
#[tokio::test]
async fn after_ten_wrong_passwords_each_further_one_doubles_the_wait() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    for (email, password) in [
        (ann.email.as_str(), ann.password.as_str()),
        ("nobody@example.com", PASSWORD),
    ] {
        ten_wrong(&server, email).await;
        for (round, wait) in [30, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
            .into_iter()
            .enumerate()
        {
            let longest = wait_of(login(&server, email, ANOTHER_PASSWORD).await);
            assert!(
                longest <= wait && longest > wait - 10,
                "{longest} of {wait} s in round {round}"
            );
            // Attempts during the lockout are not verified and do not extend it.
            for password in [password, ANOTHER_PASSWORD, ""] {
                let left = wait_of(login(&server, email, password).await);
                assert!(left <= longest);
            }
            pass(&server, &format!("{} seconds", wait + 1)).await;
            login(&server, email, ANOTHER_PASSWORD)
                .await
                .problem(401, "invalid_credentials");
        }
    }
}

#[tokio::test]
async fn a_success_sets_the_count_to_nothing() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    for _ in 0..9 {
        login(&server, &ann.email, ANOTHER_PASSWORD)
            .await
            .expect(401);
    }
    login(&server, &ann.email, &ann.password).await.expect(200);
    ten_wrong(&server, &ann.email).await;
    wait_of(login(&server, &ann.email, &ann.password).await);
    pass(&server, "31 seconds").await;
    login(&server, &ann.email, &ann.password).await.expect(200);
    ten_wrong(&server, &ann.email).await;
    let wait = wait_of(login(&server, &ann.email, ANOTHER_PASSWORD).await);
    assert!(wait <= 30, "the wait begins anew: {wait}");
}

#[tokio::test]
async fn a_day_after_the_last_wrong_password_the_count_is_nothing() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    ten_wrong(&server, &ann.email).await;
    pass(&server, "24 hours 1 second").await;
    ten_wrong(&server, &ann.email).await;
    let wait = wait_of(login(&server, &ann.email, ANOTHER_PASSWORD).await);
    assert!(wait <= 30, "the wait begins anew: {wait}");

    // Within a day of the last failure, the count continues.
    pass(&server, "23 hours").await;
    login(&server, &ann.email, ANOTHER_PASSWORD)
        .await
        .expect(401);
    let wait = wait_of(login(&server, &ann.email, ANOTHER_PASSWORD).await);
    assert!(wait > 30, "{wait}");
}

/// All spellings of an e-mail address share one count.
#[tokio::test]
async fn other_spellings_of_an_address_are_no_way_around() {
    let server = Server::start().await;
    server.register("ann@example.com").await;
    for n in 0..10 {
        let spelling = ["ann@example.com", "ANN@example.com", " Ann@Example.com\t"][n % 3];
        login(&server, spelling, ANOTHER_PASSWORD).await.expect(401);
    }
    for spelling in ["ann@example.com", "aNN@example.com", "ann@example.com  "] {
        wait_of(login(&server, spelling, PASSWORD).await);
    }
}

#[tokio::test]
async fn instances_agree_on_who_is_slowed_down() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let ann = here.register("ann@example.com").await;
    for server in [&here, &there].into_iter().cycle().take(10) {
        login(server, &ann.email, ANOTHER_PASSWORD)
            .await
            .expect(401);
    }
    for server in [&here, &there] {
        wait_of(login(server, &ann.email, &ann.password).await);
    }
    let later = here.sibling(&[]).await;
    wait_of(login(&later, &ann.email, &ann.password).await);
}

/// Sends 40 attempts at once to two instances. A 401 means that the password was verified.
#[tokio::test]
async fn of_forty_guesses_at_once_no_more_than_ten_get_a_verdict() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let ann = here.register("ann@example.com").await;
    for email in [ann.email.as_str(), "nobody@example.com"] {
        let statuses = join_all((0..40).map(|n| {
            let server = if n % 2 == 0 { &here } else { &there };
            async move {
                let response = login(server, email, ANOTHER_PASSWORD).await;
                let status = response.status;
                match status {
                    401 => drop(response.problem(401, "invalid_credentials")),
                    // Not verified either: a busy machine had no time for it.
                    503 => drop(response.problem(503, "overloaded")),
                    _ => assert!(wait_of(response) >= 1),
                }
                status
            }
        }))
        .await;
        let checked = statuses.iter().filter(|&&status| status == 401).count();
        assert!((1..=10).contains(&checked), "{checked} of 40 for {email}");
        // Whatever the 40 attempts returned, the account is locked after ten failures.
        for _ in checked..10 {
            login(&here, email, ANOTHER_PASSWORD).await.expect(401);
        }
        wait_of(login(&here, email, PASSWORD).await);
        wait_of(login(&there, email, PASSWORD).await);
    }
}

/// Failed logins on an account affect only logins to that account.
#[tokio::test]
async fn nobody_else_and_no_session_in_use_is_slowed_down() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    let bob = server.register("bob@example.com").await;
    ten_wrong(&server, &ann.email).await;
    wait_of(login(&server, &ann.email, &ann.password).await);

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

/// A stolen token does not help to guess the password and does not lock the owner out of logging
/// in. Failed logins do not prevent the owner from changing the password, either.
#[tokio::test]
async fn wrong_passwords_of_somebody_signed_in_have_a_count_of_their_own() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    ten_wrong(&server, &ann.email).await;
    for _ in 0..5 {
        change_password(&server, &ann.access_token, "wrong", ANOTHER_PASSWORD)
            .await
            .problem(403, "wrong_password");
        delete_account(&server, &ann.access_token, "wrong")
            .await
            .problem(403, "wrong_password");
    }
    for password in ["wrong", ann.password.as_str()] {
        let wait =
            wait_of(change_password(&server, &ann.access_token, password, ANOTHER_PASSWORD).await);
        assert!(wait <= 30, "{wait}");
        wait_of(delete_account(&server, &ann.access_token, password).await);
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
    wait_of(change_password(&server, &again.access_token, &ann.password, PASSWORD).await);

    pass(&server, "31 seconds").await;
    change_password(&server, &ann.access_token, "wrong", ANOTHER_PASSWORD)
        .await
        .expect(403);
    let wait = wait_of(delete_account(&server, &ann.access_token, "wrong").await);
    assert!(wait > 30, "{wait}");
    pass(&server, "61 seconds").await;
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

/// Sends 40 attempts at once to the two endpoints that ask for the password.
#[tokio::test]
async fn of_forty_guesses_at_once_by_a_stolen_token_no_more_than_ten_get_a_verdict() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let ann = here.register("ann@example.com").await;
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
    let checked = statuses.iter().filter(|&&status| status == 403).count();
    let refused = statuses
        .iter()
        .filter(|&&status| [429, 503].contains(&status))
        .count();
    assert_eq!(checked + refused, 40, "{statuses:?}");
    assert!(checked <= 10, "{checked} of 40 were checked");
}

/// Sends an invalid refresh token, the cheapest request that the rate limiter counts.
async fn login_status(server: &Server, forwarded_for: &[&str]) -> u16 {
    let mut request = server.post("/api/v1/auth/refresh");
    for value in forwarded_for {
        request = request.header("x-forwarded-for", *value);
    }
    let response = request.json(json!({"refresh_token": "x"})).await;
    let status = response.status;
    if status == 429 {
        assert!(wait_of(response) >= 1);
    } else {
        response.problem(401, "invalid_refresh_token");
    }
    status
}

/// Registration, login, refresh, password changes and account deletion share one rate limit.
#[tokio::test]
async fn from_one_address_only_so_many_attempts_a_minute() {
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
        let wait = wait_of(response);
        assert!((1..=20).contains(&wait), "{wait}");
    }
    // Requests with an access token are not affected.
    for path in ["/api/v1/auth/me", "/api/v1/auth/sessions"] {
        server.get(path).bearer(&token).await.expect(200);
    }
    logout(&server, &token).await.expect(204);
}

#[tokio::test]
async fn with_a_rate_of_nothing_there_is_no_brake() {
    let server = Server::with(&[("AUTH_RATE_PER_MINUTE", "0")]).await;
    let statuses = join_all((0..400).map(|_| login_status(&server, &[]))).await;
    assert!(statuses.iter().all(|&status| status == 401));
}

/// Any client can send the header, so it is ignored unless trusted proxies are configured.
#[tokio::test]
async fn a_forwarded_address_is_not_believed_from_a_stranger() {
    for trusted in ["", "192.0.2.1,10.0.0.0/8,::2"] {
        let server =
            Server::with(&[("AUTH_RATE_PER_MINUTE", "1"), ("TRUSTED_PROXIES", trusted)]).await;
        assert_eq!(login_status(&server, &["203.0.113.2"]).await, 401);
        assert_eq!(login_status(&server, &["203.0.113.3"]).await, 429);
        assert_eq!(
            login_status(&server, &["127.0.0.1, 203.0.113.4"]).await,
            429
        );
        let log = crate::log::settled(&server).await;
        assert!(!log.contains("203.0.113."), "{log}");
        assert!(log.contains("client=127.0.0.1"), "{log}");
    }
}

/// Behind trusted proxies, the client is the last hop that is not a trusted proxy.
#[tokio::test]
async fn behind_a_trusted_proxy_the_last_untrusted_hop_is_the_client() {
    let server = Server::with(&[
        ("AUTH_RATE_PER_MINUTE", "1"),
        (
            "TRUSTED_PROXIES",
            "127.0.0.0/8,10.0.0.0/8,2001:db8:ffff::/48",
        ),
    ])
    .await;
    let used_up = async |forwarded_for: &[&str]| {
        assert_eq!(login_status(&server, forwarded_for).await, 401);
    };

    used_up(&["203.0.113.9"]).await;
    for same in [
        &["203.0.113.9"][..],
        // Entries that the client itself added in front are not trusted.
        &["198.51.100.1, 203.0.113.9"],
        &["198.51.100.2,203.0.113.9"],
        &["unknown, 203.0.113.9"],
        &["<script>, 203.0.113.9"],
        // Trusted proxies at the end are skipped, whether in one header or in several.
        &["198.51.100.3, 203.0.113.9, 10.1.2.3"],
        &["203.0.113.9, 10.1.2.3, 2001:db8:ffff::7, 127.0.0.1"],
        &["198.51.100.4", "203.0.113.9"],
        &["203.0.113.9", "10.1.2.3"],
        // Some proxies include the port.
        &["203.0.113.9:41234"],
    ] {
        assert_eq!(login_status(&server, same).await, 429, "{same:?}");
    }
    assert_eq!(login_status(&server, &["203.0.113.10"]).await, 401);
    assert_eq!(
        login_status(&server, &["203.0.113.9, 203.0.113.11"]).await,
        401
    );

    // An IPv6 /64 counts as one client, as does an IPv4 address however it is written.
    used_up(&["2001:db8:1:2::1"]).await;
    assert_eq!(login_status(&server, &["2001:db8:1:2:ffff::9"]).await, 429);
    assert_eq!(login_status(&server, &["2001:DB8:1:2:0:0:0:3"]).await, 429);
    assert_eq!(login_status(&server, &["[2001:db8:1:2::7]:443"]).await, 429);
    assert_eq!(login_status(&server, &["2001:db8:1:3::1"]).await, 401);
    used_up(&["::ffff:203.0.113.50"]).await;
    assert_eq!(login_status(&server, &["203.0.113.50"]).await, 429);
    assert_eq!(login_status(&server, &["::ffff:203.0.113.51"]).await, 401);

    // If the entry is not an address, the proxy itself is the client, and no other client's quota
    // is used.
    used_up(&["nonsense"]).await;
    for nonsense in [
        "",
        "203.0.113.256",
        "203.0.113.10;x",
        ", ,",
        "\"203.0.113.10\"",
    ] {
        assert_eq!(
            login_status(&server, &[nonsense]).await,
            429,
            "{nonsense:?}"
        );
    }
    assert_eq!(login_status(&server, &["203.0.113.12"]).await, 401);
}
