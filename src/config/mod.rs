//! Every setting: its variable, its default, its bounds. A wrong one ends the start with one line
//! that names the variable and what it takes, and never shows a secret.

pub(crate) mod origin;

use std::fmt;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use log::{Level, LevelFilter, Metadata};

use crate::config::origin::normalize_origin;
use crate::db::tls::read_roots;
use crate::db::url::DatabaseUrl;
use crate::embedded_postgres;

/// RFC 7518 section 3.2: a key for HS256 has at least as many bits as its hash.
const MIN_SECRET_BYTES: usize = 32;

/// A value that never shows itself.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// The value, for the one place that uses it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// Where the data lives.
#[derive(Clone, Debug)]
pub enum DatabaseSource {
    /// A PostgreSQL of our own, in this directory.
    Private(PathBuf),
    /// A server that somebody else runs.
    Server(Box<DatabaseUrl>),
}

/// The longest that an access token can be good for. Revocations are kept as long.
pub(crate) const MAX_ACCESS_TTL: Duration = Duration::from_secs(DAY);
const DAY: u64 = 86_400;

/// How long tokens and sessions are good for.
#[derive(Clone, Copy, Debug)]
pub struct TokenLifetimes {
    /// An access token, from its issue.
    pub access: Duration,
    /// A session, from its last refresh.
    pub refresh_idle: Duration,
    /// A session, in all.
    pub refresh_max: Duration,
    /// How long a refresh token that was just used gives its successor again.
    pub refresh_grace: Duration,
}

/// The settings, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// `DATABASE_URL` or `DATA_DIR`.
    pub store: DatabaseSource,
    /// `JWT_SECRET`; `None` with a private PostgreSQL that keeps one of its own.
    pub jwt_secret: Option<Secret>,
    /// `JWT_SECRET_PREVIOUS`: still verified, never signed with.
    pub jwt_secret_previous: Option<Secret>,
    /// `LISTEN_ADDR`.
    pub listen_addr: SocketAddr,
    /// `METRICS_ADDR`.
    pub metrics_addr: Option<SocketAddr>,
    /// `CORS_ORIGINS`.
    pub cors_origins: Vec<String>,
    /// `TRUSTED_PROXIES`.
    pub trusted_proxies: Vec<IpNet>,
    /// `DB_POOL_SIZE`.
    pub db_pool_size: u32,
    /// `REGISTRATION`.
    pub registration_open: bool,
    /// `AUTH_RATE_PER_MINUTE`; 0 is off.
    pub auth_rate_per_minute: u32,
    /// `BCRYPT_COST`.
    pub bcrypt_cost: u32,
    /// `ACCESS_TOKEN_TTL` and its fellows.
    pub lifetimes: TokenLifetimes,
    /// `RUST_LOG`.
    pub log_filter: String,
    /// Each setting as it was found, for `todo-api check`.
    pub report: Vec<Setting>,
}

/// One setting as it was found.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The variable.
    pub name: &'static str,
    /// Its value; `…` for a secret.
    pub value: String,
    /// Where it came from.
    pub source: Source,
}

/// Where a setting came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nobody set it.
    Default,
    /// The environment.
    Environment,
    /// The file that the variable with `_FILE` names.
    File(PathBuf),
    /// A credential that systemd passed.
    Credential,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Environment => f.write_str("environment"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Credential => f.write_str("systemd credential"),
        }
    }
}

/// What is wrong with the settings: one line for the operator.
#[derive(Debug)]
pub struct ConfigError(String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Reads the environment of the process.
    pub fn from_env() -> Result<Self, ConfigError> {
        let mut reader = EnvReader::default();
        let url = reader.secret("DATABASE_URL", "DATABASE_URL_FILE", "database_url")?;
        let data_dir = reader.value("DATA_DIR", || {
            embedded_postgres::default_data_dir().display().to_string()
        })?;
        let root_certificates = reader.optional("PGSSLROOTCERT")?;
        // Also where nothing would read it: a path that is wrong is a mistake.
        if let Some(path) = root_certificates.as_ref().filter(|path| *path != "system") {
            read_roots(Path::new(path))
                .map_err(|reason| ConfigError(format!("PGSSLROOTCERT {reason}")))?;
        }
        let store = match &url {
            None => DatabaseSource::Private(PathBuf::from(data_dir)),
            Some(url) => DatabaseUrl::parse(url.expose(), root_certificates.as_deref())
                .map(|url| DatabaseSource::Server(Box::new(url)))
                .map_err(|reason| ConfigError(format!("DATABASE_URL {reason}")))?,
        };
        let jwt_secret = reader.jwt_secret("JWT_SECRET", "JWT_SECRET_FILE", "jwt_secret")?;
        if jwt_secret.is_none() && url.is_some() {
            return Err(ConfigError(format!(
                "JWT_SECRET is required with DATABASE_URL: {MIN_SECRET_BYTES} bytes or more, for example from `openssl rand -hex 32`"
            )));
        }
        let jwt_secret_previous = reader.jwt_secret(
            "JWT_SECRET_PREVIOUS",
            "JWT_SECRET_PREVIOUS_FILE",
            "jwt_secret_previous",
        )?;
        let address = "an address and a port like 127.0.0.1:8000";
        let listen_addr = reader.parsed("LISTEN_ADDR", "127.0.0.1:8000", address)?;
        let metrics_addr = reader.optional_parsed("METRICS_ADDR", address)?;
        let cors_origins = reader.list("CORS_ORIGINS", normalize_origin)?;
        let trusted_proxies = reader.list("TRUSTED_PROXIES", network)?;
        let db_pool_size = reader.integer_in("DB_POOL_SIZE", 20, 1..=20)? as u32;
        let registration_open = match reader.value("REGISTRATION", || "open".into())?.as_str() {
            "open" => true,
            "closed" => false,
            _ => return Err(ConfigError("REGISTRATION must be open or closed".into())),
        };
        let auth_rate_per_minute =
            reader.integer_in("AUTH_RATE_PER_MINUTE", 300, 0..=1_000_000)? as u32;
        let bcrypt_cost = reader.integer_in("BCRYPT_COST", 12, 10..=16)? as u32;
        const YEAR: u64 = 365 * DAY;
        let lifetimes = TokenLifetimes {
            access: reader.seconds("ACCESS_TOKEN_TTL", DAY, 1..=MAX_ACCESS_TTL.as_secs())?,
            refresh_idle: reader.seconds("REFRESH_TOKEN_IDLE_TTL", 30 * DAY, 1..=YEAR)?,
            refresh_max: reader.seconds("REFRESH_TOKEN_MAX_TTL", 90 * DAY, 1..=YEAR)?,
            refresh_grace: reader.seconds("REFRESH_TOKEN_GRACE", 10, 0..=300)?,
        };
        let log_filter = reader.value("RUST_LOG", || "info".into())?;
        check_log_filter(&log_filter).map_err(|reason| {
            ConfigError(format!("RUST_LOG must be like info,access=debug: {reason}"))
        })?;
        Ok(Self {
            store,
            jwt_secret,
            jwt_secret_previous,
            listen_addr,
            metrics_addr,
            cors_origins,
            trusted_proxies,
            db_pool_size,
            registration_open,
            auth_rate_per_minute,
            bcrypt_cost,
            lifetimes: TokenLifetimes {
                refresh_idle: lifetimes.refresh_idle.min(lifetimes.refresh_max),
                ..lifetimes
            },
            log_filter,
            report: reader.report,
        })
    }
}

/// Reads variables and keeps a list of what it found.
#[derive(Default)]
struct EnvReader {
    report: Vec<Setting>,
}

impl EnvReader {
    /// A variable as it stands; an empty one counts as not set.
    fn variable(name: &str) -> Result<Option<String>, ConfigError> {
        match std::env::var(name) {
            Ok(value) => Ok(Some(value.trim().to_owned()).filter(|value| !value.is_empty())),
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(std::env::VarError::NotUnicode(_)) => {
                Err(ConfigError(format!("{name} must be UTF-8")))
            }
        }
    }

    fn record(&mut self, name: &'static str, value: String, source: Source) {
        self.report.push(Setting {
            name,
            value,
            source,
        });
    }

    fn optional(&mut self, name: &'static str) -> Result<Option<String>, ConfigError> {
        let value = Self::variable(name)?;
        match &value {
            Some(text) => self.record(name, text.clone(), Source::Environment),
            None => self.record(name, "none".into(), Source::Default),
        }
        Ok(value)
    }

    fn value(
        &mut self,
        name: &'static str,
        default: impl FnOnce() -> String,
    ) -> Result<String, ConfigError> {
        let (value, source) = match Self::variable(name)? {
            Some(value) => (value, Source::Environment),
            None => (default(), Source::Default),
        };
        self.record(name, value.clone(), source);
        Ok(value)
    }

    fn parsed<T: FromStr>(
        &mut self,
        name: &'static str,
        default: &str,
        expected: &str,
    ) -> Result<T, ConfigError> {
        let value = self.value(name, || default.to_owned())?;
        value
            .parse()
            .map_err(|_| ConfigError(format!("{name} must be {expected}")))
    }

    fn optional_parsed<T: FromStr>(
        &mut self,
        name: &'static str,
        expected: &str,
    ) -> Result<Option<T>, ConfigError> {
        let value = self.optional(name)?;
        let parsed = value.map(|text| text.parse());
        parsed
            .transpose()
            .map_err(|_| ConfigError(format!("{name} must be {expected}")))
    }

    /// A comma separated list.
    fn list<T>(
        &mut self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Vec<T>, ConfigError> {
        let value = self.optional(name)?.unwrap_or_default();
        let entries = value
            .split(',')
            .map(str::trim)
            .filter(|entry| !entry.is_empty());
        let parsed: Result<_, String> = entries.map(parse).collect();
        parsed.map_err(|reason| ConfigError(format!("{name}: {reason}")))
    }

    fn integer_in(
        &mut self,
        name: &'static str,
        default: u64,
        bounds: RangeInclusive<u64>,
    ) -> Result<u64, ConfigError> {
        let expected = format!("a whole number from {} to {}", bounds.start(), bounds.end());
        let number = self.parsed(name, &default.to_string(), &expected)?;
        if !bounds.contains(&number) {
            return Err(ConfigError(format!("{name} must be {expected}")));
        }
        Ok(number)
    }

    fn seconds(
        &mut self,
        name: &'static str,
        default: u64,
        bounds: RangeInclusive<u64>,
    ) -> Result<Duration, ConfigError> {
        self.integer_in(name, default, bounds)
            .map(Duration::from_secs)
    }

    /// A secret out of a variable, the file that another variable names, or a systemd credential.
    fn secret(
        &mut self,
        name: &'static str,
        file_name: &'static str,
        credential: &str,
    ) -> Result<Option<Secret>, ConfigError> {
        let file = Self::variable(file_name)?.map(PathBuf::from);
        let credential = std::env::var_os("CREDENTIALS_DIRECTORY")
            .map(|directory| PathBuf::from(directory).join(credential))
            .filter(|path| path.exists());
        let (text, source) = match (Self::variable(name)?, file, credential) {
            (Some(_), Some(_), _) => {
                return Err(ConfigError(format!("set {name} or {file_name}, not both")));
            }
            (Some(text), None, _) => (text, Source::Environment),
            (None, Some(path), _) => (read(file_name, &path)?, Source::File(path)),
            (None, None, Some(path)) => (read(name, &path)?, Source::Credential),
            (None, None, None) => {
                self.record(name, "none".into(), Source::Default);
                return Ok(None);
            }
        };
        self.record(name, "…".into(), source);
        Ok(Some(Secret(text)))
    }

    fn jwt_secret(
        &mut self,
        name: &'static str,
        file_name: &'static str,
        credential: &str,
    ) -> Result<Option<Secret>, ConfigError> {
        let secret = self.secret(name, file_name, credential)?;
        match &secret {
            Some(Secret(text)) if text.len() < MIN_SECRET_BYTES => Err(ConfigError(format!(
                "{name} must have {MIN_SECRET_BYTES} bytes or more"
            ))),
            _ => Ok(secret),
        }
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// Refuses what the logger would ignore, and what would hide our errors: to the logger a word that
/// is no level is a target, and then everything else is off.
fn check_log_filter(filter: &str) -> Result<(), String> {
    let parsed = env_filter::Builder::new()
        .try_parse(filter)
        .map(|it| it.build());
    let parsed = parsed.map_err(|error| error.to_string())?;
    let directives = filter.split('/').next().unwrap_or_default().split(',');
    for directive in directives.map(str::trim).filter(|text| !text.is_empty()) {
        if !directive.contains('=') && directive.parse::<LevelFilter>().is_err() {
            return Err(format!(
                "“{directive}” is none of off, error, warn, info, debug and trace"
            ));
        }
    }
    let errors = Metadata::builder()
        .level(Level::Error)
        .target("todo_api")
        .build();
    if !parsed.enabled(&errors) && !filter.trim().eq_ignore_ascii_case("off") {
        return Err("it hides the errors of todo-api".into());
    }
    Ok(())
}

fn read(name: &str, path: &PathBuf) -> Result<String, ConfigError> {
    let text = fs::read_to_string(path)
        .map_err(|error| ConfigError(format!("{name}: cannot read {}: {error}", path.display())))?;
    Ok(text.trim().to_owned())
}

fn network(text: &str) -> Result<IpNet, String> {
    text.parse()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| format!("{text:?} is no address and no CIDR block like 10.0.0.0/8"))
}
