//! The mail server at `SMTP_URL`, and connections to it.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use lettre::transport::smtp::Error;
use lettre::transport::smtp::authentication::{Credentials, DEFAULT_MECHANISMS};
use lettre::transport::smtp::client::{AsyncSmtpConnection, Tls, TlsParameters};
use lettre::transport::smtp::extension::ClientId;
use percent_encoding::percent_decode_str;
use tokio::time::timeout;
use url::{Host, Url};

use crate::telemetry::labels::MailOutcome;

/// How long to wait for the reply to QUIT. The mails have been accepted by then.
const QUIT_TIMEOUT: Duration = Duration::from_secs(2);

/// The mail server, and how to connect to it.
pub(crate) struct SmtpServer {
    host: String,
    port: u16,
    tls: Tls,
    credentials: Option<Credentials>,
    hello_name: ClientId,
}

impl SmtpServer {
    /// The server at `SMTP_URL`. `client_host` is the host of the service, whose name a client sends when
    /// it connects. The error completes a sentence that begins with the variable's name, and contains no
    /// value of the URL.
    pub(crate) fn from_url(url: &str, client_host: Option<Host<&str>>) -> Result<Self, String> {
        const EXAMPLE: &str = "must be a URL like smtps://user:password@host:465 or \
                               smtp://user:password@host:587, with user and password percent-encoded";
        let url = Url::parse(url).map_err(|_| EXAMPLE)?;
        let host = url.host_str().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let has_more = !["", "/"].contains(&url.path()) || url.query().is_some();
        if host.is_empty() || has_more || url.fragment().is_some() {
            return Err(EXAMPLE.into());
        }
        let is_loopback = host
            .parse()
            .is_ok_and(|address: IpAddr| address.is_loopback());
        let tls = || {
            TlsParameters::new(host.to_owned()).map_err(|error| format!("cannot use TLS: {error}"))
        };
        let (tls, default_port) = match url.scheme() {
            "smtps" => (Tls::Wrapper(tls()?), 465),
            "smtp" if is_loopback => (Tls::None, 25),
            "smtp" if host == "localhost" => (Tls::Opportunistic(tls()?), 25),
            "smtp" => (Tls::Required(tls()?), 587),
            _ => return Err(EXAMPLE.into()),
        };
        let decode = |text| percent_decode_str(text).decode_utf8().map(String::from);
        let credentials = match (decode(url.username()), url.password().map(decode)) {
            (Ok(user), None) if user.is_empty() => None,
            (Ok(user), Some(Ok(password))) => Some(Credentials::new(user, password)),
            _ => return Err(EXAMPLE.into()),
        };
        Ok(Self {
            host: host.to_owned(),
            port: url.port().unwrap_or(default_port),
            tls,
            credentials,
            hello_name: match client_host {
                Some(Host::Domain(name)) => ClientId::Domain(name.to_owned()),
                Some(Host::Ipv4(address)) => ClientId::Ipv4(address),
                Some(Host::Ipv6(address)) => ClientId::Ipv6(address),
                None => ClientId::Ipv4(Ipv4Addr::LOCALHOST),
            },
        })
    }

    /// Connects, greets and authenticates. Has no timeout.
    pub(crate) async fn connect(&self) -> Result<AsyncSmtpConnection, Error> {
        let (address, hello_name) = ((self.host.as_str(), self.port), &self.hello_name);
        let (implicit, starttls) = match &self.tls {
            Tls::Wrapper(tls) => (Some(tls.clone()), None),
            Tls::Opportunistic(tls) | Tls::Required(tls) => (None, Some(tls.clone())),
            Tls::None => (None, None),
        };
        let is_optional = matches!(self.tls, Tls::Opportunistic(_));
        let connection =
            AsyncSmtpConnection::connect_tokio1(address, None, hello_name, implicit, None);
        let mut connection = connection.await?;
        // Fails if the server does not offer STARTTLS.
        if let Some(tls) = starttls.filter(|_| !is_optional || connection.can_starttls()) {
            connection.starttls(tls, hello_name).await?;
        }
        if let Some(credentials) = &self.credentials {
            connection.auth(DEFAULT_MECHANISMS, credentials).await?;
        }
        Ok(connection)
    }

    /// The host and the port, without the credentials.
    pub(crate) fn location(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    pub(crate) fn has_credentials(&self) -> bool {
        self.credentials.is_some()
    }
}

/// Ends a connection, even if the server does not reply.
pub(crate) async fn quit(mut connection: AsyncSmtpConnection) {
    timeout(QUIT_TIMEOUT, connection.quit()).await.ok();
}

/// Classifies a failed attempt to send a mail.
pub(super) fn classify(error: &Error) -> MailOutcome {
    if error.is_permanent() {
        MailOutcome::Rejected
    } else if error.is_transient() {
        MailOutcome::Deferred
    } else if error.is_client() {
        // The server lacks STARTTLS, a way to authenticate, or SMTPUTF8.
        MailOutcome::Unsupported
    } else {
        MailOutcome::Unreachable
    }
}
