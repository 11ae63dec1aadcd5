//! The configuration, read from the environment. An invalid setting is an error that names the
//! variable and the values it accepts, and contains no secret.

mod mail;
mod origin;
mod settings;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use secrecy::{ExposeSecret, SecretString};

use crate::db::Endpoint;
use crate::db::tls::read_roots;
use crate::domain::TokenLifetimes;
use crate::embedded_postgres;
use crate::telemetry::logging;

pub(crate) use mail::{EmailVerification, MailConfig};
use origin::normalize_origin;
pub(crate) use settings::help;
use settings::{EnvReader, ReportLine};

pub(crate) struct Config {
    /// The server at `DATABASE_URL`; `None` for an embedded PostgreSQL in `data_dir`.
    pub(crate) server: Option<Endpoint>,
    pub(crate) data_dir: PathBuf,
    /// `None` only with an embedded PostgreSQL, whose directory then contains the secret.
    pub(crate) jwt_secret: Option<SecretString>,
    pub(crate) jwt_secret_previous: Option<SecretString>,
    pub(crate) listen_addr: SocketAddr,
    pub(crate) metrics_addr: Option<SocketAddr>,
    pub(crate) cors_origins: Vec<String>,
    pub(crate) trusted_proxies: Vec<IpNet>,
    pub(crate) db_pool_size: u32,
    pub(crate) registration_open: bool,
    pub(crate) auth_rate_per_minute: u32,
    pub(crate) bcrypt_cost: u32,
    pub(crate) writes_per_minute: u32,
    pub(crate) max_tasks_per_user: i32,
    pub(crate) lifetimes: TokenLifetimes,
    pub(crate) wait_max: u32,
    /// `None` if no mail is sent.
    pub(crate) mail: Option<MailConfig>,
    pub(crate) email_verification: EmailVerification,
    pub(crate) log_filter: String,
    /// The value and the source of each setting; secrets are hidden.
    pub(crate) report: Vec<ReportLine>,
}

impl Config {
    /// Reads the process environment. Errors are a single line for the operator.
    pub(crate) fn from_env() -> Result<Self, String> {
        let mut env = EnvReader::default();
        let url = env.secret("DATABASE_URL")?;
        let data_dir = env.text_or("DATA_DIR", || {
            embedded_postgres::default_data_dir().display().to_string()
        })?;
        let root_certificates = env.text("PGSSLROOTCERT")?;
        // Checked even if no connection uses TLS, because a wrong path is always a mistake.
        if let Some(path) = root_certificates.as_ref().filter(|path| *path != "system") {
            read_roots(Path::new(path)).map_err(|reason| format!("PGSSLROOTCERT {reason}"))?;
        }
        let server = url
            .map(|url| Endpoint::from_url(url.expose_secret(), root_certificates.as_deref()))
            .transpose()
            .map_err(|reason| format!("DATABASE_URL {reason}"))?;
        let jwt_secret = env.secret("JWT_SECRET")?;
        if jwt_secret.is_none() && server.is_some() {
            return Err("JWT_SECRET is required with DATABASE_URL: 32 bytes or more, for example from `openssl rand -hex 32`".into());
        }
        let mut seconds = |name| env.parsed(name).map(Duration::from_secs);
        let mut lifetimes = TokenLifetimes {
            access: seconds("ACCESS_TOKEN_TTL")?,
            refresh_idle: seconds("REFRESH_TOKEN_IDLE_TTL")?,
            refresh_max: seconds("REFRESH_TOKEN_MAX_TTL")?,
            refresh_grace: seconds("REFRESH_TOKEN_GRACE")?,
        };
        lifetimes.refresh_idle = lifetimes.refresh_idle.min(lifetimes.refresh_max);
        let (mail, email_verification) = MailConfig::read(&mut env)?;
        let config = Self {
            server,
            data_dir: data_dir.unwrap_or_default().into(),
            jwt_secret,
            jwt_secret_previous: env.secret("JWT_SECRET_PREVIOUS")?,
            listen_addr: env.parsed("LISTEN_ADDR")?,
            metrics_addr: env.parsed_if_set("METRICS_ADDR")?,
            cors_origins: env.list("CORS_ORIGINS", normalize_origin)?,
            trusted_proxies: env.list("TRUSTED_PROXIES", parse_network)?,
            db_pool_size: env.parsed("DB_POOL_SIZE")?,
            registration_open: env.parsed::<String>("REGISTRATION")? == "open",
            auth_rate_per_minute: env.parsed_or("AUTH_RATE_PER_MINUTE", default_auth_rate)?,
            bcrypt_cost: env.parsed("BCRYPT_COST")?,
            writes_per_minute: env.parsed("WRITES_PER_MINUTE")?,
            max_tasks_per_user: env.parsed("MAX_TASKS_PER_USER")?,
            lifetimes,
            wait_max: env.parsed("WAIT_MAX")?,
            mail,
            email_verification,
            log_filter: env.parsed("RUST_LOG")?,
            report: env.report,
        };
        logging::check_filter(&config.log_filter)
            .map_err(|reason| format!("RUST_LOG must be like info,access=debug: {reason}"))?;
        Ok(config)
    }
}

/// 100 a minute for each core, which is less than the hashing threads can do at a cost of 12.
fn default_auth_rate() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (100 * cores).to_string()
}

fn parse_network(text: &str) -> Result<IpNet, String> {
    text.parse()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| format!("{text:?} is not an IP address or a CIDR block like 10.0.0.0/8"))
}
