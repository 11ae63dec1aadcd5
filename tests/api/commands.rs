//! The commands other than `serve`.

use std::fs::File;
use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use crate::harness::{DataDir, PASSWORD, Process, SECRET, Server};
use serde_json::json;

/// Runs a command with this standard input and only these environment variables.
pub(crate) fn run(arguments: &[&str], variables: &[(&str, &str)], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_todo-api"))
        .args(arguments)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    child
        .stdin
        .take()
        .expect("a standard input")
        .write_all(input.as_bytes())
        .ok();
    child.wait_with_output().expect("the program exits")
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Contains combining accents, which some terminals send.
const NEW_PASSWORD: &str = "seven Co\u{308}pper ke\u{301}ttles";

fn set_password(email: &str, password: &str, variables: &[(&str, &str)]) -> Output {
    let input = format!("{password}\n");
    run(&["user", "set-password", email], variables, &input)
}

#[tokio::test]
async fn set_password_clears_lockouts_and_revokes_sessions() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    let ben = server.user().await;
    let sql = server.sql().await;
    sql.batch_execute(
        "insert into login_failures
         select account, network, 17, now(), now() + interval '1 hour'
         from users, lateral (values (email, '127.0.0.1'), (email, '*'), (id::text, 'session'))
             f (account, network)",
    )
    .await
    .expect("lockouts");
    let url = server.database_url();
    let variables = [
        ("DATABASE_URL", url.as_str()),
        ("JWT_SECRET", SECRET),
        ("BCRYPT_COST", "10"),
    ];
    let output = set_password(" Ann@Example.com ", NEW_PASSWORD, &variables);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("1 sessions revoked"));
    let line = format!("INFO  password set user_id={} sessions_revoked=1", ann.id);
    assert!(stderr(&output).contains(&line), "{}", stderr(&output));
    for (password, status) in [(PASSWORD, 401), ("seven Cöpper kéttles", 200)] {
        server
            .post("/api/v1/auth/login")
            .json(json!({"email": ann.email, "password": password}))
            .await
            .expect(status);
    }
    server
        .post("/api/v1/auth/refresh")
        .json(json!({"refresh_token": ann.refresh_token}))
        .await
        .problem(401, "invalid_refresh_token");
    // Only the lockouts of the two other accounts are left.
    let left = "select count(distinct account) from login_failures";
    let left: i64 = sql.query_one(left, &[]).await.expect("a count").get(0);
    assert_eq!(left, 2);
    ben.get("/api/v1/auth/me").await.expect(200);

    for (email, password, expected) in [
        ("nobody@example.com", NEW_PASSWORD, "no account"),
        ("ann@example.com", "password", "easy to guess"),
        ("ann@example.com", "short", "8 characters"),
        ("no address", NEW_PASSWORD, "address"),
    ] {
        let output = set_password(email, password, &variables);
        assert!(!output.status.success());
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
    }
}

#[tokio::test]
async fn user_and_check_work_while_the_service_runs() {
    let data = DataDir::initialized().await;
    let service = Process::spawn(
        &[],
        &[
            ("DATA_DIR", data.text()),
            ("LISTEN_ADDR", "127.0.0.1:0"),
            ("BCRYPT_COST", "10"),
        ],
    );
    service.listening().await;
    let variables = [("DATA_DIR", data.text())];
    let output = set_password("nobody@example.com", NEW_PASSWORD, &variables);
    assert!(
        stderr(&output).contains("no account"),
        "{}",
        stderr(&output)
    );
    assert!(run(&["user", "list"], &variables, "").status.success());
    let output = run(&["check"], &variables, "");
    assert!(output.status.success());
    assert!(
        stdout(&output).contains("migrations due: 0"),
        "{}",
        stdout(&output)
    );
    assert!(service.stop().await.success());
}

#[tokio::test]
async fn only_serve_creates_a_database() {
    let data = DataDir::new();
    let variables = [("DATA_DIR", data.text())];
    for (arguments, code) in [
        (&["user", "set-password", "ann@example.com"][..], 1),
        (&["user", "list"], 1),
        (&["user", "delete", "ann@example.com"], 1),
        (&["migrate"], 1),
        (&["check"], 0),
    ] {
        let output = run(arguments, &variables, &format!("{NEW_PASSWORD}\n"));
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        if code == 1 {
            let error = stderr(&output);
            assert!(
                error.contains("no database") && error.contains(data.text()),
                "{error}"
            );
        }
        assert!(!data.path().exists(), "{arguments:?} created a directory");
    }
}

#[tokio::test]
async fn commands_start_a_stopped_embedded_postgres_and_stop_it_again() {
    let data = DataDir::initialized().await;
    let variables = [
        ("DATA_DIR", data.text()),
        ("LISTEN_ADDR", "127.0.0.1:0"),
        ("BCRYPT_COST", "10"),
    ];
    let server = Server::with(&variables).await;
    let ann = server.user().await;
    assert!(server.stop().await.success());
    let output = set_password(&ann.email, NEW_PASSWORD, &variables);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(data.postgres(), None);
    let server = Server::with(&variables).await;
    server.login(&ann.email, NEW_PASSWORD).await;
}

#[tokio::test]
async fn set_password_errors_name_the_database() {
    let server = Server::start().await;
    let url = server.database_url();
    let variables = [("DATABASE_URL", url.as_str()), ("JWT_SECRET", SECRET)];
    let output = set_password("nobody@example.com", NEW_PASSWORD, &variables);
    let database = url.rsplit('/').next().unwrap();
    assert!(stderr(&output).contains(database), "{}", stderr(&output));
}

#[test]
fn does_not_panic_if_an_output_stream_is_closed_or_full() {
    let data = DataDir::new();
    let run = |command: &str, stdout: Stdio, stderr: Stdio| {
        Command::new(env!("CARGO_BIN_EXE_todo-api"))
            .arg(command)
            .env("DATA_DIR", data.text())
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .and_then(|child| child.wait_with_output())
            .expect("the program exits")
    };
    for command in ["--help", "--version", "check"] {
        // A closed pipe, as in `todo-api --help | head -1`.
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = run(command, writer.into(), Stdio::piped());
        assert_eq!(output.status.code(), Some(0), "{command}");
        assert_eq!(stderr(&output), "", "{command}");

        if let Ok(full) = File::options().write(true).open("/dev/full") {
            let output = run(
                command,
                full.try_clone().expect("a file").into(),
                Stdio::piped(),
            );
            assert_eq!(output.status.code(), Some(1), "{command}");
            let error = stderr(&output);
            assert!(
                error.contains("cannot write to standard output"),
                "{command}: {error}"
            );
            assert_eq!(error.lines().count(), 1, "{command}: {error}");
            let also_full = full.try_clone().expect("a file").into();
            assert_eq!(run(command, full.into(), also_full).status.code(), Some(1));
        }
    }
    // stderr may be closed as well.
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    assert_eq!(
        run("dance", Stdio::null(), writer.into()).status.code(),
        Some(2)
    );
}

#[tokio::test]
async fn check_prints_each_setting_and_its_source_but_no_secret() {
    let server = Server::start().await;
    let url = server.database_url();
    let variables = [
        ("DATABASE_URL", url.as_str()),
        ("JWT_SECRET", SECRET),
        ("BCRYPT_COST", "11"),
    ];
    let output = run(&["check"], &variables, "");
    assert!(output.status.success(), "{}", stderr(&output));
    let output = stdout(&output);
    assert!(!output.contains(SECRET) && !output.contains(&url));
    let help = stdout(&run(&["--help"], &[], ""));
    for line in output
        .lines()
        .take_while(|line| !line.starts_with("database"))
    {
        let name = line.split_whitespace().next().unwrap_or_default();
        assert!(help.contains(name), "--help does not name {name}");
    }
    let cost = output.lines().find(|line| line.starts_with("BCRYPT_COST"));
    assert_eq!(
        cost.map(|line| line.split_whitespace().collect::<Vec<_>>()),
        Some(vec!["BCRYPT_COST", "11", "environment"])
    );
    for line in [
        "PostgreSQL",
        "TLS not in use",
        "migrations due: 0",
        "clock difference",
        "pooler none",
    ] {
        assert!(output.contains(line), "{line} is not in {output}");
    }
    let output = run(&["check", "--json"], &variables, "");
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let cost = json!({"name": "BCRYPT_COST", "value": "11", "source": "environment"});
    let settings = document["settings"].as_array().expect("the settings");
    assert!(settings.contains(&cost), "{document}");
    assert_eq!(document["database"]["migrations_due"], 0, "{document}");
    assert!(!document.to_string().contains(SECRET) && !document.to_string().contains(&url));
    // A data directory that cannot be used is part of the document.
    let file = tempfile::NamedTempFile::new().expect("a file");
    let path = file.path().to_str().expect("a path");
    let output = run(&["check", "--json"], &[("DATA_DIR", path)], "");
    assert_eq!(output.status.code(), Some(1));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let error = document["database"]["error"].as_str().unwrap_or_default();
    assert!(error.contains("is not a directory"), "{document}");
    // The help text fits on one screen.
    assert!(
        help.lines().count() <= 46 && help.lines().all(|line| line.len() <= 100),
        "{help}"
    );
}

/// Returns the names and defaults of all settings, as `check` prints them; `None` for no default.
fn settings() -> Vec<(String, Option<String>)> {
    let data = DataDir::new();
    let output = run(&["check"], &[("DATA_DIR", data.text())], "");
    let output = stdout(&output);
    let rows = output.lines().map_while(|line| {
        let mut words = line.split_whitespace();
        let (name, value, source) = (words.next()?, words.next()?, words.next()?);
        let is_row = ["default", "environment"].contains(&source);
        let default = Some(value).filter(|_| source == "default" && value != "none");
        is_row.then(|| (name.to_owned(), default.map(str::to_owned)))
    });
    rows.collect()
}

#[test]
fn help_readme_and_example_file_agree_with_the_settings() {
    let settings = settings();
    assert!(settings.len() > 10, "{settings:?}");
    let help = stdout(&run(&["--help"], &[], ""));
    let readme = include_str!("../../README.md");
    let example = include_str!("../../systemd/todo-api.env.example");
    for (name, default) in &settings {
        let default = match name.as_str() {
            "AUTH_RATE_PER_MINUTE" => "100 per core",
            _ => default.as_deref().unwrap_or_default(),
        };
        let line = help
            .lines()
            .find(|line| line.contains(&format!(" {name} ")));
        assert!(line.is_some_and(|line| line.contains(default)), "{line:?}");
        let row = readme
            .lines()
            .find(|line| line.starts_with("| `") && line.contains(&format!("`{name}`")))
            .unwrap_or_else(|| panic!("README.md has no row for {name}"));
        let cells: Vec<&str> = row.split('|').collect();
        assert!(cells[2].contains(default), "{row} lacks {default}");
        // The units set the data directory and the address, and pass secrets as credentials.
        if !["DATABASE_URL", "DATA_DIR", "LISTEN_ADDR"].contains(&&**name)
            && !name.starts_with("JWT_")
        {
            let line = example
                .lines()
                .find(|line| line.starts_with(&format!("#{name}=")));
            let line = line.unwrap_or_else(|| panic!("the example file lacks {name}"));
            assert!(
                default.is_empty()
                    || default.contains(' ')
                    || line.ends_with(&format!("={default}")),
                "{line}"
            );
        }
    }
    let is_known = |name: &str| settings.iter().any(|(known, _)| known == name);
    for line in example.lines().filter_map(|line| line.strip_prefix('#')) {
        if let Some((name, _)) = line.split_once('=').filter(|(name, _)| !name.contains(' ')) {
            assert!(is_known(name), "the example file has an unknown {name}");
        }
    }
}

/// Returns the man page: the text of `--help`, and what it leaves out.
fn man_page(help: &str) -> String {
    let entries = |lines: &str| -> String {
        let entry = |line: &str| {
            let (name, text) = line.trim_start().split_once("  ").unwrap_or((line, ""));
            format!(".TP\n.B {}\n{}\n", name.trim(), text.trim())
        };
        let lines = lines.lines().filter(|line| line.starts_with("  "));
        lines.map(entry).collect::<String>().replace('-', "\\-")
    };
    let (commands, settings) = help.split_once("environment (").expect("the settings");
    let title = commands
        .lines()
        .next()
        .expect("a title")
        .replacen(": ", " \\- ", 1);
    format!(
        ".\\\" Generated from `todo-api --help` by the test that compares it.\n\
         .TH TODO\\-API 1\n.SH NAME\n{title}\n\
         .SH SYNOPSIS\n.B todo\\-api\n[\\fICOMMAND\\fR] [\\fB\\-\\-json\\fR]\n\
         .SH COMMANDS\n{}\
         .SH ENVIRONMENT\nSecrets are also read from the file that \\fINAME\\fB_FILE\\fR names, or from a \
         systemd credential.\n{}\
         .SH EXIT STATUS\n0 on success, 1 after a failure, 2 for wrong arguments, 3 if there is no account with \
         this address.\n\
         .SH FILES\n.TP\n.I /etc/todo\\-api.env\nThe settings of \\fBtodo\\-api.service\\fR.\n\
         .TP\n.I /etc/credstore/todo\\-api.*\nIts secrets.\n\
         .SH SEE ALSO\n\\fBtodo\\-api\\-admin\\fR runs a command as the user of the service, with its settings \
         and secrets.\n.I /usr/share/doc/todo\\-api/operations.md\n",
        entries(commands),
        entries(settings),
    )
}

/// `UPDATE_MAN_PAGE=1 cargo test man_page` writes the page.
#[test]
fn the_man_page_agrees_with_help() {
    let page = man_page(&stdout(&run(&["--help"], &[], "")));
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/todo-api.1");
    if std::env::var_os("UPDATE_MAN_PAGE").is_some() {
        std::fs::write(path, &page).expect("the page is written");
    }
    assert_eq!(std::fs::read_to_string(path).expect("a man page"), page);
}

#[tokio::test]
async fn check_fails_fast_if_the_database_is_unreachable() {
    let variables = [
        ("DATABASE_URL", "postgres://nobody@127.0.0.1:9/none"),
        ("JWT_SECRET", SECRET),
    ];
    for (arguments, expected) in [
        (&["check"][..], "cannot be used"),
        (&["check", "--json"], "\"error\":"),
    ] {
        let output = run(arguments, &variables, "");
        assert_eq!(output.status.code(), Some(1));
        assert!(stdout(&output).contains(expected), "{}", stdout(&output));
    }
}

#[tokio::test]
async fn an_unknown_command_prints_one_line_and_exits_with_2() {
    for arguments in [
        &["dance"][..],
        &["--dance"],
        &["user"],
        &["user", "disable"],
        &["user", "list", "more"],
        &["migrate", "--json"],
        &["check", "more"],
    ] {
        let output = run(arguments, &[], "");
        assert_eq!(output.status.code(), Some(2));
        assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
    }
}
