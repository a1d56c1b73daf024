//! What a bare server makes of the same customers' messages: checks the signature, keeps what it is told to, writes
//! one frame.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{accept_async, connect_async};

use super::setup::{Error, Target, client};
use super::{Latencies, Ticks, customer, now_ns};

type Kept = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What the bare server has: where its frames go, and what it does with a body before.
struct Bare {
    frames: mpsc::Sender<Bytes>,
    keep: Box<dyn Fn(Bytes) -> Kept + Send + Sync>,
}

/// Latencies of customers' messages over a bare server at this rate; it does `keep` with every body first.
pub async fn measure<F: Future<Output = ()> + Send + 'static>(
    rate: f64,
    time: Duration,
    keep: impl Fn(Bytes) -> F + Send + Sync + 'static,
) -> Result<Latencies, Error> {
    let broken = |e| Error::Socket(Box::new(e));
    let (frames, mut queued) = mpsc::channel::<Bytes>(1024);
    let hooks = TcpListener::bind("127.0.0.1:0").await?;
    let sockets = TcpListener::bind("127.0.0.1:0").await?;
    let public = hooks.local_addr()?.to_string();
    let router = Router::new()
        .route("/webhooks/floor/wa", post(take))
        .with_state(Arc::new(Bare { frames, keep: Box::new(move |body| Box::pin(keep(body))) }));
    let http = tokio::spawn(async move { axum::serve(hooks, router).await });
    let at = sockets.local_addr()?;
    let writer = tokio::spawn(async move {
        let (stream, _) = sockets.accept().await?;
        let _ = stream.set_nodelay(true);
        let mut socket = accept_async(stream).await.map_err(std::io::Error::other)?;
        while let Some(frame) = queued.recv().await {
            socket.send(Message::Binary(frame)).await.map_err(std::io::Error::other)?;
        }
        Ok::<_, std::io::Error>(())
    });
    let (mut reader, _) = connect_async(format!("ws://{at}/")).await.map_err(broken)?;
    let latencies = Latencies::default();
    let seen = latencies.clone();
    let reading = tokio::spawn(async move {
        while let Some(Ok(message)) = reader.next().await {
            let data = message.into_data();
            if let Some(meant) = std::str::from_utf8(&data).ok().and_then(|t| t.parse::<u64>().ok()) {
                seen.note(Duration::from_nanos(now_ns().saturating_sub(meant)));
            }
        }
    });
    let target = Target { public, operator_key: String::new(), pid: None, http: client()? };
    let mut ticks = Ticks::new(rate);
    let until = tokio::time::Instant::now() + time;
    while tokio::time::Instant::now() < until {
        let (n, meant) = ticks.next().await;
        let body = customer::body("34600", &format!("floor-{n}"), &format!("@{meant}"));
        let target = target.clone();
        tokio::spawn(async move { drop(customer::post(&target, "floor", body).await) });
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    for task in [http.abort_handle(), writer.abort_handle(), reading.abort_handle()] {
        task.abort();
    }
    Ok(latencies)
}

async fn take(State(bare): State<Arc<Bare>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let given = headers.get("x-hub-signature-256").and_then(|v| v.to_str().ok()).unwrap_or("");
    if given != customer::signature(&body) {
        return StatusCode::UNAUTHORIZED;
    }
    (bare.keep)(body.clone()).await;
    let mark = b"\"body\":\"@";
    if let Some(at) = body.windows(mark.len()).position(|w| w == mark) {
        let from = at + mark.len();
        let digits = body[from..].iter().take_while(|b| b.is_ascii_digit()).count();
        // Whoever reads has gone when the run is over.
        let _ = bare.frames.send(body.slice(from..from + digits)).await;
    }
    StatusCode::OK
}
