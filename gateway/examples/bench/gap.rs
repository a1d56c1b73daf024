//! A way to a server of the store on which every request about one partition is lost, as if the replicas that hold it were
//! away, while all others pass.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

/// A frame of the native protocol begins with its version, flags, stream, opcode and, in the last four bytes, the length of
/// what follows.
const HEADER: usize = 9;
const LOOK: Duration = Duration::from_millis(5);

#[derive(Default)]
struct State {
    /// What is in every request about the partition.
    key: Mutex<Option<Vec<u8>>>,
    lost: AtomicUsize,
}

pub struct Gap {
    pub address: SocketAddr,
    state: Arc<State>,
}

impl Gap {
    /// To a server.
    pub async fn before(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, state) = (listener.local_addr().unwrap(), Arc::<State>::default());
        let (server, shared) = (server.to_owned(), state.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (server, state) = (server.clone(), shared.clone());
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(server).await else { return };
                    let (mut from_server, to_server) = server.into_split();
                    let (from_client, mut to_client) = client.into_split();
                    tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
                    pass(from_client, to_server, &state).await;
                });
            }
        });
        Self { address, state }
    }

    /// From here on what names this is lost.
    pub fn lose(&self, key: Vec<u8>) {
        *self.state.key.lock().unwrap() = Some(key);
    }

    /// Everything passes again.
    pub fn heal(&self) {
        *self.state.key.lock().unwrap() = None;
    }

    /// Waits until something was lost.
    pub async fn has_lost(&self) {
        while self.state.lost.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(LOOK).await;
        }
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, state: &State) {
    let mut frame = vec![0; HEADER];
    loop {
        frame.truncate(HEADER);
        if from.read_exact(&mut frame).await.is_err() {
            return;
        }
        let length = u32::from_be_bytes([frame[5], frame[6], frame[7], frame[8]]) as usize;
        frame.resize(HEADER + length, 0);
        if from.read_exact(&mut frame[HEADER..]).await.is_err() {
            return;
        }
        let key = state.key.lock().unwrap().clone();
        if key.is_some_and(|key| frame.windows(key.len()).any(|bytes| bytes == key)) {
            state.lost.fetch_add(1, Ordering::Relaxed);
        } else if to.write_all(&frame).await.is_err() {
            return;
        }
    }
}
