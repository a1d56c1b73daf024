//! TLS towards the store's nodes. The driver's own would bring a second cryptographic library into the tree; instead it
//! speaks to a port of its own on loopback for each node, and what comes there goes on over TLS. Only connections of
//! this process's user are taken.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use scylla::errors::TranslationError;
use scylla::policies::address_translator::{AddressTranslator, UntranslatedPeer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

/// A node that does not shake hands by then is given up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);

/// How nodes of the store are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    /// Authorities (PEM) that their certificates are checked with.
    pub ca: PathBuf,
    /// This node's certificate and key (PEM), where the store asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name in their certificates; none: each node's address.
    pub server_name: Option<String>,
}

impl TlsConfig {
    fn client(&self) -> Result<ClientConfig, String> {
        let said = |what: &std::path::Path, e: &dyn fmt::Display| format!("{}: {e}", what.display());
        let mut authorities = RootCertStore::empty();
        for authority in CertificateDer::pem_file_iter(&self.ca).map_err(|e| said(&self.ca, &e))? {
            let authority = authority.map_err(|e| said(&self.ca, &e))?;
            authorities.add(authority).map_err(|e| said(&self.ca, &e))?;
        }
        if authorities.is_empty() {
            return Err(said(&self.ca, &"no certificate"));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?
            .with_root_certificates(authorities);
        let Some((certificate, key)) = &self.identity else { return Ok(client.with_no_client_auth()) };
        let chain = CertificateDer::pem_file_iter(certificate).map_err(|e| said(certificate, &e))?;
        let chain = chain.collect::<Result<Vec<_>, _>>().map_err(|e| said(certificate, &e))?;
        let secret = PrivateKeyDer::from_pem_file(key).map_err(|e| said(key, &e))?;
        client.with_client_auth_cert(chain, secret).map_err(|e| said(certificate, &e))
    }

    /// What is wrong with it, if anything.
    pub fn fault(&self) -> Option<String> {
        let name = self.server_name.clone().map(ServerName::try_from).transpose();
        self.client().err().or_else(|| name.err().map(|e| e.to_string()))
    }
}

/// A port on loopback for each node.
pub(super) struct Tunnel {
    tls: TlsConnector,
    name: Option<ServerName<'static>>,
    /// All nodes of a store listen on one port; the driver knows only the one that it asks.
    port: u16,
    ports: Mutex<HashMap<IpAddr, SocketAddr>>,
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").field("port", &self.port).finish_non_exhaustive()
    }
}

impl Tunnel {
    /// Towards nodes that listen on `port`.
    pub(super) fn new(config: &TlsConfig, port: u16) -> Result<Self, String> {
        let name =
            config.server_name.clone().map(ServerName::try_from).transpose().map_err(|e| e.to_string())?;
        let tls = TlsConnector::from(Arc::new(config.client()?));
        Ok(Self { tls, name, port, ports: Mutex::default() })
    }

    /// Where this node's is; made when it is first asked for.
    pub(super) fn local(&self, node: IpAddr) -> io::Result<SocketAddr> {
        let mut ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(local) = ports.get(&node) {
            return Ok(*local);
        }
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let local = listener.local_addr()?;
        let name = self.name.clone().unwrap_or_else(|| ServerName::IpAddress(node.into()));
        let to = SocketAddr::new(node, self.port);
        tokio::spawn(accept(TcpListener::from_std(listener)?, to, name, self.tls.clone()));
        ports.insert(node, local);
        Ok(local)
    }
}

#[async_trait]
impl AddressTranslator for Tunnel {
    async fn translate_address(&self, peer: &UntranslatedPeer) -> Result<SocketAddr, TranslationError> {
        let node = peer.untranslated_address();
        self.local(node.ip()).map_err(|_| TranslationError::NoRuleForAddress(node))
    }
}

async fn accept(listener: TcpListener, to: SocketAddr, name: ServerName<'static>, tls: TlsConnector) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                let (name, tls) = (name.clone(), tls.clone());
                let local = listener.local_addr();
                tokio::spawn(async move {
                    if !local.is_ok_and(|local| is_ours(from, local)) {
                        tracing::warn!("somebody else's connection towards the store is refused");
                        return;
                    }
                    if let Err(error) = carry(stream, to, name, tls).await {
                        tracing::debug!(%error, "a connection to the store ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection towards the store could not be taken");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Whether a connection on loopback is of this process's user, as the kernel's table of connections has it.
fn is_ours(from: SocketAddr, to: SocketAddr) -> bool {
    let place = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => format!("{:08X}:{:04X}", u32::from_le_bytes(ip.octets()), address.port()),
        IpAddr::V6(_) => String::new(),
    };
    let (from, to, us) = (place(from), place(to), rustix::process::geteuid().as_raw().to_string());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    table
        .lines()
        .map(str::split_whitespace)
        .any(|mut line| line.nth(1) == Some(&from) && line.next() == Some(&to) && line.nth(4) == Some(&us))
}

async fn carry(
    mut near: TcpStream,
    to: SocketAddr,
    name: ServerName<'static>,
    tls: TlsConnector,
) -> io::Result<()> {
    let shaken = async {
        let far = TcpStream::connect(to).await?;
        far.set_nodelay(true)?;
        near.set_nodelay(true)?;
        tls.connect(name, far).await
    };
    let mut far =
        tokio::time::timeout(HANDSHAKE_TIMEOUT, shaken).await.map_err(|_| io::ErrorKind::TimedOut)??;
    tokio::io::copy_bidirectional(&mut near, &mut far).await.map(drop)
}
