//! The socket of a client as hyper sees it, with the timeouts that hyper does not have: for idle
//! connections, slow heads, and responses that the client does not read. Before closing, it reads
//! the data that the client is still sending, so that an early response is not lost to a reset.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use log::debug;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::http::connection_state::ConnectionState;
use crate::http::framing::RequestFramer;

/// The time from the first byte of a head to its end; on a new connection, from when it is
/// accepted.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// The time between two requests. Longer than common proxies keep an idle connection (Caddy 120 s,
/// nginx and most load balancers 60 s), so that they never send a request into a closing
/// connection.
const IDLE_TIMEOUT: Duration = Duration::from_secs(150);
/// While a response is being sent, the socket must accept [`MIN_WRITE_BYTES`], or all that is left,
/// within this time. That is 16 KiB/s, which slow mobile connections reach even with a stall of a
/// few seconds.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
const MIN_WRITE_BYTES: usize = 160 * 1024;
/// How long, and how much, a client may still send after the service has closed its side.
const LINGER_TIMEOUT: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 8 * 1024 * 1024;

/// The socket of a client.
pub(crate) trait ClientSocket: AsyncRead + AsyncWrite + Unpin {
    /// Makes closing the socket reset the connection, so that the kernel discards unread data
    /// immediately.
    fn reset_on_close(&self) {}
}

impl ClientSocket for UnixStream {}

impl ClientSocket for TcpStream {
    fn reset_on_close(&self) {
        if let Err(error) = self.set_zero_linger() {
            debug!("cannot set SO_LINGER: {error}");
        }
    }
}

/// A socket with timeouts.
pub(crate) struct TimeoutStream<S> {
    stream: S,
    connection: Arc<ConnectionState>,
    framer: RequestFramer,
    /// Bytes that were read but must not reach hyper yet.
    lookahead: Vec<u8>,
    read_timer: DeadlineTimer,
    /// When a head must be complete or, on an idle connection, must have started.
    read_deadline: Instant,
    write_timer: DeadlineTimer,
    /// While a write waits for the client: the next deadline, and the bytes accepted before it.
    write_progress: Option<(Instant, usize)>,
    /// The deadline and the remaining bytes for reading after the service has closed its side.
    linger: Option<(Instant, usize)>,
}

impl<S: ClientSocket> TimeoutStream<S> {
    pub(crate) fn new(stream: S, connection: Arc<ConnectionState>) -> Self {
        connection.set_idle(true);
        Self {
            stream,
            framer: RequestFramer::new(connection.clone()),
            connection,
            lookahead: Vec::new(),
            read_timer: DeadlineTimer::default(),
            read_deadline: Instant::now() + HEAD_TIMEOUT,
            write_timer: DeadlineTimer::default(),
            write_progress: None,
            linger: None,
        }
    }

    fn drain_lookahead(&mut self, buffer: &mut ReadBuf<'_>) {
        let room = self.lookahead.len().min(buffer.remaining());
        let count = self.framer.advance(&self.lookahead[..room]);
        buffer.put_slice(&self.lookahead[..count]);
        self.lookahead.drain(..count);
    }

    fn on_flushed(&mut self) {
        self.write_progress = None;
        if self.connection.on_flushed() {
            let timeout = match self.framer.is_in_head() {
                true => HEAD_TIMEOUT,
                false => IDLE_TIMEOUT,
            };
            self.read_deadline = Instant::now() + timeout;
            self.update_idle();
        }
    }

    /// A connection is idle until a head begins; empty lines before the head do not count.
    fn update_idle(&self) {
        let has_request =
            self.connection.is_busy() || !self.lookahead.is_empty() || self.framer.is_in_head();
        self.connection.set_idle(!has_request);
    }

    /// Fails once the read deadline has passed, unless a request is in progress.
    fn poll_read_timeout(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.connection.is_busy() && self.read_timer.poll_expired(self.read_deadline, context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }

    /// Fails if the client reads the response too slowly.
    fn poll_write_timeout<T>(&mut self, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        loop {
            let start = || (Instant::now() + WRITE_TIMEOUT, 0);
            let (deadline, accepted) = *self.write_progress.get_or_insert_with(start);
            if !self.write_timer.poll_expired(deadline, context) {
                return Poll::Pending;
            }
            if accepted < MIN_WRITE_BYTES {
                self.stream.reset_on_close();
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            self.write_progress = None;
        }
    }
}

impl<S: ClientSocket> AsyncRead for TimeoutStream<S> {
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
        let was_in_head = this.framer.is_in_head();
        let bytes = &buffer.filled()[before..];
        let count = this.framer.advance(bytes);
        this.lookahead.extend_from_slice(&bytes[count..]);
        buffer.set_filled(before + count);
        if this.framer.is_in_head() && !was_in_head {
            this.read_deadline = this.read_deadline.min(Instant::now() + HEAD_TIMEOUT);
        }
        this.update_idle();
        Poll::Ready(Ok(()))
    }
}

impl<S: ClientSocket> AsyncWrite for TimeoutStream<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        match (&written, &mut self.write_progress) {
            (Poll::Pending, _) => return self.poll_write_timeout(context),
            (Poll::Ready(Ok(count)), Some((_, accepted))) => *accepted += count,
            _ => {}
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// hyper flushes once it has nothing left to write.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(context))?;
        self.on_flushed();
        Poll::Ready(Ok(()))
    }

    /// Closes the service's side, then briefly reads the data that the client is still sending:
    /// closing a socket with unread bytes resets the connection, and the reset can overtake the
    /// response.
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.linger.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(context))?;
        }
        let (deadline, left) = this
            .linger
            .get_or_insert_with(|| (Instant::now() + LINGER_TIMEOUT, LINGER_BYTES));
        loop {
            let mut scratch = [0; 4096];
            let mut buffer = ReadBuf::new(&mut scratch);
            match Pin::new(&mut this.stream).poll_read(context, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() && *left > 0 => {
                    *left = left.saturating_sub(buffer.filled().len());
                }
                Poll::Pending if !this.read_timer.poll_expired(*deadline, context) => {
                    return Poll::Pending;
                }
                _ => return Poll::Ready(Ok(())),
            }
        }
    }
}

/// A timer for a deadline that moves often and is rarely reached. It is reset only when it fires
/// too early or would fire too late.
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
