//! Who may speak on the mesh: whoever has a certificate of its authority. Files are read at every handshake, so that new
//! ones count from the next connection on.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::transport::server::Connected;

use super::network::{Connection, Network};

/// What is under way of a handshake with oneself.
const HANDSHAKE_BYTES: usize = 64 << 10;
/// How long a node is waited for that may refuse this one.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// Certificate, key and authority (PEM files).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshTls {
    /// This node's certificate, with the name or address that others reach it by.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Authorities that other nodes' certificates are checked with.
    pub ca: PathBuf,
}

fn said(what: &Path, why: &dyn Display) -> String {
    format!("{}: {why}", what.display())
}

type Chain = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

impl MeshTls {
    fn authorities(&self) -> Result<RootCertStore, String> {
        let mut authorities = RootCertStore::empty();
        for authority in CertificateDer::pem_file_iter(&self.ca).map_err(|e| said(&self.ca, &e))? {
            let authority = authority.map_err(|e| said(&self.ca, &e))?;
            authorities.add(authority).map_err(|e| said(&self.ca, &e))?;
        }
        if authorities.is_empty() { Err(said(&self.ca, &"no certificate")) } else { Ok(authorities) }
    }

    fn identity(&self) -> Result<Chain, String> {
        let chain = CertificateDer::pem_file_iter(&self.cert).map_err(|e| said(&self.cert, &e))?;
        let chain = chain.collect::<Result<Vec<_>, _>>().map_err(|e| said(&self.cert, &e))?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|e| said(&self.key, &e))?;
        Ok((chain, key))
    }

    fn server(&self) -> Result<ServerConfig, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let authorities = Arc::new(self.authorities()?);
        let clients = WebPkiClientVerifier::builder_with_provider(authorities, provider.clone());
        let clients = clients.build().map_err(|e| said(&self.ca, &e))?;
        let (chain, key) = self.identity()?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, key)
            .map_err(|e| said(&self.cert, &e))?;
        server.alpn_protocols = vec![b"h2".to_vec()];
        Ok(server)
    }

    fn client(&self) -> Result<ClientConfig, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let (chain, key) = self.identity()?;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?
            .with_root_certificates(self.authorities()?)
            .with_client_auth_cert(chain, key)
            .map_err(|e| said(&self.cert, &e))?;
        client.alpn_protocols = vec![b"h2".to_vec()];
        Ok(client)
    }

    /// Why others would not take this node for the one that they reach by `address`, if so.
    pub(super) async fn stranger(&self, address: &str) -> Option<String> {
        let (here, there) = tokio::io::duplex(HANDSHAKE_BYTES);
        let (accepted, connected) = tokio::join!(
            Socket::accept(Box::pin(here), Some(self)),
            Socket::secure(Box::pin(there), address, Some(self))
        );
        connected
            .err()
            .or(accepted.err())
            .map(|error| said(&self.cert, &format!("not for {address}: {error}")))
    }

    /// Whether a node takes this one for a node of its cluster, and why not; none: it is not reached.
    pub(super) async fn is_taken(&self, network: &dyn Network, address: &str) -> Option<Result<(), String>> {
        let asks = async {
            let mut socket = Socket::connect(network, address, Some(self)).await?;
            // Whoever was called says whether it takes its caller only after the caller has done.
            socket.read_u8().await
        };
        match tokio::time::timeout(ASK_TIMEOUT, asks).await {
            Ok(Ok(_)) => Some(Ok(())),
            Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
                Some(Err(said(&self.cert, &format!("{address} does not take it: {error}"))))
            }
            Ok(Err(_)) | Err(_) => None,
        }
    }

    /// What is wrong with the files, if anything.
    pub fn fault(&self) -> Option<String> {
        self.server().err().or_else(|| self.client().err())
    }
}

/// A connection between nodes, with or without TLS.
pub(super) struct Socket(Connection);

fn broken(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl Socket {
    /// The side that was called.
    pub(super) async fn accept(socket: Connection, tls: Option<&MeshTls>) -> io::Result<Self> {
        let Some(tls) = tls else { return Ok(Self(socket)) };
        let acceptor = TlsAcceptor::from(Arc::new(tls.server().map_err(broken)?));
        Ok(Self(Box::pin(acceptor.accept(socket).await?)))
    }

    /// The side that calls.
    pub(super) async fn connect(
        network: &dyn Network,
        address: &str,
        tls: Option<&MeshTls>,
    ) -> io::Result<Self> {
        Self::secure(network.connect(address).await?, address, tls).await
    }

    async fn secure(socket: Connection, address: &str, tls: Option<&MeshTls>) -> io::Result<Self> {
        let Some(tls) = tls else { return Ok(Self(socket)) };
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(host).map_err(|e| broken(e.to_string()))?;
        let connector = TlsConnector::from(Arc::new(tls.client().map_err(broken)?));
        Ok(Self(Box::pin(connector.connect(name, socket).await?)))
    }
}

impl Connected for Socket {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.as_mut().poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_shutdown(cx)
    }
}
