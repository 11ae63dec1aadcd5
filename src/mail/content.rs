//! The texts of the mails.

use lettre::message::header::{HeaderName, HeaderValue};
use lettre::message::{Mailbox, MultiPart};
use lettre::{Address, Message};
use url::Host;
use url::quirks::domain_to_unicode;
use uuid::Uuid;

use crate::auth::mail_token::MailTokens;
use crate::config::MailConfig;
use crate::db::users::StoredAccount;

/// A mail to be sent.
pub(crate) enum Mail {
    PasswordReset(StoredAccount),
    /// Verifies the address of an account.
    Verification(StoredAccount),
    /// Verifies the new address of an account; `session` asked for the change.
    AddressChange {
        account: StoredAccount,
        email: String,
        session: Uuid,
    },
    /// Tells the present address that a change was requested. Does not contain the new address, which
    /// may look like a link: the present address may belong to someone else if it is not verified.
    ChangeNotice(String),
    /// Tells this address that it has an account already.
    AlreadyRegistered(String),
}

/// The subject, the text before the link, the text after it, and the label of the link.
type Texts = [&'static str; 4];

const PASSWORD_RESET: Texts = [
    "reset your password",
    "Someone asked for a new password for your account at {name}. To choose one, open this link within 30 minutes:",
    "If it was not you, ignore this mail. Your password has not changed.",
    "Choose a new password",
];
const VERIFICATION: Texts = [
    "confirm your e-mail address",
    "Someone registered at {name} with this address. To confirm that it was you, open this link within 24 hours:",
    "If it was not you, ignore this mail.",
    "Confirm the address",
];
const ADDRESS_CHANGE: Texts = [
    "confirm your new e-mail address",
    "Someone asked to use this address for an account at {name}. To confirm the change, open this link within 24 hours:",
    "If it was not you, ignore this mail.",
    "Confirm the new address",
];
const CHANGE_NOTICE: Texts = [
    "your e-mail address is about to change",
    "Someone who knows your password asked to change the address of your account at {name}. The address changes when the link in a mail to the new address is opened.",
    "If it was not you, change your password now: the link then no longer works. If the address has already changed, contact the operator of the service.",
    "",
];
const ALREADY_REGISTERED: Texts = [
    "you already have an account",
    "Someone tried to register at {name} with this address, which already has an account. Nothing has changed.",
    "If it was you, sign in, or ask for a new password if you have forgotten yours. If it was not you, ignore this mail.",
    "",
];

impl Mail {
    /// Composes the message. Fails if the address cannot receive mail.
    pub(super) fn compose(
        &self,
        config: &MailConfig,
        tokens: &MailTokens,
    ) -> Result<Message, String> {
        let (texts, to, link) = match self {
            Self::PasswordReset(account) => {
                let token = tokens.reset.issue(account, &account.email, None);
                let link = Some((&config.reset_url, token));
                (PASSWORD_RESET, &account.email, link)
            }
            Self::Verification(account) => {
                let token = tokens.verification.issue(account, &account.email, None);
                let link = Some((&config.verify_url, token));
                (VERIFICATION, &account.email, link)
            }
            Self::AddressChange {
                account,
                email,
                session,
            } => {
                let token = tokens.verification.issue(account, email, Some(*session));
                (ADDRESS_CHANGE, email, Some((&config.verify_url, token)))
            }
            Self::ChangeNotice(to) => (CHANGE_NOTICE, to, None),
            Self::AlreadyRegistered(to) => (ALREADY_REGISTERED, to, None),
        };
        let url = match link {
            Some((page, Ok(token))) => Some(format!("{page}#token={token}")),
            Some((_, Err(error))) => return Err(format!("{error:?}")),
            None => None,
        };
        let [subject, before, after, label] = texts;
        let (name, from) = (&config.name, &config.from);
        let before = before.replace("{name}", name);
        let link_text = url
            .as_ref()
            .map_or(String::new(), |url| format!("{url}\n\n"));
        let text = format!("{before}\n\n{link_text}{after}\n\n-- \n{name}\n");
        let link_html = url.map_or(String::new(), |url| {
            format!("<p><a href=\"{}\">{label}</a></p>\n", escape(&url))
        });
        let (before, signature) = (escape(&before), escape(name));
        let html = format!(
            "<!doctype html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><title>{subject}</title></head>\n\
             <body>\n<p>{before}</p>\n{link_html}<p>{after}</p>\n<p>{signature}</p>\n</body>\n</html>\n"
        );
        let to = parse_recipient(to).ok_or("the address cannot receive mail")?;
        // RFC 3834: prevents vacation notices in reply.
        let auto_submitted = HeaderName::new_from_ascii_str("Auto-Submitted");
        let message = Message::builder()
            .message_id(Some(format!("<{}@{}>", Uuid::new_v4(), from.domain())))
            .raw_header(HeaderValue::new(auto_submitted, "auto-generated".into()))
            .from(Mailbox::new(Some(name.clone()), from.clone()))
            .to(Mailbox::new(None, to))
            .subject(format!("{name}: {subject}"))
            .multipart(MultiPart::alternative_plain_html(text, html));
        message.map_err(|error| error.to_string())
    }
}

/// Parses an address. Its domain becomes ASCII, so that only a local part beyond ASCII requires a
/// server that supports SMTPUTF8. Returns `None` for another spelling of a domain, such as `ex%61mple.com`,
/// because a mailbox would have a quota for each spelling.
fn parse_recipient(email: &str) -> Option<Address> {
    let (local, domain) = email.rsplit_once('@')?;
    let ascii = match Host::parse(domain) {
        Ok(Host::Domain(ascii)) => ascii,
        _ => domain.to_owned(),
    };
    let is_usual = domain == ascii || domain == domain_to_unicode(&ascii);
    Address::new(local, ascii).ok().filter(|_| is_usual)
}

fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    text.replace('>', "&gt;").replace('"', "&quot;")
}
