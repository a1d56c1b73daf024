//! The certificate that clients are shown: files, read again when they change.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Between two looks whether the files have changed.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// A certificate and its key (PEM files).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The chain, its own first.
    pub cert: PathBuf,
    /// The key.
    pub key: PathBuf,
}

fn said(what: &Path, why: &dyn Display) -> String {
    format!("{}: {why}", what.display())
}

impl Identity {
    /// Of these files; none of neither.
    pub fn of(cert: Option<&PathBuf>, key: Option<&PathBuf>) -> Option<Self> {
        Some(Self { cert: cert?.clone(), key: key?.clone() })
    }

    /// A server that shows it, of these protocols.
    ///
    /// # Errors
    /// What is wrong with the files.
    pub fn server(&self, alpn: &[&[u8]]) -> Result<ServerConfig, String> {
        let chain = CertificateDer::pem_file_iter(&self.cert).map_err(|e| said(&self.cert, &e))?;
        let chain = chain.collect::<Result<Vec<_>, _>>().map_err(|e| said(&self.cert, &e))?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|e| said(&self.key, &e))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|e| said(&self.cert, &e))?;
        server.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Ok(server)
    }

    fn looks(&self) -> [Option<(SystemTime, u64)>; 2] {
        let look = |file: &Path| {
            let found = std::fs::metadata(file).ok()?;
            Some((found.modified().ok()?, found.len()))
        };
        [look(&self.cert), look(&self.key)]
    }

    /// Tells of a server with new files, whenever there are any. Files that are no certificate change nothing.
    pub async fn follow(self, alpn: &[&[u8]], mut renewed: impl FnMut(ServerConfig)) {
        let mut seen = self.looks();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = self.looks();
            if std::mem::replace(&mut seen, now) == now {
                continue;
            }
            match self.server(alpn) {
                Ok(server) => {
                    renewed(server);
                    tracing::info!(cert = %self.cert.display(), "a new certificate is shown");
                }
                // Half of it may have been written: the other half changes the files again.
                Err(error) => tracing::warn!(error, "the certificate stays as it was"),
            }
        }
    }
}
