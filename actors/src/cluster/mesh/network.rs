//! What the mesh runs over: TCP, or whatever a simulation puts there.

use std::io;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};

/// Bytes both ways, in order.
pub trait Stream: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> Stream for T {}

/// A connection between two nodes.
pub type Connection = Pin<Box<dyn Stream>>;

/// How a node is reached, and reaches others.
#[async_trait]
pub trait Network: Send + Sync + 'static {
    /// Waits until a node calls. Cancel-safe.
    async fn accept(&self) -> io::Result<Connection>;

    /// Calls the node at an address.
    async fn connect(&self, address: &str) -> io::Result<Connection>;
}

/// TCP: others call at the listener, and are called at `host:port`.
#[derive(Debug)]
pub struct Tcp(TcpListener);

impl Tcp {
    /// Where others call.
    pub fn at(listener: TcpListener) -> Arc<dyn Network> {
        Arc::new(Self(listener))
    }
}

#[async_trait]
impl Network for Tcp {
    async fn accept(&self) -> io::Result<Connection> {
        let (socket, _) = self.0.accept().await?;
        socket.set_nodelay(true)?;
        Ok(Box::pin(socket))
    }

    async fn connect(&self, address: &str) -> io::Result<Connection> {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        Ok(Box::pin(socket))
    }
}
