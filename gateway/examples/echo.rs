//! An echo server on our own WebSocket settings, for the conformance suite: `echo` prints its address and ends with
//! its standard input.
#![allow(missing_docs, clippy::unwrap_used)]

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use axum::routing::get;
use futures_util::{SinkExt as _, StreamExt as _};
use patchbay_gateway::edge::websocket::socket;
use tokio::io::AsyncReadExt as _;
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use tokio_tungstenite::tungstenite::{Error, Message};

async fn echo(mut request: Request) -> Response {
    let mut bare = axum::http::Request::new(());
    *bare.method_mut() = request.method().clone();
    *bare.uri_mut() = request.uri().clone();
    bare.headers_mut().clone_from(request.headers());
    let response = create_response_with_body(&bare, Body::empty).unwrap();
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let mut socket = socket(upgrade.await.unwrap()).await;
        loop {
            match socket.next().await {
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                    if socket.send(message).await.is_err() {
                        return;
                    }
                }
                Some(Ok(_)) => {}
                // As the connection's loop does: what breaks the protocol is answered with a close.
                Some(Err(Error::Protocol(_) | Error::Utf8(_) | Error::Capacity(_))) => {
                    let _ = socket.close(None).await;
                    return;
                }
                Some(Err(_)) | None => return,
            }
        }
    });
    response
}

#[tokio::main]
async fn main() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("ws://{}/", listener.local_addr().unwrap());
    let server = axum::serve(listener, Router::new().route("/", get(echo)));
    let mut stdin = tokio::io::stdin();
    tokio::select! {
        served = server => served.unwrap(),
        _ = async { while stdin.read_u8().await.is_ok() {} } => {}
    }
}
