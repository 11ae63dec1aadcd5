//! Forgotten passwords, verified addresses and changes of address, by mail.

use std::pin::Pin;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use jsonwebtoken::{Algorithm, EncodingKey, crypto};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use crate::auth::{ANOTHER_PASSWORD, change_password, delete_account, login, refresh, register};
use crate::harness::{
    MailServer, PASSWORD, PUBLIC_URL, Process, Response, SECRET, Server, User, base64url, claims,
    forge, unique,
};
use crate::purge::age;
use crate::races::{BOTH, lock_row, race};
use crate::sessions::assert_revoked;

const FORGOT: &str = "/api/v1/auth/password/forgot";
const RESET: &str = "/api/v1/auth/password/reset";
const CHANGE: &str = "/api/v1/auth/email";
const VERIFY: &str = "/api/v1/auth/email/verify";
const RESEND: &str = "/api/v1/auth/email/resend";

async fn post(server: &Server, path: &str, body: Value) -> Response {
    server.post(path).json(body).await
}

/// Requests a mail, and asserts the response, which is the same for all addresses.
async fn request_mail(server: &Server, path: &str, email: &str) {
    let response = post(server, path, json!({"email": email}))
        .await
        .expect(202);
    assert!(response.body.is_empty());
}

async fn reset(server: &Server, token: &str, password: &str) -> Response {
    post(
        server,
        RESET,
        json!({"token": token, "new_password": password}),
    )
    .await
}

async fn verify(server: &Server, token: &str) -> Response {
    post(server, VERIFY, json!({"token": token})).await
}

async fn change_email(user: &User, email: &str, password: &str) -> Response {
    let body = json!({"email": email, "password": password});
    user.put(CHANGE).json(body).await
}

fn new_address() -> String {
    format!("mail{}@example.com", unique())
}

/// Requests a reset for the `count`th time, and returns the token.
async fn reset_token((server, mails): &(Server, MailServer), user: &User, count: usize) -> String {
    request_mail(server, FORGOT, &user.email).await;
    let mail = mails
        .nth_about(&user.email, "reset your password", count)
        .await;
    mail.token()
}

/// Returns whether the user's address is verified.
async fn is_verified(user: &User) -> bool {
    user.get("/api/v1/auth/me").await.expect(200).json()["email_verified"] == true
}

#[tokio::test]
async fn a_forgotten_password_is_reset_by_mail() {
    let shared = Server::shared_with_mail().await;
    let (server, mails) = shared;
    let ann = server.user().await;
    let other = server.login(&ann.email, PASSWORD).await;
    let lockouts = format!(
        "insert into login_failures
         select account, network, 17, now(), now() + interval '1 hour'
         from (values ('{}', '127.0.0.1'), ('{}', '*'), ('{}', 'session')) f (account, network)",
        ann.email, ann.email, ann.id
    );
    server.sql().await.batch_execute(&lockouts).await.unwrap();
    // Neither header has an effect on the link.
    let forgot = server
        .post(FORGOT)
        .json(json!({"email": format!(" {} ", ann.email)}));
    let forgot = forgot.header("x-forwarded-host", "evil.example");
    forgot
        .header("forwarded", "host=evil.example")
        .await
        .expect(202);
    let mail = mails.nth_about(&ann.email, "reset", 1).await;
    assert_eq!(mail.header("From"), "Todo <todo@todo.example>");
    assert_eq!(mail.header("Subject"), "Todo: reset your password");
    assert_eq!(mail.header("Auto-Submitted"), "auto-generated");
    assert!(mail.header("Message-ID").ends_with("@todo.example>"));
    assert!(mail.header("Date").ends_with(" +0000"));
    assert!(
        mail.link()
            .starts_with(&format!("{PUBLIC_URL}/account/reset#token="))
    );
    assert!(!mail.text.contains("evil"));
    // Neither a scanner that opens the link nor a password that is refused uses up the token.
    server.get("/account/reset").await.expect(200);
    let token = mail.token();
    for weak in ["short", "password1", &ann.email] {
        reset(server, &token, weak)
            .await
            .problem(422, "validation_failed");
    }
    reset(server, &token, ANOTHER_PASSWORD).await.expect(204);
    let since = Instant::now();
    for user in [&ann, &other] {
        assert_revoked(server, &user.access_token, since).await;
        let again = refresh(server, &user.refresh_token).await;
        again.problem(401, "invalid_refresh_token");
    }
    login(server, &ann.email, PASSWORD)
        .await
        .problem(401, "invalid_credentials");
    let ann = server.login(&ann.email, ANOTHER_PASSWORD).await;
    assert!(is_verified(&ann).await);
    let again = reset(server, &token, PASSWORD).await;
    again.problem(401, "invalid_mail_token");
}

/// Derives the key of a kind of token as the service does.
fn derived_key(purpose: &str) -> String {
    let secret = EncodingKey::from_secret(SECRET.as_bytes());
    crypto::sign(purpose.as_bytes(), &secret, Algorithm::HS256).unwrap()
}

#[tokio::test]
async fn a_token_is_valid_only_unmodified_in_time_and_for_its_own_purpose() {
    let shared = Server::shared_with_mail().await;
    let (server, mails) = shared;
    let (ann, ben) = (server.user().await, server.user().await);
    let verification = mails.nth(&ann.email, 1).await.token();
    let token = reset_token(shared, &ann, 1).await;
    let bens = reset_token(shared, &ben, 1).await;
    let (message, signature) = token.rsplit_once('.').unwrap();
    let (header, payload) = message.split_once('.').unwrap();
    let with_claim = |name: &str, value: Value| {
        let mut claims = claims(&token);
        claims[name] = value;
        claims
    };
    let payload_of = |claims: &Value| base64url(claims.to_string().as_bytes());
    let typ = json!({"typ": "reset+jwt", "alg": "HS256"});
    let key = derived_key("todo-api password reset v1");
    let foreign = with_claim("sub", ben.id.clone().into());
    let expired = with_claim("exp", json!(claims(&token)["exp"].as_u64().unwrap() - 1801));
    let valid = forge(&key, typ.clone(), claims(&token));
    for forged in [
        verification.clone(),
        ann.access_token.clone(),
        ann.refresh_token.clone(),
        String::new(),
        message.to_owned(),
        format!("{message}.{}", bens.rsplit('.').next().unwrap()),
        format!("{header}.{}.{signature}", payload_of(&foreign)),
        format!("{}.{payload}.{signature}", base64url(br#"{"alg":"none"}"#)),
        forge(SECRET, typ.clone(), claims(&token)),
        forge(&key, json!({"typ": "JWT", "alg": "HS256"}), claims(&token)),
        // Correctly signed.
        forge(&key, typ.clone(), foreign),
        forge(&key, typ.clone(), expired),
        forge(
            &key,
            typ.clone(),
            with_claim("state", claims(&bens)["state"].clone()),
        ),
    ] {
        reset(server, &forged, ANOTHER_PASSWORD)
            .await
            .problem(401, "invalid_mail_token");
    }
    for forged in [&token, &ann.access_token] {
        verify(server, forged)
            .await
            .problem(401, "invalid_mail_token");
    }
    // Another secret does not accept the tokens. The previous secret does, until it is removed.
    let new = "another secret of the tests, and 32 bytes or more";
    let replaced = server.sibling(&[("JWT_SECRET", new)]).await;
    reset(&replaced, &token, ANOTHER_PASSWORD)
        .await
        .problem(401, "invalid_mail_token");
    let variables = [("JWT_SECRET", new), ("JWT_SECRET_PREVIOUS", SECRET)];
    let rotated = server.sibling(&variables).await;
    verify(&rotated, &verification).await.expect(204);
    reset(&rotated, &valid, ANOTHER_PASSWORD).await.expect(204);
    reset(server, &bens, ANOTHER_PASSWORD).await.expect(204);
}

#[tokio::test]
async fn a_token_dies_with_the_password_and_the_account() {
    let shared = Server::shared_with_mail().await;
    let (server, mails) = shared;
    let ann = server.user().await;
    let verification = mails.nth(&ann.email, 1).await.token();
    let first = reset_token(shared, &ann, 1).await;
    let second = reset_token(shared, &ann, 2).await;
    let changed = change_password(server, &ann.access_token, PASSWORD, ANOTHER_PASSWORD).await;
    let tokens = changed.expect(200).json();
    for token in [&first, &second] {
        reset(server, token, PASSWORD)
            .await
            .problem(401, "invalid_mail_token");
    }
    verify(server, &verification)
        .await
        .problem(401, "invalid_mail_token");

    let ben = server.user().await;
    let token = reset_token(shared, &ben, 1).await;
    delete_account(server, &ben.access_token, PASSWORD)
        .await
        .expect(204);
    reset(server, &token, ANOTHER_PASSWORD)
        .await
        .problem(401, "invalid_mail_token");
    let access_token = tokens["access_token"].as_str().unwrap();
    delete_account(server, access_token, ANOTHER_PASSWORD)
        .await
        .expect(204);
}

#[tokio::test]
async fn of_concurrent_resets_with_one_token_exactly_one_succeeds() {
    let shared = Server::shared_with_mail().await;
    let (server, _) = shared;
    let there = server.sibling(&[]).await;
    let ann = server.user().await;
    let token = reset_token(shared, &ann, 1).await;
    let passwords: Vec<String> = (0..4)
        .map(|n| format!("violet tugboat {n} sings"))
        .collect();
    let servers = [server, &there].into_iter().cycle();
    let resets = servers
        .zip(&passwords)
        .map(|(server, new)| reset(server, &token, new));
    let responses = join_all(resets).await;
    let is_done = |response: &Response| response.status == 204;
    let done = responses.iter().filter(|response| is_done(response));
    assert_eq!(done.count(), 1, "{responses:?}");
    for (response, password) in responses.iter().zip(&passwords) {
        let expected = if is_done(response) { 200 } else { 401 };
        assert_eq!(login(server, &ann.email, password).await.status, expected);
        if !is_done(response) {
            response.problem(401, "invalid_mail_token");
        }
    }
}

#[tokio::test]
async fn a_login_that_races_a_reset_leaves_no_session() {
    // With a server of its own, neither request waits for those of other tests.
    let shared = &Server::with_mail(&[]).await;
    let (server, _) = shared;
    let there = server.sibling(&[]).await;
    for order in BOTH {
        let ann = server.user().await;
        let token = reset_token(shared, &ann, 1).await;
        let lock = lock_row(server, "users", &ann.id).await;
        let logged_in = login(&there, &ann.email, PASSWORD);
        let done = reset(server, &token, ANOTHER_PASSWORD);
        let (logged_in, done) = race(order, lock, logged_in, done).await;
        done.expect(204);
        if logged_in.status == 200 {
            let token = logged_in.json()["refresh_token"]
                .as_str()
                .unwrap()
                .to_owned();
            refresh(server, &token)
                .await
                .problem(401, "invalid_refresh_token");
        } else {
            logged_in.problem(401, "invalid_credentials");
        }
    }
}

#[tokio::test]
async fn a_link_to_the_old_address_dies_even_while_it_is_used() {
    let shared = &Server::with_mail(&[]).await;
    let (server, _) = shared;
    let ann = server.user().await;
    let token = reset_token(shared, &ann, 1).await;
    let new = new_address();
    let change = format!("update users set email = '{new}' where id = '{}'", ann.id);
    let lock = server.lock(&change).await;
    let reset = reset(server, &token, ANOTHER_PASSWORD);
    let (response, ()) = tokio::join!(reset, lock.release_after(1));
    response.problem(401, "invalid_mail_token");
    server.login(&new, PASSWORD).await;
}

/// A 503 would say that nothing was changed, but a repetition would fail because the token or the current
/// password is no longer valid.
#[tokio::test]
async fn a_lost_connection_leaves_the_outcome_of_a_new_password_open() {
    let shared = &Server::with_mail(&[]).await;
    let (server, _) = shared;
    let ann = server.user().await;
    let token = reset_token(shared, &ann, 1).await;
    let reset = reset(server, &token, ANOTHER_PASSWORD);
    let change = change_password(server, &ann.access_token, PASSWORD, ANOTHER_PASSWORD);
    let requests: [Pin<Box<dyn Future<Output = Response>>>; 2] =
        [Box::pin(reset), Box::pin(change)];
    for request in requests {
        let lock = lock_row(server, "users", &ann.id).await;
        let (response, ()) = tokio::join!(request, async {
            lock.wait_for_blocked(1).await;
            lock.terminate_blocked().await;
        });
        response.problem(500, "internal");
    }
}

#[tokio::test]
async fn a_registration_succeeds_without_its_mail_and_says_so_in_the_log() {
    let (server, _) = Server::with_mail(&[]).await;
    let sql = server.sql().await;
    let broken = "create function fail() returns trigger language plpgsql as
                  $$ begin raise exception 'broken'; end $$;
                  create trigger fail before insert on mail_requests execute function fail()";
    sql.batch_execute(broken).await.unwrap();
    register(&server, &new_address(), PASSWORD)
        .await
        .expect(201);
    server
        .wait_for_log("mail not sent reason=database attempts=0")
        .await;
}

/// Otherwise each spelling of a mailbox's domain would have a quota of its own.
#[tokio::test]
async fn other_spellings_of_a_domain_get_no_mail() {
    let (server, mails) = Server::with_mail(&[]).await;
    let local = format!("ann{}", unique());
    for domain in [
        "ex%61mple.com",
        "ｅxample.com",
        "example。com",
        "example.com.",
    ] {
        let email = format!("{local}@{domain}");
        register(&server, &email, PASSWORD).await.expect(201);
    }
    for domain in ["bücher.example", "xn--bcher-kva.example", "example.com"] {
        let email = format!("{local}@{domain}");
        register(&server, &email, PASSWORD).await.expect(201);
    }
    mails
        .nth(&format!("{local}@xn--bcher-kva.example"), 2)
        .await;
    mails.nth(&format!("{local}@example.com"), 1).await;
    assert!(server.stop().await.success());
    assert_eq!(mails.counts().0, 3);
    let refused = "mail not sent reason=unsupported attempts=0";
    assert_eq!(server.log().matches(refused).count(), 4);
}

/// Returns the rows of the quota, without the addresses and the times.
async fn quota_rows(server: &Server, email: &str) -> Vec<(bool, bool)> {
    let sql = "select second_at is null as second, third_at is null as third
               from mail_requests where email = $1";
    let rows = server.sql().await.query(sql, &[&email]).await.unwrap();
    let row = |row: &tokio_postgres::Row| (row.get("second"), row.get("third"));
    rows.iter().map(row).collect()
}

#[tokio::test]
async fn an_address_gets_three_mails_an_hour_whether_known_or_not() {
    let (server, mails) = Server::with_mail(&[("EMAIL_VERIFICATION", "off")]).await;
    let (known, unknown) = (server.user().await.email, "nobody@example.com");
    // The other kind counts, too.
    for (path, mails_sent) in [
        (FORGOT, 1),
        (RESEND, 2),
        (FORGOT, 3),
        (FORGOT, 3),
        (RESEND, 3),
    ] {
        let contents = async |email: &str| {
            let request = server.post(path).header("x-request-id", "the-same");
            let response = request.json(json!({"email": email})).await.expect(202);
            let mut headers = response.headers.clone();
            headers.remove("date");
            (headers, response.body)
        };
        assert_eq!(contents(&known).await, contents(unknown).await);
        assert_eq!(
            quota_rows(&server, &known).await,
            quota_rows(&server, unknown).await
        );
        mails.nth(&known, mails_sent).await;
    }
    let sql = server.sql().await;
    age(&sql, "mail_requests", "59 minutes", "true").await;
    request_mail(&server, FORGOT, &known).await;
    age(&sql, "mail_requests", "2 minutes", "true").await;
    request_mail(&server, FORGOT, &known).await;
    mails.nth(&known, 4).await;
    // No address, and attempts to add header fields or recipients.
    for text in [
        "nobody",
        "",
        "a@b@c",
        "\0@b",
        "bcc@example.com\r\nBcc: eve@example.com",
        "a@b\r\nDATA",
        "<eve@example.com>,a@b",
        "a b@c",
        &"x".repeat(9000),
    ] {
        request_mail(&server, FORGOT, text).await;
    }
    for path in [FORGOT, RESEND] {
        for body in [json!({}), json!({"email": 1}), json!([])] {
            post(&server, path, body)
                .await
                .problem(422, "validation_failed");
        }
    }
    assert!(server.stop().await.success());
    assert_eq!(mails.counts().0, 4, "no other mail was sent");
    let log = server.log();
    let lines = log.lines().filter(|line| !line.contains("DEBUG"));
    assert!(
        !lines.clone().any(|line| line.contains('@')),
        "an address in {log}"
    );
}

/// If a mail were sent before the response, known addresses would take two seconds longer. On a busy
/// machine, it takes more rounds until the shortest times are comparable. `MAIL_SAMPLES` sets the minimum
/// number of rounds; the medians are printed.
#[tokio::test]
async fn known_and_unknown_addresses_take_the_same_time() {
    const MAX_ROUNDS: usize = 60;
    let (server, mails) = Server::with_mail(&[]).await;
    mails.delay(Duration::from_secs(2));
    let required = server.sibling(&[("EMAIL_VERIFICATION", "required")]).await;
    let samples = std::env::var("MAIL_SAMPLES").ok();
    let samples: Option<usize> = samples.map(|samples| samples.parse().unwrap());
    let known = server.user().await.email;
    let sql = server.sql().await;
    // The last two hash a password, which takes most of their time and varies more.
    for (name, rounds, max_ratio) in [
        ("forgot", 20, 1.25),
        ("resend", 20, 1.25),
        ("register", 4, 2.0),
        ("change", 4, 2.0),
    ] {
        let min_rounds = samples.unwrap_or(rounds);
        let mut times = [vec![], vec![]];
        let mut shortest = [f64::MAX; 2];
        for round in 0..MAX_ROUNDS.max(min_rounds) {
            // The number of requests for changes of one user is limited.
            let asking = match name {
                "change" => Some(server.users(1).await.remove(0)),
                _ => None,
            };
            let unknown = new_address();
            for kind in [round % 2, 1 - round % 2] {
                sql.batch_execute("delete from mail_requests")
                    .await
                    .unwrap();
                let email = [&known, &unknown][kind];
                let body = json!({"email": email, "password": PASSWORD});
                let request = match (name, &asking) {
                    ("forgot", _) => server.post(FORGOT),
                    ("resend", _) => server.post(RESEND),
                    ("register", _) => required.post("/api/v1/auth/register"),
                    (_, user) => user.as_ref().unwrap().put(CHANGE),
                };
                let started = Instant::now();
                request.json(body).await.expect(202);
                let time = started.elapsed().as_secs_f64() * 1e3;
                times[kind].push(time);
                shortest[kind] = time.min(shortest[kind]);
            }
            let ratio = shortest[0] / shortest[1];
            if round + 1 >= min_rounds && (1.0 / max_ratio..max_ratio).contains(&ratio) {
                break;
            }
        }
        let [known, unknown] = times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        });
        println!("{name}: {known:.3} and {unknown:.3} ms, shortest {shortest:.3?}");
        let ratio = shortest[0] / shortest[1];
        assert!(
            (1.0 / max_ratio..max_ratio).contains(&ratio),
            "{name}: {shortest:?}"
        );
    }
}

#[tokio::test]
async fn a_registration_sends_a_link_that_verifies_the_address() {
    let (server, mails) = Server::shared_with_mail().await;
    let ann = server.user().await;
    assert!(!is_verified(&ann).await);
    let mail = mails.nth(&ann.email, 1).await;
    assert_eq!(mail.header("Subject"), "Todo: confirm your e-mail address");
    assert!(
        mail.link()
            .starts_with(&format!("{PUBLIC_URL}/account/verify#token="))
    );
    request_mail(server, RESEND, &ann.email).await;
    let again = mails.nth(&ann.email, 2).await.token();
    for token in [&mail.token(), &mail.token(), &again] {
        verify(server, token).await.expect(204);
    }
    assert!(is_verified(&ann).await);
    let user = &server.login(&ann.email, PASSWORD).await;
    assert!(is_verified(user).await);
    let tokens = refresh(server, &user.refresh_token)
        .await
        .expect(200)
        .json();
    assert_eq!(tokens["user"]["email_verified"], true);
    // There is nothing left to verify.
    request_mail(server, RESEND, &ann.email).await;
    request_mail(server, FORGOT, &ann.email).await;
    // Mails are sent in order.
    let ben = server.user().await;
    mails.nth(&ben.email, 1).await;
    assert_eq!(mails.received(&ann.email).len(), 2);
}

/// A server that requires verified addresses.
async fn requiring() -> &'static (Server, MailServer) {
    static SHARED: OnceCell<(Server, MailServer)> = OnceCell::const_new();
    let variables = [("EMAIL_VERIFICATION", "required"), ("MAIL_NAME", "To-dos")];
    SHARED.get_or_init(|| Server::with_mail(&variables)).await
}

/// Registers, and verifies the address.
async fn register_verified((server, mails): &(Server, MailServer)) -> User {
    let email = new_address();
    register(server, &email, PASSWORD).await.expect(202);
    let token = mails.nth(&email, 1).await.token();
    verify(server, &token).await.expect(204);
    server.login(&email, PASSWORD).await
}

#[tokio::test]
async fn where_required_an_account_exists_once_its_address_is_verified() {
    let (server, mails) = requiring().await;
    let email = new_address();
    let response = register(server, &email, PASSWORD).await.expect(202);
    assert!(response.body.is_empty());
    login(server, &email, PASSWORD)
        .await
        .problem(403, "email_unverified");
    login(server, &email, ANOTHER_PASSWORD)
        .await
        .problem(401, "invalid_credentials");
    let first = mails.nth(&email, 1).await.token();
    // A second registration replaces the password of the first.
    register(server, &email, ANOTHER_PASSWORD).await.expect(202);
    verify(server, &first)
        .await
        .problem(401, "invalid_mail_token");
    login(server, &email, PASSWORD)
        .await
        .problem(401, "invalid_credentials");
    login(server, &email, ANOTHER_PASSWORD)
        .await
        .problem(403, "email_unverified");
    let second = mails.nth(&email, 2).await.token();
    for _ in 0..2 {
        verify(server, &second).await.expect(204);
    }
    assert!(is_verified(&server.login(&email, ANOTHER_PASSWORD).await).await);
}

#[tokio::test]
async fn concurrent_confirmations_of_a_registration_both_succeed() {
    // With a server of its own, no other statement is blocked.
    let (server, mails) = Server::with_mail(&[("EMAIL_VERIFICATION", "required")]).await;
    let there = server.sibling(&[]).await;
    let email = new_address();
    register(&server, &email, PASSWORD).await.expect(202);
    let token = mails.nth(&email, 1).await.token();
    let lock = server
        .lock("select from pending_registrations for update")
        .await;
    let (here, there, ()) = tokio::join!(
        verify(&server, &token),
        verify(&there, &token),
        lock.release_after(2)
    );
    here.expect(204);
    there.expect(204);
    server.login(&email, PASSWORD).await;
}

#[tokio::test]
async fn where_required_a_reset_completes_a_registration() {
    let shared = requiring().await;
    let (server, mails) = shared;
    let email = new_address();
    register(server, &email, PASSWORD).await.expect(202);
    let verification = mails.nth(&email, 1).await.token();
    request_mail(server, RESEND, &email).await;
    mails.nth(&email, 2).await;
    request_mail(server, FORGOT, &email).await;
    let token = mails.nth(&email, 3).await.token();
    reset(server, &token, ANOTHER_PASSWORD).await.expect(204);
    assert!(is_verified(&server.login(&email, ANOTHER_PASSWORD).await).await);
    verify(server, &verification).await.expect(204);
    reset(server, &token, PASSWORD)
        .await
        .problem(401, "invalid_mail_token");
}

#[tokio::test]
async fn where_required_registering_reveals_no_account() {
    let shared = requiring().await;
    let (server, mails) = shared;
    let ann = register_verified(shared).await;
    let unknown = new_address();
    // A later login with the same password would otherwise tell which registration had an effect.
    for email in [&ann.email, &unknown] {
        let response = register(server, email, ANOTHER_PASSWORD).await.expect(202);
        assert!(response.body.is_empty());
        login(server, email, ANOTHER_PASSWORD)
            .await
            .problem(403, "email_unverified");
        login(server, email, "a wrong password")
            .await
            .problem(401, "invalid_credentials");
    }
    let mail = mails.nth(&ann.email, 2).await;
    assert_eq!(
        mail.header("Subject"),
        "To-dos: you already have an account"
    );
    assert!(!mail.text.contains("#token="));
    server.login(&ann.email, PASSWORD).await;
    // An account from before verification was required.
    let server = server.sibling(&[("EMAIL_VERIFICATION", "off")]).await;
    let earlier = server.user().await;
    let (server, _) = shared;
    login(server, &earlier.email, PASSWORD)
        .await
        .problem(403, "email_unverified");
    login(server, &earlier.email, ANOTHER_PASSWORD)
        .await
        .problem(401, "invalid_credentials");
    request_mail(server, RESEND, &earlier.email).await;
    let token = mails.nth(&earlier.email, 1).await.token();
    verify(server, &token).await.expect(204);
    server.login(&earlier.email, PASSWORD).await;
}

#[tokio::test]
async fn a_new_address_is_confirmed_from_its_mail() {
    let (server, mails) = Server::shared_with_mail().await;
    let ann = server.user().await;
    let other = server.login(&ann.email, PASSWORD).await;
    let new = new_address();
    change_email(&ann, &new, ANOTHER_PASSWORD)
        .await
        .problem(403, "wrong_password");
    change_email(&ann, "nobody", PASSWORD)
        .await
        .problem(422, "validation_failed");
    change_email(&ann, &new.to_uppercase(), PASSWORD)
        .await
        .expect(202);
    let link = mails.nth(&new, 1).await;
    let notice = mails.nth_about(&ann.email, "about to change", 1).await;
    assert_eq!(
        notice.header("Subject"),
        "Todo: your e-mail address is about to change"
    );
    // The new address may look like a link to a page of an attacker.
    assert!(!notice.text.contains(&new) && !notice.text.contains("#token="));
    let me = ann.get("/api/v1/auth/me").await.expect(200).json();
    assert_eq!(me["email"], ann.email.as_str());
    verify(server, &link.token()).await.expect(204);
    let since = Instant::now();
    verify(server, &link.token()).await.expect(204);
    assert_revoked(server, &other.access_token, since).await;
    let me = ann.get("/api/v1/auth/me").await.expect(200).json();
    assert_eq!(
        (&me["email"], &me["email_verified"]),
        (&json!(new), &json!(true))
    );
    assert_ne!(me["updated_at"], me["created_at"]);
    server.login(&new, PASSWORD).await;
    login(server, &ann.email, PASSWORD)
        .await
        .problem(401, "invalid_credentials");
}

#[tokio::test]
async fn the_link_to_a_new_address_dies_with_the_password_and_the_address() {
    let (server, mails) = Server::shared_with_mail().await;
    let ann = server.user().await;
    let (first, second) = (new_address(), new_address());
    change_email(&ann, &first, PASSWORD).await.expect(202);
    change_email(&ann, &second, PASSWORD).await.expect(202);
    let superseded = mails.nth(&second, 1).await.token();
    verify(server, &mails.nth(&first, 1).await.token())
        .await
        .expect(204);
    verify(server, &superseded)
        .await
        .problem(401, "invalid_mail_token");
    change_email(&ann, &second, PASSWORD).await.expect(202);
    let superseded = mails.nth(&second, 2).await.token();
    let changed = change_password(server, &ann.access_token, PASSWORD, ANOTHER_PASSWORD).await;
    changed.expect(200);
    verify(server, &superseded)
        .await
        .problem(401, "invalid_mail_token");
}

#[tokio::test]
async fn one_of_two_users_gets_the_address_that_both_want() {
    let (server, mails) = Server::shared_with_mail().await;
    let there = server.sibling(&[]).await;
    let (ann, ben) = (server.user().await, server.user().await);
    let new = new_address();
    for user in [&ann, &ben] {
        change_email(user, &new, PASSWORD).await.expect(202);
    }
    let tokens = [
        mails.nth(&new, 1).await.token(),
        mails.nth(&new, 2).await.token(),
    ];
    let responses = tokio::join!(verify(server, &tokens[0]), verify(&there, &tokens[1]));
    let mut statuses = [responses.0.status, responses.1.status];
    statuses.sort_unstable();
    assert_eq!(statuses, [204, 409]);
    // A taken address is not revealed before.
    change_email(&ann, &ben.email, PASSWORD).await.expect(202);
    let mail = mails.nth_about(&ben.email, "new e-mail address", 1).await;
    let taken = verify(server, &mail.token()).await;
    assert!([204, 409].contains(&taken.status), "{taken:?}");
}

#[tokio::test]
async fn wrong_passwords_share_a_count_and_changes_of_address_are_limited() {
    let (server, _) = Server::shared_with_mail().await;
    let ann = server.user().await;
    for n in 0..10 {
        let response = match n % 2 {
            0 => change_email(&ann, "new@example.com", ANOTHER_PASSWORD).await,
            _ => change_password(server, &ann.access_token, ANOTHER_PASSWORD, PASSWORD).await,
        };
        response.problem(403, "wrong_password");
    }
    change_email(&ann, "new@example.com", PASSWORD)
        .await
        .problem(429, "too_many_attempts");
    delete_account(server, &ann.access_token, PASSWORD)
        .await
        .problem(429, "too_many_attempts");

    let ben = server.user().await;
    for _ in 0..10 {
        change_email(&ben, &new_address(), PASSWORD)
            .await
            .expect(202);
    }
    change_email(&ben, &new_address(), PASSWORD)
        .await
        .problem(429, "too_many_attempts");
}

#[tokio::test]
async fn without_a_mail_server_the_routes_do_not_exist() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for path in [FORGOT, RESET, VERIFY, RESEND] {
        post(server, path, json!({"email": "a@b", "token": "x"}))
            .await
            .problem(404, "not_found");
    }
    ann.put(CHANGE)
        .json(json!({}))
        .await
        .problem(404, "not_found");
    for path in ["/account/reset", "/account/verify", FORGOT] {
        server.get(path).await.problem(404, "not_found");
    }
    assert!(!is_verified(&ann).await);
}

#[tokio::test]
async fn incomplete_or_invalid_settings_are_named() {
    let smtp = ("SMTP_URL", "smtp://127.0.0.1:9");
    let from = ("MAIL_FROM", "todo@example.com");
    let public = ("PUBLIC_URL", "https://todo.example.com");
    for (variables, expected) in [
        (&[smtp, public][..], "MAIL_FROM is required"),
        (&[smtp, from], "PUBLIC_URL is required"),
        (&[smtp, from, ("PUBLIC_URL", "ftp://x")], "PUBLIC_URL must"),
        (
            &[smtp, from, ("PUBLIC_URL", "https://x/#y")],
            "PUBLIC_URL must",
        ),
        (&[("MAIL_FROM", "todo")], "MAIL_FROM must"),
        (&[("APP_RESET_URL", "reset")], "APP_RESET_URL must"),
        (&[("EMAIL_VERIFICATION", "required")], "EMAIL_VERIFICATION"),
        (&[("EMAIL_VERIFICATION", "yes")], "EMAIL_VERIFICATION must"),
        (
            &[("SMTP_URL", "https://user:pa55word@host"), from, public],
            "SMTP_URL must",
        ),
        (
            &[("SMTP_URL", "smtps://user:pa55/word@host"), from, public],
            "SMTP_URL must",
        ),
        (
            &[("SMTP_URL", "smtps://user@host"), from, public],
            "SMTP_URL must",
        ),
    ] {
        let process = Process::spawn(&["check"], variables);
        assert_eq!(process.ended().await.code(), Some(1), "{variables:?}");
        let log = process.log();
        assert!(
            log.contains(expected) && !log.contains("pa55"),
            "{variables:?}: {log}"
        );
        assert_eq!(log.lines().count(), 1, "{log}");
    }
}

/// The service's pages do not run inline scripts.
#[tokio::test]
async fn the_pages_have_a_strict_policy_and_accept_password_managers() {
    let (server, _) = Server::shared_with_mail().await;
    for path in ["/account/reset", "/account/verify"] {
        let page = server.get(path).await.expect(200);
        let policy = page.header("content-security-policy");
        assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"));
        assert_eq!(page.header("referrer-policy"), "no-referrer");
        let html = String::from_utf8_lossy(&page.body).into_owned();
        assert!(
            !html.contains("<script>") && !html.contains(" style=") && !html.contains(" onclick")
        );
        for file in ["account.js", "account.css", "docs.css"] {
            assert!(
                html.contains(&format!("\"../docs/{file}\"")),
                "{path} {file}"
            );
            server.get(format!("/docs/{file}")).await.expect(200);
        }
    }
    let page = server.get("/account/reset").await;
    let html = String::from_utf8_lossy(&page.body).into_owned();
    assert_eq!(html.matches("autocomplete=\"new-password\"").count(), 2);
    assert!(html.contains("autocomplete=\"username\""));
}
