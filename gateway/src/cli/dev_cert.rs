//! `patchbay dev-cert`: certificates for a mesh on machines of one's own.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use clap::Args;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use super::Failure;
use crate::config::Config;

/// What a node on this machine is reached by.
const NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Makes an authority, if the directory has none, and a node's certificate by it. For development: whoever has the
/// authority's key can join the mesh.
#[derive(Args)]
pub(crate) struct DevCert {
    /// Where they are kept: `ca.pem`, `ca-key.pem`, `node.pem`, `node-key.pem`.
    #[arg(long)]
    dir: PathBuf,
    /// Names and addresses that the node is reached by.
    #[arg(long = "name", default_values = NAMES)]
    names: Vec<String>,
    /// What the node's files are called.
    #[arg(long, default_value = "node")]
    file: String,
}

fn made(error: rcgen::Error) -> Failure {
    Failure::Other(format!("certificate: {error}"))
}

/// Written whole or not at all; a key is for its owner only.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let part = path.with_extension("part");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&part)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&part, path)?;
    Ok(())
}

/// A certificate for QUIC, where none is configured.
pub(super) fn fill(config: &mut Config) -> Result<(), Failure> {
    if config.quic.cert.is_some() {
        return Ok(());
    }
    let dir = config.storage.data_dir.join("certs");
    let (cert, key) = (dir.join("node.pem"), dir.join("node-key.pem"));
    if !cert.exists() {
        let names = NAMES.map(str::to_owned).to_vec();
        DevCert { dir, names, file: "node".into() }.run()?;
    }
    (config.quic.cert, config.quic.key) = (Some(cert), Some(key));
    Ok(())
}

impl DevCert {
    pub(crate) fn run(self) -> Result<(), Failure> {
        fs::create_dir_all(&self.dir)?;
        let (ca, ca_key) = (self.dir.join("ca.pem"), self.dir.join("ca-key.pem"));
        if !ca.exists() {
            let key = KeyPair::generate().map_err(made)?;
            let mut params = CertificateParams::new(Vec::new()).map_err(made)?;
            params.distinguished_name.push(DnType::CommonName, "Patchbay development authority");
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            let certificate = params.self_signed(&key).map_err(made)?;
            write(&ca_key, &key.serialize_pem())?;
            write(&ca, &certificate.pem())?;
        }
        let key = KeyPair::from_pem(&fs::read_to_string(&ca_key)?).map_err(made)?;
        let issuer = Issuer::from_ca_cert_pem(&fs::read_to_string(&ca)?, key).map_err(made)?;
        let node = KeyPair::generate().map_err(made)?;
        let mut params = CertificateParams::new(self.names).map_err(made)?;
        params.distinguished_name.push(DnType::CommonName, "Patchbay node");
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&node, &issuer).map_err(made)?;
        write(&self.dir.join(format!("{}-key.pem", self.file)), &node.serialize_pem())?;
        write(&self.dir.join(format!("{}.pem", self.file)), &certificate.pem())
    }
}
