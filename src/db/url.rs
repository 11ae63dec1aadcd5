//! Parses `DATABASE_URL` as libpq does. Rejects a URL that libpq probably reads differently than
//! intended, for example with a raw `@` in the password.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use percent_encoding::percent_decode_str;
use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode};

use super::connect::Endpoint;
use super::tls::{self, Verification};

const EXAMPLE: &str = "must be a URL like postgres://user:password@host/database?sslmode=require";
/// The error if part of the URL may belong to the password.
const ENCODE: &str = "cannot be read reliably: percent-encode the password and other parts with special characters \
    (@ is %40, / is %2F, ? is %3F, : is %3A, & is %26, = is %3D, % is %25, a space is %20)";
/// The parameters that have an effect, all of them libpq's.
const PARAMETERS: &str = "\
    application_name channel_binding connect_timeout dbname host hostaddr keepalives \
    keepalives_count keepalives_idle keepalives_interval load_balance_hosts options password \
    port sslmode sslnegotiation sslrootcert target_session_attrs tcp_user_timeout user";
/// Parameters that libpq, Prisma, pgx, Rails, JDBC and hosting providers add, and that have no effect:
/// the service has its own pool, always uses UTF-8 and SNI, and never Kerberos.
const IGNORED: &str = "\
    ApplicationName client_encoding connection_limit fallback_application_name gssdelegation \
    gssencmode gsslib krbsrvname max_protocol_version min_protocol_version pgbouncer pool \
    pool_max_conns pool_min_conns pool_size pool_timeout prepareThreshold \
    prepared_statements socket_timeout sslcompression sslsni statement_cache_size supa \
    uselibpqcompat";

impl Endpoint {
    /// The server at `DATABASE_URL`; `root_certificates` is `PGSSLROOTCERT`. The error completes a
    /// sentence that begins with the variable's name, and contains no value of the URL except a file
    /// name.
    pub(crate) fn from_url(url: &str, root_certificates: Option<&str>) -> Result<Self, String> {
        let mut parameters = split(url)?;
        let sslmode = parameters.remove("sslmode");
        let root_certificates = parameters
            .remove("sslrootcert")
            .or(root_certificates.map(str::to_owned));
        let system_roots = root_certificates.as_deref() == Some("system");
        let (sslmode, verification) = match sslmode.as_deref() {
            None if system_roots => ("verify-full", Verification::Full),
            None | Some("prefer") => ("prefer", Verification::None),
            Some("disable") => ("disable", Verification::None),
            Some("allow") => ("allow", Verification::None),
            Some("require") => ("require", Verification::Full),
            Some("verify-ca") => ("verify-ca", Verification::Chain),
            Some("verify-full") => ("verify-full", Verification::Full),
            Some(_) => return Err("has an sslmode other than disable, allow, prefer, require, verify-ca or verify-full".into()),
        };
        if system_roots && verification != Verification::Full {
            return Err("has a weak sslmode with sslrootcert=system: use verify-full".into());
        }
        let roots = root_certificates
            .filter(|_| !system_roots)
            .map(|path| tls::read_roots(Path::new(&path)))
            .transpose()
            .map_err(|reason| format!("has an sslrootcert that {reason}"))?;
        let mut config = config(parameters)?;
        config.ssl_mode(match sslmode {
            "disable" => SslMode::Disable,
            // Unix sockets have no TLS.
            _ if config.get_hosts().iter().all(is_unix) => SslMode::Disable,
            "allow" | "prefer" => SslMode::Prefer,
            _ => SslMode::Require,
        });
        Ok(Self {
            tls: tls::connector(verification, roots)?,
            location: location(&config),
            sslmode: Some(sslmode),
            config,
        })
    }
}

/// The servers and the database without credentials: `host:port/database`.
fn location(config: &Config) -> String {
    let ports = config.get_ports();
    let hosts = config.get_hosts().iter().enumerate().map(|(n, host)| {
        let port = ports.get(n).or(ports.first()).unwrap_or(&5432);
        match host {
            Host::Tcp(name) if name.contains(':') => format!("[{name}]:{port}"),
            Host::Tcp(name) => format!("{name}:{port}"),
            Host::Unix(path) => format!("{}:{port}", path.display()),
        }
    });
    let hosts = hosts.collect::<Vec<_>>().join(",");
    let database = config.get_dbname().or(config.get_user());
    format!("{hosts}/{}", database.unwrap_or_default())
}

/// Splits a URL as libpq's `conninfo_uri_parse_options` does. The last value of a repeated parameter
/// wins.
fn split(url: &str) -> Result<BTreeMap<String, String>, String> {
    let rest = ["postgres://", "postgresql://"]
        .iter()
        .find_map(|scheme| url.strip_prefix(scheme))
        .ok_or(EXAMPLE)?;
    let (credentials, rest) = rest.split_once('@').unwrap_or(("", rest));
    // For libpq, the first `@` or `/` ends the credentials: part of a password that contains one would
    // become the host, the port, the database or a parameter.
    if rest.contains('@')
        || credentials.contains(['/', '?'])
        || url.contains(|c: char| c.is_whitespace() || c.is_control())
    {
        return Err(ENCODE.into());
    }
    let (address, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (netlocs, dbname) = address.split_once('/').unwrap_or((address, ""));
    let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
    let (mut hosts, mut ports) = (Vec::new(), Vec::new());
    for netloc in netlocs.split(',') {
        let (host, port) = match netloc.strip_prefix('[') {
            Some(bracketed) => bracketed
                .split_once(']')
                .filter(|(_, rest)| rest.is_empty() || rest.starts_with(':'))
                .map(|(host, rest)| (host, rest.strip_prefix(':').unwrap_or_default()))
                .ok_or("has an IPv6 address without its closing bracket")?,
            None => netloc.split_once(':').unwrap_or((netloc, "")),
        };
        hosts.push(host);
        ports.push(port);
    }
    let mut parameters = BTreeMap::from([
        ("user".to_owned(), decode(user)?),
        ("password".to_owned(), decode(password)?),
        ("host".to_owned(), decode(&hosts.join(","))?),
        ("port".to_owned(), decode(&ports.join(","))?),
        ("dbname".to_owned(), decode(dbname)?),
    ]);
    let has_word = |words: &str, word: &str| words.split(' ').any(|known| known == word);
    let mut follows_password = false;
    for pair in query.split_terminator('&') {
        let (name, value) = pair
            .split_once('=')
            .filter(|(_, value)| !value.contains('='))
            .ok_or(ENCODE)?;
        let (name, value) = (decode(name)?, decode(value)?);
        let (name, value) = match (&*name, &*value) {
            // From JDBC; libpq accepts it as well.
            ("ssl", "true") => ("sslmode", "require"),
            // Prisma's default, and the server's default.
            ("schema", "public") => continue,
            ("schema", _) => return Err("has a schema: use options=-csearch_path%3DNAME".into()),
            (name, value) if has_word(PARAMETERS, name) => (name, value),
            (name, _) if has_word(IGNORED, name) => continue,
            _ if follows_password => return Err(ENCODE.into()),
            (name, _) => return Err(format!("has the unsupported parameter {name}: remove it")),
        };
        follows_password |= name == "password";
        parameters.insert(name.to_owned(), value.to_owned());
    }
    Ok(parameters)
}

fn decode(text: &str) -> Result<String, String> {
    let is_hex = |rest: &str| {
        let hex = rest.as_bytes().get(..2);
        hex.is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit) && hex != b"00")
    };
    let decoded = percent_decode_str(text).decode_utf8();
    match decoded.ok().filter(|_| text.split('%').skip(1).all(is_hex)) {
        Some(decoded) => Ok(decoded.into_owned()),
        None => Err(ENCODE.into()),
    }
}

fn config(parameters: BTreeMap<String, String>) -> Result<Config, String> {
    // Detects a vanished server within a minute, even during a long migration.
    let mut text = "application_name=todo-api keepalives_idle=30 keepalives_interval=10 \
                    keepalives_retries=3"
        .to_owned();
    let mut user_timeout = Duration::from_secs(15);
    for (name, value) in parameters.iter().filter(|(_, value)| !value.is_empty()) {
        let (name, value) = match (&**name, &**value) {
            ("keepalives_count", value) => ("keepalives_retries", value),
            ("target_session_attrs", "primary") => ("target_session_attrs", "read-write"),
            ("target_session_attrs", value) if !["any", "read-write"].contains(&value) => {
                return Err("has a target_session_attrs other than any, read-write or primary: the service needs a primary".into());
            }
            // Milliseconds in libpq, seconds in tokio-postgres.
            ("tcp_user_timeout", value) => {
                let millis = value.parse();
                user_timeout = Duration::from_millis(
                    millis.map_err(|_| "has a tcp_user_timeout that is not a number")?,
                );
                continue;
            }
            pair => pair,
        };
        let quoted = value.replace('\\', r"\\").replace('\'', r"\'");
        // Writing to a string cannot fail.
        write!(text, " {name}='{quoted}'").ok();
    }
    // The error names the parameter and does not quote its value.
    let mut config: Config = text.parse().map_err(|error: tokio_postgres::Error| {
        let reason = error.source().map(ToString::to_string);
        format!(
            "has an {}",
            reason.unwrap_or_else(|| "invalid parameter".into())
        )
    })?;
    config.tcp_user_timeout(user_timeout);
    if config.get_hosts().is_empty() {
        for address in config.get_hostaddrs().to_vec() {
            config.host(address.to_string());
        }
    }
    let hosts = config.get_hosts();
    let has_name = |test: fn(&str) -> bool| {
        let mut hosts = hosts.iter();
        hosts.any(|host| matches!(host, Host::Tcp(name) if test(name)))
    };
    if hosts.is_empty() || has_name(str::is_empty) {
        return Err("names no host".into());
    }
    // The separators of the credentials were encoded as well.
    if has_name(|name| name.contains(['@', '/', '?', '#'])) {
        return Err(ENCODE.into());
    }
    let (addresses, ports) = (config.get_hostaddrs().len(), config.get_ports().len());
    if ![0, hosts.len()].contains(&addresses) || ![0, 1, hosts.len()].contains(&ports) {
        return Err("names different numbers of hosts, ports and addresses".into());
    }
    if config.get_ports().contains(&0) {
        return Err("has a port other than 1 to 65535".into());
    }
    Ok(config)
}

fn is_unix(host: &Host) -> bool {
    !matches!(host, Host::Tcp(_))
}
