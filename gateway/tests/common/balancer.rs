//! What stands before a cluster: one address, behind which each connection goes to the next node that takes it.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::net::{TcpListener, TcpStream};

use super::Node;

pub struct Balancer {
    address: SocketAddr,
    nodes: Arc<Mutex<Vec<String>>>,
}

impl Balancer {
    pub async fn start(nodes: &[&Node]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let nodes = Arc::new(Mutex::new(nodes.iter().map(|n| n.public().to_owned()).collect::<Vec<_>>()));
        let (behind, turn) = (nodes.clone(), Arc::new(AtomicUsize::new(0)));
        tokio::spawn(async move {
            while let Ok((mut caller, _)) = listener.accept().await {
                let (behind, turn) = (behind.clone(), turn.clone());
                tokio::spawn(async move {
                    let nodes = behind.lock().unwrap().clone();
                    for _ in 0..nodes.len() {
                        let node = &nodes[turn.fetch_add(1, Ordering::Relaxed) % nodes.len()];
                        if let Ok(mut node) = TcpStream::connect(node).await {
                            let _ = node.set_nodelay(true);
                            let _ = tokio::io::copy_bidirectional(&mut caller, &mut node).await;
                            return;
                        }
                    }
                });
            }
        });
        Self { address, nodes }
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// These stand behind it from here on. Connections that are open stay.
    pub fn leads_to(&self, nodes: &[&Node]) {
        *self.nodes.lock().unwrap() = nodes.iter().map(|n| n.public().to_owned()).collect();
    }
}
