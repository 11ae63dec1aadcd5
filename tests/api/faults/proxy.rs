//! The network between the service and its database, which can be made to fail.

use std::{
    future::pending,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

/// What the network does with what passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NetworkCondition {
    /// It passes.
    Fair,
    /// It passes after this time, each way.
    Slow(Duration),
    /// Nothing passes, and nobody is told; it is delivered late if the weather turns.
    Blackhole,
    /// Half of an answer passes, then the connection is reset.
    Reset,
    /// Connections are closed; the next ones are accepted, but answered only after this time or
    /// when the weather turns.
    Asleep(Duration),
}

/// A TCP proxy before a PostgreSQL on a unix socket.
pub(super) struct Proxy {
    address: SocketAddr,
    weather: watch::Sender<NetworkCondition>,
    /// Connections before this moment are closed.
    closed: watch::Sender<Instant>,
    /// Connections before this moment are half-open: the other side has forgotten them.
    forgotten: watch::Sender<Instant>,
    acceptor: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

impl Proxy {
    pub(super) async fn before(socket_directory: &Path) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (weather, seen) = watch::channel(NetworkCondition::Fair);
        let (closed, closing) = watch::channel(Instant::now());
        let (forgotten, forgetting) = watch::channel(Instant::now());
        let upstream = socket_directory.join(".s.PGSQL.5432");
        let acceptor = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(pass(
                    stream,
                    upstream.clone(),
                    seen.clone(),
                    closing.clone(),
                    forgetting.clone(),
                ));
            }
        });
        Proxy {
            address,
            weather,
            closed,
            forgotten,
            acceptor,
        }
    }

    pub(super) fn url(&self) -> String {
        format!("postgres://todo@{}/todo", self.address)
    }

    pub(super) fn turns(&self, weather: NetworkCondition) {
        self.weather.send_replace(weather);
        if matches!(weather, NetworkCondition::Asleep(_)) {
            self.closed.send_replace(Instant::now());
        }
    }

    /// The database forgets today's connections, and the service is not told.
    pub(super) fn forgets(&self) {
        self.forgotten.send_replace(Instant::now());
    }
}

/// One connection from its beginning to its end.
async fn pass(
    mut stream: TcpStream,
    upstream: PathBuf,
    mut weather: watch::Receiver<NetworkCondition>,
    mut closed: watch::Receiver<Instant>,
    mut forgotten: watch::Receiver<Instant>,
) {
    let opened = Instant::now();
    let now = *weather.borrow();
    match now {
        NetworkCondition::Asleep(waking) => {
            let awake = weather.wait_for(|weather| !matches!(weather, NetworkCondition::Asleep(_)));
            timeout(waking, awake).await.ok();
        }
        _ => blackhole_over(&mut weather).await,
    }
    let Ok(mut server) = UnixStream::connect(upstream).await else {
        return;
    };
    stream.set_nodelay(true).unwrap();
    let (mut from_client, mut to_client) = stream.split();
    let (mut from_server, mut to_server) = server.split();
    let ending = tokio::select! {
        ending = carry(&mut from_client, &mut to_server, weather.clone(), false) => ending,
        ending = carry(&mut from_server, &mut to_client, weather.clone(), true) => ending,
        _ = forgotten.wait_for(|at| *at > opened) => Ending::Forgotten,
        _ = closed.wait_for(|at| *at > opened) => Ending::Closed,
    };
    drop(server);
    match ending {
        Ending::Closed => {}
        Ending::Reset => stream.set_zero_linger().unwrap(),
        Ending::Forgotten => {
            // Its side stays open, and what it says is heard by nobody.
            copy(&mut stream, &mut tokio::io::sink()).await.ok();
        }
    }
}

enum Ending {
    Closed,
    Reset,
    Forgotten,
}

/// One direction of a connection. What is on the way takes its time without holding up what follows.
async fn carry(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    mut weather: watch::Receiver<NetworkCondition>,
    answers: bool,
) -> Ending {
    let (on_the_way, mut arriving) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let skies = weather.clone();
    let read = async move {
        let mut piece = vec![0; 16 * 1024];
        while let Ok(length @ 1..) = from.read(&mut piece).await {
            let delay = match *skies.borrow() {
                NetworkCondition::Slow(delay) => delay,
                _ => Duration::ZERO,
            };
            let packet = (Instant::now() + delay, piece[..length].to_vec());
            on_the_way.send(packet).ok();
        }
        drop(on_the_way);
        pending::<Ending>().await
    };
    let write = async {
        while let Some((due, bytes)) = arriving.recv().await {
            sleep_until(due).await;
            blackhole_over(&mut weather).await;
            let resets = answers && *weather.borrow() == NetworkCondition::Reset;
            let passing = if resets { bytes.len() / 2 } else { bytes.len() };
            if to.write_all(&bytes[..passing]).await.is_err() {
                return Ending::Closed;
            }
            if resets {
                return Ending::Reset;
            }
        }
        Ending::Closed
    };
    tokio::select! {
        ending = read => ending,
        ending = write => ending,
    }
}

async fn blackhole_over(weather: &mut watch::Receiver<NetworkCondition>) {
    let over = weather.wait_for(|weather| *weather != NetworkCondition::Blackhole);
    over.await.ok();
}
