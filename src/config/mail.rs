//! The settings of mail.

use lettre::Address;
use secrecy::ExposeSecret;
use url::Url;

use super::settings::EnvReader;
use crate::mail::SmtpServer;

/// How mail is sent, and where its links lead.
pub(crate) struct MailConfig {
    pub(crate) server: SmtpServer,
    pub(crate) from: Address,
    /// The name of the service.
    pub(crate) name: String,
    pub(crate) reset_url: String,
    pub(crate) verify_url: String,
}

/// Whether addresses are verified by mail.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum EmailVerification {
    Off,
    /// A mail is sent at registration, and the account can be used at once.
    Optional,
    /// A registration becomes an account when its address is verified.
    Required,
}

impl MailConfig {
    /// Reads the settings. Returns no mail settings if `SMTP_URL` is unset.
    pub(super) fn read(env: &mut EnvReader) -> Result<(Option<Self>, EmailVerification), String> {
        let url = env.secret("SMTP_URL")?;
        let from = env.text("MAIL_FROM")?.map(|from| from.parse::<Address>());
        let from = from.transpose();
        let from = from.map_err(|_| "MAIL_FROM must be an address like todo@example.com")?;
        let name = env.text("MAIL_NAME")?.unwrap_or_default();
        if name.contains(char::is_control) {
            return Err("MAIL_NAME must not contain control characters".into());
        }
        let public_url = read_url(env, "PUBLIC_URL")?;
        let reset_url = read_url(env, "APP_RESET_URL")?;
        let verify_url = read_url(env, "APP_VERIFY_URL")?;
        let default = if url.is_some() { "optional" } else { "off" };
        let verification: String = env.parsed_or("EMAIL_VERIFICATION", || default.to_owned())?;
        let verification = match (verification.as_str(), &url) {
            ("required", None) => {
                return Err("EMAIL_VERIFICATION=required is only possible with SMTP_URL".into());
            }
            ("required", Some(_)) => EmailVerification::Required,
            ("optional", Some(_)) => EmailVerification::Optional,
            _ => EmailVerification::Off,
        };
        let Some(url) = url else {
            return Ok((None, verification));
        };
        let from = from.ok_or("MAIL_FROM is required with SMTP_URL: the sender's address")?;
        let public_url = public_url
            .ok_or("PUBLIC_URL is required with SMTP_URL: where the service is reached, like https://todo.example.com")?;
        if !["http", "https"].contains(&public_url.scheme()) || public_url.query().is_some() {
            return Err("PUBLIC_URL must be like https://todo.example.com".into());
        }
        let server = SmtpServer::from_url(url.expose_secret(), public_url.host())
            .map_err(|reason| format!("SMTP_URL {reason}"))?;
        let base = public_url.as_str().trim_end_matches('/');
        let page = |own: Option<Url>, path| own.map_or(format!("{base}{path}"), String::from);
        let config = Self {
            server,
            from,
            name,
            reset_url: page(reset_url, "/account/reset"),
            verify_url: page(verify_url, "/account/verify"),
        };
        Ok((Some(config), verification))
    }
}

/// Reads the URL of a page to which `#token=…` is appended.
fn read_url(env: &mut EnvReader, name: &'static str) -> Result<Option<Url>, String> {
    let Some(text) = env.text(name)? else {
        return Ok(None);
    };
    let url = Url::parse(&text).ok();
    let url = url.filter(|url| url.has_host() && url.fragment().is_none() && url.username() == "");
    let invalid =
        || format!("{name} must be a URL without a fragment, like https://todo.example.com/page");
    url.map(Some).ok_or_else(invalid)
}
