//! Strict scanning of message heads in front of hyper, which accepts more than is safe.
//!
//! A proxy and this service must agree on where each request ends; otherwise a client can smuggle
//! a request past the proxy. The framer therefore flags heads with bare CR or LF line endings
//! (RFC 9112 section 2.2) or more than one Content-Length.

use std::sync::Arc;

use memchr::memchr2;

use crate::http::connection_state::ConnectionState;

const CONTENT_LENGTH: &[u8] = b"content-length:";

/// Tracks the requests on a connection and releases them to hyper one head at a time, because only
/// after hyper has parsed a head is it known whether a body or the next head follows.
pub(crate) struct RequestFramer {
    connection: Arc<ConnectionState>,
    state: FramingState,
}

/// The part of a request that the next byte belongs to.
enum FramingState {
    /// The head, or empty lines before it.
    Head(HeadScanner),
    /// Bytes after the head, held back because hyper has not parsed the head yet.
    AfterHead,
    /// The body, with this many bytes left.
    Body(u64),
    ChunkSize(ChunkSizeParser),
    /// A chunk and its line ending, with this many bytes left.
    Chunk(u64),
    Trailer(HeadScanner),
}

impl RequestFramer {
    pub(crate) fn new(connection: Arc<ConnectionState>) -> Self {
        Self {
            connection,
            state: FramingState::Head(HeadScanner::default()),
        }
    }

    /// Scans `bytes`, which must not be empty. Returns how many of them hyper may read now, at
    /// least one.
    pub(crate) fn advance(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            match &mut self.state {
                FramingState::Head(scanner) | FramingState::Trailer(scanner) => {
                    let Some(end) = scanner.feed(rest) else {
                        return bytes.len();
                    };
                    if scanner.malformed {
                        self.connection.set_malformed();
                    }
                    at += end;
                    if matches!(self.state, FramingState::Head(_)) {
                        self.connection.on_head();
                        self.state = FramingState::AfterHead;
                        return at;
                    }
                    self.state = FramingState::Head(HeadScanner::default());
                }
                FramingState::AfterHead => {
                    self.state = match self.connection.body_length() {
                        None => FramingState::ChunkSize(ChunkSizeParser::default()),
                        Some(0) => FramingState::Head(HeadScanner::default()),
                        Some(length) => FramingState::Body(length),
                    };
                }
                FramingState::Body(left) | FramingState::Chunk(left) => {
                    let count = (*left).min(rest.len() as u64);
                    *left -= count;
                    at += count as usize;
                    if *left == 0 {
                        self.state = match self.state {
                            FramingState::Body(_) => FramingState::Head(HeadScanner::default()),
                            _ => FramingState::ChunkSize(ChunkSizeParser::default()),
                        };
                    }
                }
                FramingState::ChunkSize(parser) => {
                    if let Some(size) = parser.feed(rest[0]) {
                        self.state = match size {
                            // The first line of a trailer section may be its last, empty one.
                            0 => FramingState::Trailer(HeadScanner {
                                started: true,
                                ..HeadScanner::default()
                            }),
                            size => FramingState::Chunk(size.saturating_add(2)),
                        };
                    }
                    at += 1;
                }
            }
        }
        at
    }

    /// Whether a head has begun but not ended.
    pub(crate) fn is_in_head(&self) -> bool {
        matches!(&self.state, FramingState::Head(scanner) if scanner.started)
    }
}

/// Finds the end of a head, and detects malformed lines in it.
#[derive(Default)]
struct HeadScanner {
    started: bool,
    /// The number of bytes scanned of the current line.
    line: usize,
    /// How many bytes of the line match `content-length:`.
    matched: usize,
    has_content_length: bool,
    after_cr: bool,
    malformed: bool,
}

impl HeadScanner {
    /// Scans up to the end of the head. Returns the position of the end if it is in `bytes`.
    fn feed(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            let after_cr = std::mem::replace(&mut self.after_cr, byte == b'\r');
            self.malformed |= after_cr != (byte == b'\n');
            match byte {
                b'\n' => {
                    at += 1;
                    let is_empty = self.line == 0;
                    (self.line, self.matched) = (0, 0);
                    // Empty lines before a head are ignored (RFC 9112 section 2.2).
                    if is_empty && self.started {
                        return Some(at);
                    }
                }
                b'\r' => at += 1,
                _ => {
                    self.started = true;
                    let rest = &bytes[at..];
                    let text = &rest[..memchr2(b'\r', b'\n', rest).unwrap_or(rest.len())];
                    self.match_content_length(text);
                    self.line += text.len();
                    at += text.len();
                }
            }
        }
        None
    }

    /// Compares `text`, the next part of the current line, with `content-length:`.
    fn match_content_length(&mut self, text: &[u8]) {
        if self.matched != self.line {
            return;
        }
        let rest = CONTENT_LENGTH[self.matched..].iter();
        let pairs = rest.zip(text);
        let count = pairs.take_while(|(a, b)| a.eq_ignore_ascii_case(b)).count();
        self.matched += count;
        if count > 0 && self.matched == CONTENT_LENGTH.len() {
            self.malformed |= self.has_content_length;
            self.has_content_length = true;
        }
    }
}

/// Parses a chunk-size line (RFC 9112 section 7.1). hyper rejects malformed sizes.
#[derive(Default)]
struct ChunkSizeParser {
    size: u64,
    in_extension: bool,
}

impl ChunkSizeParser {
    /// Returns the chunk size at the end of the line.
    fn feed(&mut self, byte: u8) -> Option<u64> {
        match char::from(byte).to_digit(16) {
            _ if byte == b'\n' => return Some(self.size),
            Some(digit) if !self.in_extension => {
                self.size = self.size.saturating_mul(16).saturating_add(digit.into());
            }
            _ => self.in_extension = true,
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Feeds `stream` in pieces. Returns where each head ends and whether it is malformed.
    fn heads(stream: &[u8], pieces: &[usize], body_length: Option<u64>) -> Vec<(usize, bool)> {
        let connection = Arc::<ConnectionState>::default();
        let mut framer = RequestFramer::new(connection.clone());
        connection.set_body_length(body_length);
        let mut heads = Vec::new();
        let (mut at, mut pieces) = (0, pieces.iter().cycle());
        while at < stream.len() {
            let piece = pieces.next().map_or(1, |piece| *piece);
            let mut rest = &stream[at..stream.len().min(at + piece)];
            while !rest.is_empty() {
                let count = framer.advance(rest);
                assert!(0 < count && count <= rest.len());
                at += count;
                rest = &rest[count..];
                if matches!(framer.state, FramingState::AfterHead) {
                    heads.push((at, connection.take_malformed()));
                }
            }
        }
        heads
    }

    proptest! {
        #[test]
        fn framing_does_not_depend_on_how_the_stream_is_split(
            stream in "(GET / HTTP/1.1|Content-Length: 1|[0-9a-f]{1,2}|a: b|\r\n|\r\n|\r\n\r\n|\r|\n){0,40}",
            pieces in prop::collection::vec(1_usize..9, 1..9),
            body_length in prop_oneof![Just(Some(0)), (1_u64..9).prop_map(Some), Just(None)],
        ) {
            let stream = stream.as_bytes();
            let whole = heads(stream, &[stream.len().max(1)], body_length);
            prop_assert_eq!(heads(stream, &pieces, body_length), whole);
        }
    }
}
