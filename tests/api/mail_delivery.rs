//! The queue of mails: retries, failures, shutdown, metrics and the log.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;

use crate::harness::{MailServer, Process, SECRET, Server, until};
use crate::metrics::scrape;

/// Returns the number of mails with this result.
async fn mails(server: &Server, result: &str) -> u32 {
    let text = scrape(server).await;
    let start = format!("todo_api_mails_total{{result=\"{result}\"}} ");
    let line = text.lines().find_map(|line| line.strip_prefix(&start));
    line.expect(result).parse().expect("a count")
}

async fn forgot(server: &Server, email: &str) {
    let body = json!({"email": email});
    server
        .post("/api/v1/auth/password/forgot")
        .json(body)
        .await
        .expect(202);
}

#[tokio::test]
async fn temporary_failures_are_retried_and_permanent_ones_are_not() {
    let variables = [
        ("METRICS_ADDR", "127.0.0.1:0"),
        ("EMAIL_VERIFICATION", "off"),
    ];
    let (server, recorder) = Server::with_mail(&variables).await;
    let ann = server.user().await;
    recorder.reply(&["550 5.1.1 <ann@example.com> no such user"]);
    forgot(&server, &ann.email).await;
    server
        .wait_for_log("mail not sent reason=rejected attempts=1")
        .await;
    assert!(server.log().contains("no such user"));
    recorder.reply(&["451 4.7.1 greylisted"]);
    forgot(&server, &ann.email).await;
    recorder.nth(&ann.email, 1).await;
    until("the counts", async || mails(&server, "sent").await == 1).await;
    assert_eq!(mails(&server, "rejected").await, 1);
    // The queue is empty, and a refused mail was offered once.
    assert!(
        scrape(&server)
            .await
            .contains("todo_api_mail_queue_length 0")
    );
    assert_eq!(recorder.counts().0, 3);
    // The connection of the last mail is used again.
    let connections = recorder.counts().1;
    forgot(&server, &ann.email).await;
    recorder.nth(&ann.email, 2).await;
    assert_eq!(recorder.counts().1, connections);
    // After three attempts, a mail is given up. A shutdown skips the second pause.
    recorder.reply(&["451 wait"; 3]);
    let ben = server.user().await;
    forgot(&server, &ben.email).await;
    until("the second attempt", async || recorder.counts().0 == 6).await;
    assert!(server.stop().await.success());
    assert_eq!(recorder.counts().0, 7);
    assert!(
        server
            .log()
            .contains("mail not sent reason=deferred attempts=3")
    );
    assert!(
        server
            .log()
            .lines()
            .all(|line| !line.contains("INFO") || !line.contains('@'))
    );
}

#[tokio::test]
async fn shutdown_sends_the_mails_in_the_queue() {
    let (server, recorder) = Server::with_mail(&[]).await;
    // Longer than the server accepts connections after the signal.
    recorder.delay(Duration::from_millis(700));
    let users = [
        server.user().await,
        server.user().await,
        server.user().await,
    ];
    server.signal(Signal::TERM);
    assert!(server.ended().await.success());
    for user in users {
        assert_eq!(recorder.received(&user.email).len(), 1);
    }
}

/// The response is sent before the mail, and a mail server that is away has no effect on it.
#[tokio::test]
async fn requests_succeed_while_the_mail_server_is_away() {
    let recorder = MailServer::start();
    let away = ("SMTP_URL", "smtp://127.0.0.1:9");
    let variables = [
        &recorder.variables()[1..],
        &[away, ("METRICS_ADDR", "127.0.0.1:0")],
    ]
    .concat();
    let server = Server::with(&variables).await;
    let ann = server.user().await;
    forgot(&server, &ann.email).await;
    assert!(server.stop().await.success());
    assert_eq!(
        server
            .log()
            .matches("mail not sent reason=unreachable attempts=3")
            .count(),
        2
    );
}

#[tokio::test]
async fn check_greets_the_mail_server() {
    let database = Server::shared().await.database_url();
    let recorder = MailServer::start();
    recorder.ignore_quit();
    let base = [("DATABASE_URL", database.as_str()), ("JWT_SECRET", SECRET)];
    for (smtp, code, expected) in [
        (None, 0, "SMTP_URL is not set"),
        (Some("smtp://127.0.0.1:9"), 1, "cannot be used"),
        // The recorder supports neither authentication nor TLS.
        (Some("smtp://localhost:PORT"), 0, "TLS not in use"),
        (Some("smtp://user:pa55@127.0.0.1:PORT"), 1, "authentication"),
        (Some("smtps://localhost:PORT"), 1, "cannot be used"),
    ] {
        let port = recorder.variables()[0]
            .1
            .rsplit(':')
            .next()
            .unwrap()
            .to_owned();
        let smtp = smtp.map(|url| url.replace("PORT", &port));
        let smtp = smtp.as_deref().map(|url| ("SMTP_URL", url));
        let recorded = recorder.variables();
        let mail = smtp.iter().chain(&recorded[1..]).copied();
        let variables: Vec<_> = base.into_iter().chain(mail).collect();
        let process = Process::spawn(&["check"], &variables);
        assert_eq!(
            process.ended().await.code(),
            Some(code),
            "{smtp:?} {}",
            process.output()
        );
        let output = process.output();
        assert!(
            output.contains(expected) && !output.contains("pa55"),
            "{smtp:?}: {output}"
        );
    }
}
