//! The table of settings, and the environment reader that uses it.

use std::fmt;
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use secrecy::SecretString;
use serde::Serialize;

use crate::domain::MAX_ACCESS_TTL;

/// A setting: the environment variable, the default for an unset or empty one (an empty string
/// means none), the accepted values, and the help.
type Setting = (&'static str, &'static str, Values, &'static str);

/// The values that a setting accepts.
enum Values {
    /// Validated where the value is parsed.
    Text,
    Address,
    Integer(RangeInclusive<u32>),
    OneOf(&'static [&'static str]),
    /// At least this many bytes, read from the variable, the file named by `<name>_FILE`, or a
    /// systemd credential.
    Secret(usize),
}

use Values::{Address, Integer, OneOf, Secret, Text};

/// RFC 7518 section 3.2: a key for HS256 must be at least as long as the hash output.
const MIN_KEY_BYTES: usize = 32;
const YEAR: u32 = 31_536_000;

/// All settings, in the order used by `--help` and `check`. Tests compare README.md and
/// systemd/todo-api.env.example with this table.
#[rustfmt::skip]
const SETTINGS: [Setting; 28] = [
    ("DATABASE_URL", "", Secret(0), "postgres://…; unset: an embedded PostgreSQL in DATA_DIR"),
    ("DATA_DIR", ".todo-api", Text, "directory of the embedded PostgreSQL"),
    ("PGSSLROOTCERT", "", Text, "file with the CA certificates for DATABASE_URL"),
    ("JWT_SECRET", "", Secret(MIN_KEY_BYTES), "key that signs tokens, 32 bytes or more; required with DATABASE_URL"),
    ("JWT_SECRET_PREVIOUS", "", Secret(MIN_KEY_BYTES), "previous key: still verifies tokens, signs none"),
    ("LISTEN_ADDR", "127.0.0.1:8000", Address, "address of the API"),
    ("METRICS_ADDR", "", Address, "address of /metrics; unset: off"),
    ("CORS_ORIGINS", "", Text, "allowed origins, comma separated, like https://app.example.com"),
    ("TRUSTED_PROXIES", "", Text, "proxies whose X-Forwarded-For is used: addresses or CIDR blocks"),
    ("DB_POOL_SIZE", "20", Integer(1..=20), "connections to the database"),
    ("REGISTRATION", "open", OneOf(&["open", "closed"]), "whether new accounts can be registered"),
    ("AUTH_RATE_PER_MINUTE", "100 per core", Integer(0..=1_000_000), "auth requests from a network; 0: off"),
    ("BCRYPT_COST", "12", Integer(10..=16), "each step doubles the time of a login"),
    ("WRITES_PER_MINUTE", "7200", Integer(0..=1_000_000), "changes of tasks by one user; 0: off"),
    ("MAX_TASKS_PER_USER", "100000", Integer(1..=1_000_000_000), "tasks that one user can have"),
    ("ACCESS_TOKEN_TTL", "86400", Integer(1..=MAX_ACCESS_TTL.as_secs() as u32), "seconds an access token is valid"),
    ("REFRESH_TOKEN_IDLE_TTL", "2592000", Integer(1..=YEAR), "seconds a session lasts without a refresh"),
    ("REFRESH_TOKEN_MAX_TTL", "7776000", Integer(1..=YEAR), "seconds a session lasts in total"),
    ("REFRESH_TOKEN_GRACE", "10", Integer(0..=300), "seconds a used refresh token may be repeated"),
    ("WAIT_MAX", "30", Integer(0..=30), "seconds a request may wait for a change; 0: off"),
    ("SMTP_URL", "", Secret(0), "mail server, smtps://user:password@host or smtp://…; unset: no mail"),
    ("MAIL_FROM", "", Text, "sender of mails; required with SMTP_URL"),
    ("MAIL_NAME", "Todo", Text, "name of the service in mails"),
    ("PUBLIC_URL", "", Text, "URL of the service, for links in mails; required with SMTP_URL"),
    ("APP_RESET_URL", "", Text, "page of the app that sets a new password"),
    ("APP_VERIFY_URL", "", Text, "page of the app that verifies an address"),
    ("EMAIL_VERIFICATION", "optional with SMTP_URL", OneOf(&["off", "optional", "required"]), "of addresses"),
    ("RUST_LOG", "info", Text, "log filter; info,access=debug adds a line for each request"),
];

fn find(name: &str) -> &'static Setting {
    let setting = SETTINGS.iter().find(|(known, ..)| *known == name);
    setting.expect("the name of a row of SETTINGS")
}

impl fmt::Display for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address => f.write_str("an address and a port like 127.0.0.1:8000"),
            Integer(range) => write!(f, "{} to {}", range.start(), range.end()),
            OneOf(words) => f.write_str(&words.join(" or ")),
            Secret(min_bytes) => write!(f, "{min_bytes} bytes or more"),
            Text => f.write_str("text"),
        }
    }
}

/// The lines of `--help` that describe the settings.
pub(crate) fn help() -> String {
    let line = |(name, default, values, help): &Setting| {
        let mut notes = Vec::new();
        if matches!(values, Integer(_) | OneOf(_)) {
            notes.push(values.to_string());
        }
        if !default.is_empty() {
            notes.push(format!("default {default}"));
        }
        let notes = match notes.is_empty() {
            true => String::new(),
            false => format!(" ({})", notes.join(", ")),
        };
        format!("  {name:<24}{help}{notes}")
    };
    SETTINGS.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A setting in the output of `check`.
#[derive(Serialize)]
pub(crate) struct ReportLine {
    name: String,
    /// “…” for a secret.
    value: String,
    source: String,
}

impl fmt::Display for ReportLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<24} {:<28} {}", self.name, self.value, self.source)
    }
}

/// Reads settings and reports their values and sources.
#[derive(Default)]
pub(super) struct EnvReader {
    pub(super) report: Vec<ReportLine>,
}

impl EnvReader {
    /// Reads a setting that accepts any text.
    pub(super) fn text(&mut self, name: &'static str) -> Result<Option<String>, String> {
        self.text_or(name, || find(name).1.to_owned())
    }

    /// Like `text`, but with a computed default.
    pub(super) fn text_or(
        &mut self,
        name: &'static str,
        default: impl FnOnce() -> String,
    ) -> Result<Option<String>, String> {
        let (value, source) = match variable(name)? {
            Some(value) => (value, "environment"),
            None => (default(), "default"),
        };
        let value = Some(value).filter(|value| !value.is_empty());
        self.record(name, value.as_deref().unwrap_or("none"), source);
        Ok(value)
    }

    /// Reads and parses a setting that has a default, and checks its range.
    pub(super) fn parsed<T: FromStr>(&mut self, name: &'static str) -> Result<T, String> {
        self.parsed_or(name, || find(name).1.to_owned())
    }

    /// Like `parsed`, but with a computed default.
    pub(super) fn parsed_or<T: FromStr>(
        &mut self,
        name: &'static str,
        default: impl FnOnce() -> String,
    ) -> Result<T, String> {
        let text = self.text_or(name, default)?.unwrap_or_default();
        parse(name, &text)
    }

    /// Like `parsed`, but for a setting without a default.
    pub(super) fn parsed_if_set<T: FromStr>(
        &mut self,
        name: &'static str,
    ) -> Result<Option<T>, String> {
        let text = self.text(name)?;
        text.map(|text| parse(name, &text)).transpose()
    }

    /// Reads a comma-separated list.
    pub(super) fn list<T>(
        &mut self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Vec<T>, String> {
        let text = self.text(name)?.unwrap_or_default();
        let entries = text.split(',').map(str::trim);
        let entries = entries.filter(|entry| !entry.is_empty()).map(parse);
        let parsed: Result<_, String> = entries.collect();
        parsed.map_err(|reason| format!("{name}: {reason}"))
    }

    /// Reads a secret from the variable, the file named by `<name>_FILE`, or a systemd credential.
    pub(super) fn secret(&mut self, name: &'static str) -> Result<Option<SecretString>, String> {
        let file_name = format!("{name}_FILE");
        let file = variable(&file_name)?.map(PathBuf::from);
        let credential = std::env::var_os("CREDENTIALS_DIRECTORY")
            .map(|directory| PathBuf::from(directory).join(name.to_ascii_lowercase()))
            .filter(|path| path.exists());
        let (secret, source) = match (variable(name)?, file, credential) {
            (Some(_), Some(_), _) => {
                return Err(format!("{name} and {file_name} cannot both be set"));
            }
            (Some(secret), None, _) => (secret, "environment".to_owned()),
            (None, Some(path), _) => (read(&file_name, &path)?, format!("file {}", path.display())),
            (None, None, Some(path)) => (read(name, &path)?, "systemd credential".to_owned()),
            (None, None, None) => {
                self.record(name, "none", "default");
                return Ok(None);
            }
        };
        let (.., values, _) = find(name);
        if matches!(values, Secret(min_bytes) if secret.len() < *min_bytes) {
            return Err(format!("{name} must have {values}"));
        }
        self.record(name, "…", &source);
        Ok(Some(secret.into()))
    }

    fn record(&mut self, name: &str, value: &str, source: &str) {
        let (name, value, source) = (name.into(), value.into(), source.into());
        self.report.push(ReportLine {
            name,
            value,
            source,
        });
    }
}

/// Reads a variable and trims it. An empty variable counts as unset.
fn variable(name: &str) -> Result<Option<String>, String> {
    let Some(value) = std::env::var_os(name) else {
        return Ok(None);
    };
    match value.to_str().map(str::trim) {
        Some("") => Ok(None),
        Some(value) => Ok(Some(value.to_owned())),
        None => Err(format!("{name} must be UTF-8")),
    }
}

fn parse<T: FromStr>(name: &str, text: &str) -> Result<T, String> {
    let (.., values, _) = find(name);
    let is_accepted = match values {
        Integer(range) => text.parse().is_ok_and(|number| range.contains(&number)),
        OneOf(words) => words.contains(&text),
        Address | Secret(_) | Text => true,
    };
    let value = text.parse().ok().filter(|_| is_accepted);
    value.ok_or_else(|| format!("{name} must be {values}, not {text:?}"))
}

fn read(name: &str, path: &Path) -> Result<String, String> {
    let text = fs::read_to_string(path)
        .map_err(|error| format!("{name}: cannot read {}: {error}", path.display()))?;
    Ok(text.trim().to_owned())
}
