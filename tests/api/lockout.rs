//! Failed logins are counted by account and client network: an attacker cannot lock out the
//! networks that the owner uses, and the counts do not reveal whether an account exists.

use serde_json::json;

use crate::auth::{ANOTHER_PASSWORD, delete_account, login};
use crate::harness::{PASSWORD, Response, Server, User, until};
use crate::purge::age;
use crate::throttling::{age_failures, expect_429};

/// Starts a service that trusts the `X-Forwarded-For` header sent by these tests.
async fn server() -> Server {
    Server::with(&[("TRUSTED_PROXIES", "127.0.0.1")]).await
}

/// Returns the n-th address of a botnet, in which each address has its own network.
fn unknown_client(n: usize) -> String {
    if n.is_multiple_of(2) {
        format!("198.51.100.{}", n / 2)
    } else {
        format!("2001:db8:0:{n:x}::{n:x}")
    }
}

async fn login_from(server: &Server, client: &str, email: &str, password: &str) -> Response {
    server
        .post("/api/v1/auth/login")
        .header("x-forwarded-for", client)
        .json(json!({"email": email, "password": password}))
        .await
}

async fn refresh_from(server: &Server, client: &str, token: &str) -> Response {
    server
        .post("/api/v1/auth/refresh")
        .header("x-forwarded-for", client)
        .json(json!({"refresh_token": token}))
        .await
}

/// Makes consecutive login attempts with a wrong password, each of which is verified.
async fn fail_logins(server: &Server, client: &str, email: &str, times: usize) {
    for _ in 0..times {
        login_from(server, client, email, ANOTHER_PASSWORD)
            .await
            .problem(401, "invalid_credentials");
    }
}

/// Counts further failed logins for the network that the last one came from, because verifying a password
/// is slow.
async fn add_failures(server: &Server, email: &str, failures: i32) {
    let add = "update login_failures set failures = failures + $2
               where account = $1 and network <> '*'
                 and last_failure_at = (select max(last_failure_at) from login_failures
                                        where account = $1 and network <> '*')";
    let changed = server.sql().await.execute(add, &[&email, &failures]).await;
    assert_eq!(changed.expect("an update"), 1, "{email} has no failures");
}

/// Records `failures` failed logins from networks that the account has not used.
async fn add_unknown_failures(server: &Server, email: &str, failures: i32) {
    let changed = server
        .sql()
        .await
        .execute(
            "update login_failures set failures = failures + $2 where account = $1 and network = '*'",
            &[&email, &failures],
        )
        .await
        .expect("an update");
    assert_eq!(changed, 1, "{email} has no failures from unknown networks");
}

/// Creates Ann, who has used only her home network.
async fn create_ann(server: &Server) -> User {
    server.user().await
}

/// The address from which the test itself connects.
const HOME: &str = "127.0.0.1";

#[tokio::test]
async fn failures_from_one_network_do_not_lock_out_others() {
    let server = server().await;
    let ann = create_ann(&server).await;
    for email in [ann.email.as_str(), "nobody@example.com"] {
        fail_logins(&server, "203.0.113.1", email, 1).await;
        add_failures(&server, email, 8).await;
        fail_logins(&server, "203.0.113.1", email, 1).await;
        expect_429(login_from(&server, "203.0.113.1", email, &ann.password).await);
        fail_logins(&server, "203.0.113.2", email, 1).await;
        // All addresses of a /64 count as one client, separate from every other.
        fail_logins(&server, "2001:db8:1:2::1", email, 1).await;
        add_failures(&server, email, 8).await;
        fail_logins(&server, "2001:db8:1:2:3:4:5:6", email, 1).await;
        expect_429(login_from(&server, "2001:db8:1:2::7", email, &ann.password).await);
        fail_logins(&server, "2001:db8:1:3::1", email, 1).await;
    }
    // On a busy machine, the lockouts might end during the next requests.
    server
        .sql()
        .await
        .batch_execute(
            "update login_failures set blocked_until = blocked_until + interval '1 hour'",
        )
        .await
        .expect("longer lockouts");
    login_from(&server, "203.0.113.2", &ann.email, &ann.password)
        .await
        .expect(200);
    login_from(&server, HOME, &ann.email, &ann.password)
        .await
        .expect(200);
    // The successful login from home does not lift the lockout of the attacker's network.
    expect_429(login_from(&server, "203.0.113.1", &ann.email, &ann.password).await);
}

#[tokio::test]
async fn a_hundred_failures_lock_out_only_unknown_networks() {
    let server = server().await;
    let ann = create_ann(&server).await;
    let refreshed_at = unknown_client(900);
    let logged_in_at = unknown_client(901);
    refresh_from(&server, &refreshed_at, &ann.refresh_token)
        .await
        .expect(200);
    login_from(&server, &logged_in_at, &ann.email, &ann.password)
        .await
        .expect(200);
    for email in [ann.email.as_str(), "nobody@example.com"] {
        for n in 0..3 {
            fail_logins(&server, &unknown_client(n), email, 1).await;
        }
        add_unknown_failures(&server, email, 95).await;
        fail_logins(&server, &unknown_client(3), email, 1).await;
        // The owner's successful logins do not reset the count of the unused networks.
        if email == ann.email {
            for network in [HOME, &refreshed_at, &logged_in_at] {
                fail_logins(&server, network, email, 1).await;
                login_from(&server, network, email, &ann.password)
                    .await
                    .expect(200);
            }
        }
        fail_logins(&server, &unknown_client(4), email, 1).await;
        for client in [
            unknown_client(4),
            unknown_client(5),
            "203.0.113.77".to_owned(),
        ] {
            for password in [ann.password.as_str(), ANOTHER_PASSWORD] {
                let wait = expect_429(login_from(&server, &client, email, password).await);
                assert!((86_000..=86_400).contains(&wait), "{wait} for {email}");
            }
        }
    }
    for network in [HOME, &refreshed_at, &logged_in_at] {
        login_from(&server, network, &ann.email, &ann.password)
            .await
            .expect(200);
        expect_429(login_from(&server, &unknown_client(5), &ann.email, &ann.password).await);
    }
    server
        .get("/api/v1/auth/me")
        .header("x-forwarded-for", unknown_client(5))
        .bearer(&ann.access_token)
        .await
        .expect(200);

    age_failures(&server, "24 hours 1 second").await;
    for email in [ann.email.as_str(), "nobody@example.com"] {
        fail_logins(&server, &unknown_client(5), email, 2).await;
    }
    login_from(&server, &unknown_client(6), &ann.email, &ann.password)
        .await
        .expect(200);
}

#[tokio::test]
async fn a_network_unused_for_30_days_becomes_unknown() {
    let server = server().await;
    let ann = create_ann(&server).await;
    let sql = server.sql().await;
    fail_logins(&server, &unknown_client(0), &ann.email, 1).await;
    add_unknown_failures(&server, &ann.email, 98).await;
    age(&sql, "login_networks", "29 days 22 hours", "true").await;
    fail_logins(&server, HOME, &ann.email, 1).await;
    login_from(&server, HOME, &ann.email, &ann.password)
        .await
        .expect(200);

    // The network was last used by that login.
    age(&sql, "login_networks", "29 days 22 hours", "true").await;
    fail_logins(&server, HOME, &ann.email, 1).await;
    age(&sql, "login_networks", "3 hours", "true").await;
    fail_logins(&server, HOME, &ann.email, 1).await;
    expect_429(login_from(&server, HOME, &ann.email, &ann.password).await);

    // A refresh also counts as a use.
    refresh_from(&server, HOME, &ann.refresh_token)
        .await
        .expect(200);
    login_from(&server, HOME, &ann.email, &ann.password)
        .await
        .expect(200);
}

/// An attacker who rotates through a large prefix cannot fill the table.
#[tokio::test]
async fn keeps_the_hundred_most_recently_used_networks_of_an_account() {
    let server = server().await;
    let ann = create_ann(&server).await;
    let sql = server.sql().await;
    sql.batch_execute(
        "insert into login_networks (user_id, network, last_used_at)
         select id, '192.0.2.' || n, now() - n * interval '1 day'
         from users, generate_series(1, 20) n;
         insert into login_networks (user_id, network, last_used_at)
         select id, '192.0.3.' || n, now() - n * interval '1 minute'
         from users, generate_series(1, 79) n",
    )
    .await
    .expect("a hundred networks");
    let networks = async || -> (i64, bool, bool) {
        let row = sql
            .query_one(
                "select count(*), bool_or(network = '192.0.2.20'), bool_or(network = '192.0.2.19')
                 from login_networks",
                &[],
            )
            .await
            .expect("networks");
        (row.get(0), row.get(1), row.get(2))
    };
    assert_eq!(networks().await, (100, true, true));
    // The oldest network can be used again without evicting another.
    login_from(&server, "192.0.2.20", &ann.email, &ann.password)
        .await
        .expect(200);
    assert_eq!(networks().await, (100, true, true));
    refresh_from(&server, "203.0.113.200", &ann.refresh_token)
        .await
        .expect(200);
    assert_eq!(networks().await, (100, true, false));
    login_from(&server, "203.0.113.201", &ann.email, &ann.password)
        .await
        .expect(200);
    assert_eq!(networks().await.0, 100);
}

/// Every attempt gets the same response, regardless of the owner's logins. A deleted account is
/// indistinguishable from one that never existed.
#[tokio::test]
async fn lockouts_do_not_reveal_whether_an_account_exists() {
    let server = server().await;
    let ann = create_ann(&server).await;
    let emails = [ann.email.as_str(), "nobody@example.com"];
    let attempt = async |client: &str| -> u16 {
        let mut statuses = [0; 2];
        for (status, email) in statuses.iter_mut().zip(emails) {
            *status = login_from(&server, client, email, ANOTHER_PASSWORD)
                .await
                .status;
        }
        assert_eq!(statuses[0], statuses[1], "from {client}");
        statuses[0]
    };
    for n in 0..12 {
        if n == 6 {
            login_from(&server, HOME, &ann.email, &ann.password)
                .await
                .expect(200);
        }
        let expected = if n < 10 { 401 } else { 429 };
        assert_eq!(attempt("203.0.113.1").await, expected, "attempt {n}");
    }
    for email in emails {
        add_unknown_failures(&server, email, 85).await;
    }
    for n in 0..7 {
        if n == 3 {
            // This network was not used before.
            login_from(&server, "203.0.113.99", &ann.email, &ann.password)
                .await
                .expect(200);
        }
        let expected = if n < 5 { 401 } else { 429 };
        assert_eq!(attempt(&unknown_client(n)).await, expected, "attempt {n}");
    }
    delete_account(&server, &ann.access_token, &ann.password)
        .await
        .expect(204);
    assert_eq!(attempt("203.0.113.1").await, 429);
    assert_eq!(attempt(&unknown_client(7)).await, 429);
}

/// A correct password is rejected if the lockout begins while it is being verified.
#[tokio::test]
async fn rejects_a_correct_password_if_the_lockout_begins_while_it_is_verified() {
    let first = server().await;
    let ann = create_ann(&first).await;
    let sql = first.sql().await;
    sql.execute(
        "insert into login_failures (account, network, failures, last_failure_at)
         values ($1, '203.0.113.1', 9, now())",
        &[&ann.email],
    )
    .await
    .expect("nine failures");
    // The login is slow because the password is rehashed at a higher cost before the session is
    // created.
    let slow = [("TRUSTED_PROXIES", "127.0.0.1"), ("BCRYPT_COST", "13")];
    let slow = first.sibling(&slow).await;
    let login_attempt = login_from(&slow, "203.0.113.1", &ann.email, &ann.password);
    let lockout = async {
        until("the login has checked for a lockout", async || {
            let checked = "select from pg_stat_activity where datname = current_database()
                          and state = 'idle' and query like '%users u on u.email = request.email%'";
            !sql.query(checked, &[]).await.expect("activity").is_empty()
        })
        .await;
        sql.execute(
            "update login_failures set blocked_until = now() + interval '1 minute'",
            &[],
        )
        .await
        .expect("a lockout");
    };
    let (response, ()) = tokio::join!(login_attempt, lockout);
    expect_429(response);
    login(&first, &ann.email, PASSWORD).await.expect(200);
}
