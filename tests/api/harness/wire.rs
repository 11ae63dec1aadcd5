//! A connection on which tests write and read HTTP as bytes.

use std::{net::SocketAddr, time::Duration};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use super::Server;

/// A connection over which a test sends arbitrary bytes.
pub(crate) struct Wire {
    stream: TcpStream,
    read: Vec<u8>,
    timeout: Duration,
}

/// A response. `head` includes the status line; header names are in lower case.
#[derive(Debug)]
pub(crate) struct WireResponse {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl WireResponse {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head
            .lines()
            .skip(1)
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("a JSON body")
    }
}

impl Wire {
    pub(crate) async fn open(server: &Server) -> Wire {
        Wire::connect(server.addr()).await
    }

    pub(crate) async fn connect(address: SocketAddr) -> Wire {
        Wire::over(TcpStream::connect(address).await.expect("a connection"))
    }

    /// Connects from this address of the machine.
    pub(crate) async fn connect_from(source: [u8; 4], address: SocketAddr) -> Wire {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind((source, 0).into()).expect("an address");
        Wire::over(socket.connect(address).await.expect("a connection"))
    }

    fn over(stream: TcpStream) -> Wire {
        stream.set_nodelay(true).expect("a socket option");
        Wire {
            stream,
            read: Vec::new(),
            timeout: Duration::from_secs(10),
        }
    }

    /// Waits for responses for up to a minute, for tests of the server's timeouts.
    pub(crate) fn with_long_timeout(mut self) -> Wire {
        self.timeout = Duration::from_secs(60);
        self
    }

    /// Sends `bytes`. Ignores errors, because the server may have closed the connection.
    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.stream.write_all(bytes.as_ref()).await;
    }

    /// Closes the sending half of the connection.
    pub(crate) async fn finish(&mut self) {
        let _ = self.stream.shutdown().await;
    }

    /// Reads the next response.
    pub(crate) async fn response(&mut self) -> WireResponse {
        self.next(true).await.expect("a response")
    }

    /// Reads the next response; `None` if the server closes the connection instead.
    pub(crate) async fn response_or_close(&mut self) -> Option<WireResponse> {
        self.next(true).await
    }

    /// Reads the response to a HEAD request, which has no body.
    pub(crate) async fn response_to_head(&mut self) -> WireResponse {
        self.next(false).await.expect("a response")
    }

    /// Whether the server closes the connection without sending anything more.
    pub(crate) async fn is_closed(&mut self) -> bool {
        self.read.is_empty() && !self.more().await && self.read.is_empty()
    }

    /// Reads the next response, with a body if `has_body`; `None` if the connection is closed.
    pub(crate) async fn next(&mut self, has_body: bool) -> Option<WireResponse> {
        let end = loop {
            if let Some(at) = self.read.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            if !self.more().await {
                let rest = String::from_utf8_lossy(&self.read);
                assert!(rest.is_empty(), "incomplete response: {rest}");
                return None;
            }
        };
        let head: Vec<u8> = self.read.drain(..end).collect();
        let head: Vec<String> = String::from_utf8(head)
            .expect("a head in ASCII")
            .lines()
            .map(|line| match line.split_once(": ") {
                Some((name, value)) => format!("{}: {value}", name.to_lowercase()),
                None => line.to_owned(),
            })
            .collect();
        let status = head[0]
            .split(' ')
            .nth(1)
            .expect("a status line")
            .parse()
            .expect("a status");
        let mut response = WireResponse {
            status,
            head: head.join("\n"),
            body: String::new(),
        };
        let length = response
            .header("content-length")
            .map_or(0, |n| n.parse().expect("a length"));
        if has_body && status >= 200 && status != 204 && status != 304 {
            while self.read.len() < length {
                assert!(self.more().await, "incomplete body after {}", response.head);
            }
            response.body = String::from_utf8(self.read.drain(..length).collect()).expect("text");
        }
        Some(response)
    }

    /// Whether bytes arrive within this time.
    pub(crate) async fn is_readable(&self, within: Duration) -> bool {
        timeout(within, self.stream.readable()).await.is_ok()
    }

    /// Reads more bytes. Returns false once the server has closed the connection.
    async fn more(&mut self) -> bool {
        let mut bytes = [0; 16 * 1024];
        let read = timeout(self.timeout, self.stream.read(&mut bytes)).await;
        // A reset also closes the connection.
        let count = read
            .expect("neither a response nor a close within the timeout")
            .unwrap_or(0);
        self.read.extend_from_slice(&bytes[..count]);
        count > 0
    }
}

/// Formats a request's head. `more` contains further header lines.
pub(crate) fn head(method: &str, target: &str, token: Option<&str>, more: &str) -> String {
    let bearer = token.map_or(String::new(), |token| {
        format!("Authorization: Bearer {token}\r\n")
    });
    format!("{method} {target} HTTP/1.1\r\nHost: todo.example\r\n{bearer}{more}\r\n")
}
