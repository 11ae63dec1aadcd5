//! A client's socket as hyper sees it, with the bounds that hyper leaves to us: a clock for an
//! idle connection, for a head that comes in drops, and for an answer that nobody reads; a strict
//! look at the head's line ends; and a last read before closing, so that an early answer is not
//! lost to a reset.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::{Body as _, Incoming};
use memchr::memchr2;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep_until};

/// A head, from its first byte (for the first one: from the connection) to its end.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two requests: longer than the usual proxies keep an idle connection (Caddy 120 s, nginx
/// and most load balancers 60 s), so that none sends a request into a connection being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(150);
/// An answer, from the first time that the socket takes no more of it.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// What a client may still send, and for how long, to a connection that we have closed for writing.
const LINGER_TIMEOUT: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 8 * 1024 * 1024;

/// What the service, the socket of a connection and the table of connections share.
#[derive(Default)]
pub(crate) struct ConnectionState {
    /// Since when no request is under way, in microseconds; 0 while one is.
    idle_since: AtomicU64,
    evicted: Notify,
    /// A request has come.
    used: AtomicBool,
    /// A request is under way: from the end of its head until its response is written.
    busy: AtomicBool,
    /// Its answer is made; what remains is writing it.
    answered: AtomicBool,
    /// The length of its body; `u64::MAX` where it comes in chunks.
    body: AtomicU64,
    /// The head broke a rule that hyper does not check.
    malformed: AtomicBool,
}

impl ConnectionState {
    /// No request has come yet.
    pub(crate) fn is_unused(&self) -> bool {
        !self.used.load(Ordering::Relaxed)
    }

    /// A request has arrived. Gives what is wrong with the form of its head.
    pub(crate) fn on_request(&self, body: &Incoming) -> Option<&'static str> {
        self.used.store(true, Ordering::Relaxed);
        self.answered.store(false, Ordering::Relaxed);
        self.body.store(
            body.size_hint().exact().unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
        let malformed = self.malformed.swap(false, Ordering::Relaxed);
        malformed.then_some(
            "a line of the head ends in a bare CR or LF, or Content-Length is there twice",
        )
    }

    /// Its answer is made.
    pub(crate) fn on_response(&self) {
        self.answered.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.idle_since.load(Ordering::Relaxed) > 0
    }

    /// For how long no request has been under way; `None` while one is, from its first byte.
    pub(crate) fn idle_time(&self) -> Option<Duration> {
        let since = self.idle_since.load(Ordering::Relaxed);
        (since > 0).then(|| Duration::from_micros(uptime().saturating_sub(since)))
    }

    fn set_idle(&self, idle: bool) {
        let since = if idle { uptime() } else { 0 };
        self.idle_since.store(since, Ordering::Relaxed);
    }

    /// Asks the connection to close if it is still idle.
    pub(crate) fn evict(&self) {
        self.evicted.notify_one();
    }

    /// Returns once the connection has been asked to close.
    pub(crate) async fn evicted(&self) {
        self.evicted.notified().await;
    }
}

/// Microseconds since the first connection, and never 0.
fn uptime() -> u64 {
    static FIRST: LazyLock<Instant> = LazyLock::new(Instant::now);
    FIRST.elapsed().as_micros() as u64 + 1
}

/// Where in the stream of requests the next byte to hand on is.
enum FramingState {
    /// In a head, or before one.
    Head(HeadScanner),
    /// The head is complete; hyper is about to say what follows.
    AfterHead,
    /// In a body with so many bytes to come.
    Body(u64),
    /// In the line before a chunk, which gives its size.
    ChunkSize(ChunkSizeParser),
    /// In a chunk and the line end behind it, with so many bytes to come.
    Chunk(u64),
    /// Behind the last chunk.
    Trailer(HeadScanner),
}

/// A head, line by line: nothing may look like an end of line to one reader and not to another
/// (RFC 9112 section 2.2; request smuggling lives on such differences).
#[derive(Default)]
struct HeadScanner {
    started: bool,
    /// Bytes of the line so far.
    line: usize,
    /// How much of `content-length:` the line has matched so far.
    matched: usize,
    lengths: usize,
    after_cr: bool,
    malformed: bool,
}

/// The line before a chunk (RFC 9112 section 7.1), byte by byte. What is no size hyper refuses.
#[derive(Default)]
struct ChunkSizeParser {
    size: u64,
    in_extension: bool,
}

impl ChunkSizeParser {
    /// Takes a byte; gives the size at the end of the line.
    fn take(&mut self, byte: u8) -> Option<u64> {
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

const CONTENT_LENGTH: &[u8] = b"content-length:";

impl HeadScanner {
    /// Takes bytes up to the end of the head; says how many those are, if the end is among them.
    fn take(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            if self.after_cr && byte != b'\n' {
                self.malformed = true;
            }
            match byte {
                b'\n' => {
                    at += 1;
                    self.malformed |= !self.after_cr;
                    self.after_cr = false;
                    let empty = self.line == 0;
                    self.line = 0;
                    self.matched = 0;
                    // Empty lines before a head are skipped (RFC 9112 section 2.2).
                    if empty && self.started {
                        return Some(at);
                    }
                }
                b'\r' => {
                    at += 1;
                    self.after_cr = true;
                }
                _ => {
                    self.after_cr = false;
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

    /// Goes on matching the beginning of a line with `content-length:`.
    fn match_content_length(&mut self, text: &[u8]) {
        if self.matched != self.line {
            return;
        }
        let wanted = CONTENT_LENGTH[self.matched..].iter();
        let same = wanted
            .zip(text)
            .take_while(|(a, b)| a.eq_ignore_ascii_case(b));
        let same = same.count();
        self.matched += same;
        if same > 0 && self.matched == CONTENT_LENGTH.len() {
            self.lengths += 1;
            self.malformed |= self.lengths > 1;
        }
    }
}

/// A deadline that moves often and is seldom reached: the timer is set anew only when it rings too
/// early or would ring too late.
#[derive(Default)]
struct DeadlineTimer {
    timer: Option<Pin<Box<Sleep>>>,
}

impl DeadlineTimer {
    fn poll_expired(&mut self, deadline: Instant, context: &mut Context<'_>) -> bool {
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if timer.deadline() > deadline {
            timer.as_mut().reset(deadline);
        }
        while timer.as_mut().poll(context).is_ready() {
            if timer.deadline() >= deadline {
                return true;
            }
            timer.as_mut().reset(deadline);
        }
        false
    }
}

/// Follows the stream of requests and says how much of it hyper may see: a head alone, so that
/// what comes behind it is looked at with hyper's word on what it is.
struct RequestFramer {
    state: Arc<ConnectionState>,
    place: FramingState,
}

impl RequestFramer {
    /// How many of these bytes, at least one, may be handed on now.
    fn advance(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            match &mut self.place {
                FramingState::AfterHead => {
                    self.place = match self.state.body.load(Ordering::Relaxed) {
                        u64::MAX => FramingState::ChunkSize(ChunkSizeParser::default()),
                        0 => FramingState::Head(HeadScanner::default()),
                        length => FramingState::Body(length),
                    };
                }
                FramingState::Body(left) | FramingState::Chunk(left) => {
                    let here = (*left).min((bytes.len() - at) as u64);
                    *left -= here;
                    at += here as usize;
                    if *left == 0 {
                        self.place = match self.place {
                            FramingState::Chunk(_) => {
                                FramingState::ChunkSize(ChunkSizeParser::default())
                            }
                            _ => FramingState::Head(HeadScanner::default()),
                        };
                    }
                }
                FramingState::ChunkSize(size) => {
                    if let Some(size) = size.take(bytes[at]) {
                        self.place = match size {
                            0 => FramingState::Trailer(HeadScanner {
                                started: true,
                                ..HeadScanner::default()
                            }),
                            size => FramingState::Chunk(size.saturating_add(2)),
                        };
                    }
                    at += 1;
                }
                FramingState::Trailer(trailer) => {
                    let Some(end) = trailer.take(&bytes[at..]) else {
                        return bytes.len();
                    };
                    if trailer.malformed {
                        self.state.malformed.store(true, Ordering::Relaxed);
                    }
                    self.place = FramingState::Head(HeadScanner::default());
                    at += end;
                }
                FramingState::Head(head) => {
                    let Some(end) = head.take(&bytes[at..]) else {
                        return bytes.len();
                    };
                    if head.malformed {
                        self.state.malformed.store(true, Ordering::Relaxed);
                    }
                    self.state.busy.store(true, Ordering::Relaxed);
                    self.place = FramingState::AfterHead;
                    return at + end;
                }
            }
        }
        at
    }

    fn is_in_head(&self) -> bool {
        matches!(&self.place, FramingState::Head(head) if head.started)
    }
}

/// The socket.
pub(crate) struct TimeoutStream<S> {
    stream: S,
    tracker: RequestFramer,
    /// Bytes behind the end of a head.
    lookahead: Vec<u8>,
    read_clock: DeadlineTimer,
    /// When there has to be a whole head, or the first byte of one.
    read_deadline: Instant,
    write_clock: DeadlineTimer,
    write_deadline: Option<Instant>,
    lingering: Option<(Instant, usize)>,
}

impl<S> TimeoutStream<S> {
    pub(crate) fn new(stream: S, state: Arc<ConnectionState>) -> Self {
        state.set_idle(true);
        Self {
            stream,
            tracker: RequestFramer {
                state,
                place: FramingState::Head(HeadScanner::default()),
            },
            lookahead: Vec::new(),
            read_clock: DeadlineTimer::default(),
            read_deadline: Instant::now() + HEAD_TIMEOUT,
            write_clock: DeadlineTimer::default(),
            write_deadline: None,
            lingering: None,
        }
    }

    /// Hands on what was held back, as far as hyper may see it.
    fn drain_lookahead(&mut self, buffer: &mut ReadBuf<'_>) {
        let room = self.lookahead.len().min(buffer.remaining());
        let seen = self.tracker.advance(&self.lookahead[..room]);
        buffer.put_slice(&self.lookahead[..seen]);
        self.lookahead.drain(..seen);
    }

    /// An answer is written: what comes next is another request.
    fn on_flushed(&mut self) {
        self.write_deadline = None;
        let state = &self.tracker.state;
        if !state.answered.swap(false, Ordering::Relaxed) {
            return;
        }
        state.busy.store(false, Ordering::Relaxed);
        let bound = if self.tracker.is_in_head() {
            HEAD_TIMEOUT
        } else {
            IDLE_TIMEOUT
        };
        self.read_deadline = Instant::now() + bound;
        self.update_idle();
    }

    /// A connection is idle until the first byte of a head; empty lines before it do not count.
    fn update_idle(&self) {
        let state = &self.tracker.state;
        let idle = !state.busy.load(Ordering::Relaxed)
            && self.lookahead.is_empty()
            && !self.tracker.is_in_head();
        if idle != state.is_idle() {
            state.set_idle(idle);
        }
    }

    /// Nothing to read: fine while a request is being answered, else bounded.
    fn poll_read_timeout(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let busy = self.tracker.state.busy.load(Ordering::Relaxed);
        if !busy && self.read_clock.poll_expired(self.read_deadline, context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }

    /// The client takes nothing more for now.
    fn poll_write_timeout<T>(&mut self, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        let deadline = *self
            .write_deadline
            .get_or_insert_with(|| Instant::now() + WRITE_TIMEOUT);
        if self.write_clock.poll_expired(deadline, context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for TimeoutStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.lookahead.is_empty() {
            this.drain_lookahead(buffer);
            this.update_idle();
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        if Pin::new(&mut this.stream)
            .poll_read(context, buffer)?
            .is_pending()
        {
            return this.poll_read_timeout(context);
        }
        let was_in_head = this.tracker.is_in_head();
        let bytes = &buffer.filled()[before..];
        let seen = this.tracker.advance(bytes);
        this.lookahead.extend_from_slice(&bytes[seen..]);
        buffer.set_filled(before + seen);
        if this.tracker.is_in_head() && !was_in_head {
            this.read_deadline = this.read_deadline.min(Instant::now() + HEAD_TIMEOUT);
        }
        this.update_idle();
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TimeoutStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write(context, bytes) {
            Poll::Pending => self.poll_write_timeout(context),
            ready => ready,
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write_vectored(context, slices) {
            Poll::Pending => self.poll_write_timeout(context),
            ready => ready,
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// hyper flushes when it has nothing left to write.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(context))?;
        self.on_flushed();
        Poll::Ready(Ok(()))
    }

    /// Closes our side, then reads for a moment what the client still sends: closing a socket with
    /// unread bytes resets it, and a reset can overtake our answer.
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.lingering.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(context))?;
        }
        let (deadline, left) = this
            .lingering
            .get_or_insert_with(|| (Instant::now() + LINGER_TIMEOUT, LINGER_BYTES));
        loop {
            let mut scratch = [0; 4096];
            let mut buffer = ReadBuf::new(&mut scratch);
            match Pin::new(&mut this.stream).poll_read(context, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() && *left > 0 => {
                    *left = left.saturating_sub(buffer.filled().len());
                }
                Poll::Pending if !this.read_clock.poll_expired(*deadline, context) => {
                    return Poll::Pending;
                }
                _ => return Poll::Ready(Ok(())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    fn head(text: &str) -> (Option<usize>, bool) {
        let mut head = HeadScanner::default();
        (head.take(text.as_bytes()), head.malformed)
    }

    #[test]
    fn a_head_ends_at_its_empty_line() {
        assert_eq!(
            head("GET / HTTP/1.1\r\nHost: a\r\n\r\nrest"),
            (Some(27), false)
        );
        assert_eq!(head("\r\nGET / HTTP/1.1\r\n\r\n"), (Some(20), false));
        assert_eq!(head("GET / HTTP/1.1\r\nHost: a\r\n"), (None, false));
    }

    #[test]
    fn a_bare_cr_or_lf_or_a_second_length_is_seen() {
        assert_eq!(head("GET / HTTP/1.1\nHost: a\r\n\r\n"), (Some(26), true));
        assert_eq!(head("GET / HTTP/1.1\r\nHost: a\n\n"), (Some(25), true));
        assert!(head("GET / HTTP/1.1\r\nA: b\rc\r\n\r\n").1);
        assert!(head("P / HTTP/1.1\r\nContent-Length: 1\r\ncontent-length: 1\r\n\r\n").1);
        assert!(!head("P / HTTP/1.1\r\nContent-Length: 1\r\nX-Content-Length: 1\r\n\r\n").1);
    }

    #[test]
    fn what_follows_a_head_is_told_by_its_length() {
        let state = Arc::new(ConnectionState::default());
        let mut tracker = RequestFramer {
            state: state.clone(),
            place: FramingState::Head(HeadScanner::default()),
        };
        let stream = b"P / HTTP/1.1\r\n\r\na\nb\nGET / HTTP/1.1\r\n\r\n";
        assert_eq!(tracker.advance(stream), 16);
        state.body.store(4, Ordering::Relaxed);
        assert_eq!(tracker.advance(&stream[16..]), 22);
        assert!(!state.malformed.load(Ordering::Relaxed));
    }

    #[test]
    fn the_end_of_a_chunked_body_is_found() {
        let state = Arc::new(ConnectionState::default());
        let mut tracker = RequestFramer {
            state: state.clone(),
            place: FramingState::Head(HeadScanner::default()),
        };
        let head = b"P / HTTP/1.1\r\n\r\n";
        let body = b"a;b=c\r\n0123456789\r\n3\r\na\nb\r\n0\r\nT: 1\r\n\r\n";
        assert_eq!(tracker.advance(head), 16);
        state.body.store(u64::MAX, Ordering::Relaxed);
        let stream = [&body[..], b"GET / HTTP/1.1\n\r\n"].concat();
        assert_eq!(tracker.advance(&stream), stream.len());
        assert!(state.malformed.load(Ordering::Relaxed));
    }

    #[tokio::test]
    async fn a_connection_may_be_idle_for_longer_than_behind_the_usual_proxies() {
        let state = Arc::new(ConnectionState::default());
        let mut stream = TimeoutStream::new(tokio::io::empty(), state.clone());
        state.on_response();
        stream.flush().await.unwrap();
        // Caddy's default, and the longest among them.
        let longest = Instant::now() + Duration::from_secs(120);
        assert!(stream.read_deadline > longest + Duration::from_secs(10));
        assert!(state.is_idle());
    }

    /// Where heads end in a stream that comes in these pieces, and whether each was malformed.
    fn heads(stream: &[u8], pieces: &[usize], body: u64) -> Vec<(usize, bool)> {
        let state = Arc::new(ConnectionState::default());
        state.body.store(body, Ordering::Relaxed);
        let mut tracker = RequestFramer {
            state: state.clone(),
            place: FramingState::Head(HeadScanner::default()),
        };
        let mut ends = Vec::new();
        let (mut at, mut pieces) = (0, pieces.iter().cycle());
        while at < stream.len() {
            let piece = pieces.next().map_or(1, |piece| *piece);
            let mut rest = &stream[at..stream.len().min(at + piece)];
            while !rest.is_empty() {
                let seen = tracker.advance(rest);
                assert!(0 < seen && seen <= rest.len());
                at += seen;
                rest = &rest[seen..];
                if matches!(tracker.place, FramingState::AfterHead) {
                    ends.push((at, state.malformed.swap(false, Ordering::Relaxed)));
                }
            }
        }
        ends
    }

    proptest::proptest! {
        #[test]
        fn how_a_stream_is_cut_changes_nothing(
            stream in "(GET / HTTP/1.1|Content-Length: 1|[0-9a-f]{1,2}|a: b|\r\n|\r\n|\r\n\r\n|\r|\n){0,40}",
            pieces in proptest::collection::vec(1_usize..9, 1..9),
            body in proptest::prelude::prop_oneof![
                proptest::prelude::Just(0),
                1_u64..9,
                proptest::prelude::Just(u64::MAX),
            ],
        ) {
            let stream = stream.as_bytes();
            let whole = heads(stream, &[stream.len().max(1)], body);
            proptest::prop_assert_eq!(heads(stream, &pieces, body), whole);
        }
    }
}
