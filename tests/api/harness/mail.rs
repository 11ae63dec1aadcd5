//! A mail server that records the mails it receives.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use tokio::sync::OnceCell;

use super::{Server, User, claims, until};

/// The `PUBLIC_URL` of servers that send mail.
pub(crate) const PUBLIC_URL: &str = "https://todo.example/under";

/// A mail server on the loopback address. It runs on threads of its own, so that tests can share it.
#[derive(Clone)]
pub(crate) struct MailServer {
    url: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    mails: Vec<Mail>,
    /// The replies to the next mails. All later mails are accepted.
    replies: VecDeque<&'static str>,
    /// The number of mails that were offered, and of connections.
    offered: usize,
    connections: usize,
    delay: Duration,
    ignores_quit: bool,
}

/// A received mail.
#[derive(Clone, Debug)]
pub(crate) struct Mail {
    pub(crate) to: String,
    /// The header and the body, whose quoted-printable encoding is decoded.
    pub(crate) text: String,
}

impl Mail {
    /// Returns the value of a header field, which must exist once.
    pub(crate) fn header(&self, name: &str) -> &str {
        let header = self.text.split("\r\n\r\n").next().unwrap();
        let mut fields = header.lines().filter_map(|line| line.split_once(": "));
        let mut values = fields.by_ref().filter(|(field, _)| *field == name);
        let (_, value) = values
            .next()
            .unwrap_or_else(|| panic!("no {name}: {self:?}"));
        assert!(values.next().is_none(), "repeated {name}: {self:?}");
        value
    }

    /// Returns the link in the plain text.
    pub(crate) fn link(&self) -> &str {
        let mut lines = self.text.lines();
        let link = lines.find(|line| line.contains("#token="));
        link.unwrap_or_else(|| panic!("no link: {self:?}"))
    }

    pub(crate) fn token(&self) -> String {
        self.link().split_once("#token=").unwrap().1.to_owned()
    }
}

impl MailServer {
    pub(crate) fn start() -> MailServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("smtp://{}", listener.local_addr().unwrap());
        let state = Arc::<Mutex<State>>::default();
        let server = MailServer {
            url,
            state: state.clone(),
        };
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = state.clone();
                state.lock().unwrap().connections += 1;
                thread::spawn(move || converse(stream, &state));
            }
        });
        server
    }

    /// Returns the variables of a server that sends its mail here.
    pub(crate) fn variables(&self) -> [(&'static str, &str); 3] {
        [
            ("SMTP_URL", &self.url),
            ("MAIL_FROM", "todo@todo.example"),
            ("PUBLIC_URL", PUBLIC_URL),
        ]
    }

    /// Answers the next mails with these replies.
    pub(crate) fn reply(&self, replies: &[&'static str]) {
        self.state.lock().unwrap().replies.extend(replies);
    }

    /// Accepts each mail only after this time.
    pub(crate) fn delay(&self, delay: Duration) {
        self.state.lock().unwrap().delay = delay;
    }

    /// Leaves the command QUIT without a reply.
    pub(crate) fn ignore_quit(&self) {
        self.state.lock().unwrap().ignores_quit = true;
    }

    /// Returns how many mails were offered, refused ones included, and how many connections were made.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let state = self.state.lock().unwrap();
        (state.offered, state.connections)
    }

    /// Returns the mails to this address so far.
    pub(crate) fn received(&self, to: &str) -> Vec<Mail> {
        let state = self.state.lock().unwrap();
        let mails = state.mails.iter().filter(|mail| mail.to == to);
        mails.cloned().collect()
    }

    /// Waits for a token that was issued for this user, in a link to this page.
    pub(crate) async fn token_of(&self, user: &User, page: &str) -> String {
        let mut found = None;
        until("a mail with a token", async || {
            let mails = self.received(&user.email);
            let links = mails
                .iter()
                .filter(|mail| mail.text.contains(&format!("{page}#token=")));
            let mut tokens = links.map(Mail::token);
            found = tokens.find(|token| claims(token)["sub"] == user.id.as_str());
            found.is_some()
        })
        .await;
        found.unwrap()
    }

    /// Waits until this address has received `count` mails, and returns the last one.
    pub(crate) async fn nth(&self, to: &str, count: usize) -> Mail {
        self.nth_about(to, "", count).await
    }

    /// Like [`MailServer::nth`], but counts only mails with this text in their subject. Mails that are
    /// sent within milliseconds may arrive in any order.
    pub(crate) async fn nth_about(&self, to: &str, subject: &str, count: usize) -> Mail {
        let mut found = None;
        until("a mail", async || {
            let mails = self.received(to).into_iter();
            let mut mails = mails.filter(|mail| mail.header("Subject").contains(subject));
            found = mails.nth(count - 1);
            found.is_some()
        })
        .await;
        found.unwrap()
    }
}

/// Decodes the quoted-printable encoding of ASCII text: soft line breaks, and `=XX` for a character.
fn decode(text: &str) -> String {
    let mut parts = text.split('=');
    let mut decoded = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.strip_prefix("\r\n") {
            Some(rest) => decoded += rest,
            None => match u8::from_str_radix(part.get(..2).unwrap_or_default(), 16) {
                Ok(code) => decoded += &format!("{}{}", char::from(code), &part[2..]),
                Err(_) => decoded += &format!("={part}"),
            },
        }
    }
    decoded
}

/// Speaks SMTP on one connection.
fn converse(mut stream: TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let mut reply = |text: &str| stream.write_all(format!("{text}\r\n").as_bytes()).ok();
    let mut to = String::new();
    reply("220 recorder.example ESMTP")?;
    while let Some(Ok(line)) = lines.next() {
        let command = line.get(..4).unwrap_or_default().to_ascii_uppercase();
        match command.as_str() {
            "EHLO" => reply("250-recorder.example\r\n250-8BITMIME\r\n250 SMTPUTF8")?,
            "RCPT" => {
                to = line.split(['<', '>']).nth(1)?.to_owned();
                reply("250 OK")?;
            }
            "DATA" => {
                reply("354 Go ahead")?;
                let mut text = String::new();
                for line in lines.by_ref().map_while(Result::ok) {
                    if line == "." {
                        break;
                    }
                    text += line.strip_prefix('.').unwrap_or(&line);
                    text += "\r\n";
                }
                thread::sleep(state.lock().unwrap().delay);
                let answer = {
                    let mut state = state.lock().unwrap();
                    state.offered += 1;
                    let answer = state.replies.pop_front().unwrap_or("250 Queued");
                    if answer.starts_with('2') {
                        let (to, text) = (to.clone(), decode(&text));
                        state.mails.push(Mail { to, text });
                    }
                    answer
                };
                reply(answer)?;
            }
            "QUIT" if state.lock().unwrap().ignores_quit => {}
            "QUIT" => return reply("221 Bye"),
            _ => reply("250 OK")?,
        }
    }
    None
}

impl Server {
    /// Starts a server that sends its mail to a new mail server.
    pub(crate) async fn with_mail(variables: &[(&str, &str)]) -> (Server, MailServer) {
        let mails = MailServer::start();
        let variables = [&mails.variables(), variables].concat();
        (Server::with(&variables).await, mails)
    }

    /// Like [`Server::shared`], but sends mail.
    pub(crate) async fn shared_with_mail() -> &'static (Server, MailServer) {
        static SHARED: OnceCell<(Server, MailServer)> = OnceCell::const_new();
        SHARED
            .get_or_init(|| Server::with_mail(&[("DB_POOL_SIZE", "20")]))
            .await
    }
}
