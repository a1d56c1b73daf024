//! Connections of a listener: TCP, TLS where there is a certificate, HTTP/1.1 with upgrades, HTTP/2 by TLS.
//!
//! Bound: [`REQUESTS_MAX`] connections whose requests are answered, past which the kernel's queue holds whoever comes, and then
//! refuses; of one over HTTP/2 `STREAMS_MAX` requests at once.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Request, header};
use hyper::body::Incoming;
use hyper::rt::{Read, Write};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use crate::health::Phase;
use crate::limits::Peer;
use crate::proxies::{self, Proxies};
use crate::tls::Identity;

/// HTTP connections of one listener at once, sockets not counted.
pub const REQUESTS_MAX: usize = 8192;
/// Requests of one HTTP/2 connection at once.
const STREAMS_MAX: u32 = 128;
/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a request's head may take.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// What a connection reads of heads and writes of bodies at once.
const BUFFER_BYTES: usize = 64 * 1024;
/// For how long a peer may take nothing of what is there for it, in milliseconds.
const STALLED_MS: u32 = 60_000;
/// An HTTP/2 connection over which nothing was asked for so long ends.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// Protocols that are spoken over TLS.
const ALPN: [&[u8]; 2] = [H2, b"http/1.1"];
const H2: &[u8] = b"h2";

/// A connection's place among those whose requests are answered.
#[derive(Clone)]
pub(crate) struct Place(Arc<Mutex<Option<OwnedSemaphorePermit>>>);

impl Place {
    /// Gives it to the next one: what follows on this connection is counted elsewhere.
    pub(crate) fn leave(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// What whoever comes now is shown.
type Shown = Arc<Mutex<Option<Arc<ServerConfig>>>>;

/// Accepts connections until the node ends.
///
/// # Errors
/// What is wrong with the certificate.
pub(crate) fn serve(
    listener: TcpListener,
    identity: Option<Identity>,
    proxies: Proxies,
    router: Router,
    mut phase: watch::Receiver<Phase>,
    tasks: TaskTracker,
) -> Result<impl Future<Output = ()> + Send, String> {
    let tls = identity.as_ref().map(|identity| identity.server(&ALPN)).transpose()?;
    let shown: Shown = Arc::new(Mutex::new(tls.map(Arc::new)));
    let renewed = shown.clone();
    let follows = async move {
        let Some(identity) = identity else { return std::future::pending().await };
        let shows = move |tls| {
            *renewed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(tls));
        };
        identity.follow(&ALPN, shows).await;
    };
    let watching = phase.clone();
    Ok(async move {
        tokio::select! {
            () = accept(listener, shown, Arc::new(proxies), router, watching, tasks) => {}
            () = follows => {}
            () = ends(&mut phase) => {}
        }
    })
}

async fn accept(
    listener: TcpListener,
    shown: Shown,
    proxies: Arc<Proxies>,
    router: Router,
    phase: watch::Receiver<Phase>,
    tasks: TaskTracker,
) {
    let places = Arc::new(Semaphore::new(REQUESTS_MAX));
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                // Past the bound nobody is accepted: the kernel's queue holds them, and then refuses.
                let Ok(place) = places.clone().acquire_owned().await else { return };
                let place = Place(Arc::new(Mutex::new(Some(place))));
                let asks = Asks { from: from.ip(), proxies: proxies.clone(), place: place.clone() };
                let router = router.clone();
                let tls = shown.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let phase = phase.clone();
                tasks.spawn(async move {
                    connection(stream, tls, asks, router, phase).await;
                    place.leave();
                });
            }
            Err(error) => {
                // Out of file descriptors, or a peer that is gone already.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Waits until the node is to end, or is gone.
async fn ends(phase: &mut watch::Receiver<Phase>) {
    let _ = phase.wait_for(|phase| *phase == Phase::Ending).await;
}

/// Who asks over a connection.
#[derive(Clone)]
struct Asks {
    from: IpAddr,
    proxies: Arc<Proxies>,
    place: Place,
}

impl Asks {
    /// A request as it is answered: with who asks, and the place of its connection.
    fn request(&self, request: Request<Incoming>) -> Request<Body> {
        let mut request = request.map(Body::new);
        let client = self.proxies.client(self.from, request.headers());
        request.extensions_mut().insert(Peer(client));
        request.extensions_mut().insert(self.place.clone());
        request
    }
}

async fn connection(
    mut stream: TcpStream,
    tls: Option<Arc<ServerConfig>>,
    mut asks: Asks,
    router: Router,
    phase: watch::Receiver<Phase>,
) {
    // Frames are small and wait for nobody.
    let _ = stream.set_nodelay(true);
    // A peer that takes nothing, or is gone without a word, is given up by the kernel.
    let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, STALLED_MS);
    if asks.proxies.speak_proxy {
        // Nobody else has a word for whom it speaks, nor is anybody else to be here.
        if !asks.proxies.are_at(asks.from) {
            return;
        }
        let header = tokio::time::timeout(HEAD_TIMEOUT, proxies::read_header(&mut stream));
        let Ok(Ok(client)) = header.await else { return };
        asks.from = client.unwrap_or(asks.from);
    }
    let Some(tls) = tls else { return http1(TokioIo::new(stream), asks, router, phase).await };
    let handshake = TlsAcceptor::from(tls).accept(stream);
    // A peer that does not keep to the protocol is its own affair.
    let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await else { return };
    if stream.get_ref().1.alpn_protocol() == Some(H2) {
        // Rare beside sockets, and large.
        Box::pin(http2(TokioIo::new(stream), asks, router, phase)).await;
    } else {
        http1(TokioIo::new(stream), asks, router, phase).await;
    }
}

async fn http1(
    io: impl Read + Write + Unpin + Send + 'static,
    asks: Asks,
    router: Router,
    mut phase: watch::Receiver<Phase>,
) {
    let service = TowerToHyperService::new(router.map_request(move |r: Request<Incoming>| asks.request(r)));
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(BUFFER_BYTES);
    let connection = builder.serve_connection(io, service).with_upgrades();
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        // A peer that breaks off is its own affair.
        _ = connection.as_mut() => {}
        () = ends(&mut phase) => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}

async fn http2(
    io: impl Read + Write + Unpin + Send + 'static,
    asks: Asks,
    router: Router,
    mut phase: watch::Receiver<Phase>,
) {
    let asked = Arc::new(AtomicU64::new(0));
    let counts = asked.clone();
    let service = TowerToHyperService::new(router.map_request(move |mut r: Request<Incoming>| {
        counts.fetch_add(1, Ordering::Relaxed);
        // What HTTP/1.1 calls the host stands in the address here.
        let host = r.uri().authority().and_then(|host| HeaderValue::from_str(host.as_str()).ok());
        if let (Some(host), false) = (host, r.headers().contains_key(header::HOST)) {
            r.headers_mut().insert(header::HOST, host);
        }
        asks.request(r)
    }));
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(BUFFER_BYTES as u32)
        .max_send_buf_size(BUFFER_BYTES)
        .keep_alive_interval(HANDSHAKE_TIMEOUT)
        .keep_alive_timeout(HANDSHAKE_TIMEOUT);
    let connection = builder.serve_connection(io, service);
    let mut connection = std::pin::pin!(connection);
    let mut before = 0;
    loop {
        tokio::select! {
            _ = connection.as_mut() => return,
            () = ends(&mut phase) => break,
            () = tokio::time::sleep(IDLE_MAX) => {
                let now = asked.load(Ordering::Relaxed);
                if std::mem::replace(&mut before, now) == now {
                    break;
                }
            }
        }
    }
    // What is under way is answered all the same.
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}
