//! The real servers that tests run against: those that `./x test` has started, or else their own, which end with
//! the test's process.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;

/// Whether this run has no servers: `./x test --quick`.
pub fn quick() -> bool {
    // Those that are run beside the others are left out among them.
    let exe = std::env::current_exe().unwrap_or_default();
    let name = exe.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
    let apart = std::env::var("PATCHBAY_TEST_APART").unwrap_or_default();
    let apart = apart.split_whitespace().any(|apart| name.starts_with(apart));
    apart || std::env::var_os("PATCHBAY_TEST_QUICK").is_some()
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/local").join(name)
}

/// A server, or a cluster of three, of a test's own.
pub struct Server {
    name: &'static str,
    dir: PathBuf,
    pub addresses: String,
    pub pids: Vec<u32>,
}

fn run(name: &str, args: &[&str]) -> Value {
    let done = Command::new(script(name)).args(args).output().unwrap();
    assert!(done.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout).unwrap_or(Value::Null)
}

/// Fetches what a server is made of, for where there is no network.
pub fn fetch(name: &str) {
    run(name, &["fetch"]);
}

fn pids(told: &Value) -> Vec<u32> {
    let nodes = told["nodes"].as_array().unwrap().iter();
    nodes.map(|n| n["pid"].as_u64().and_then(|p| u32::try_from(p).ok()).unwrap_or(0)).collect()
}

fn send(pid: u32, signal: &str) -> bool {
    Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success()
}

impl Server {
    /// Starts one with a directory of its own; `more` goes to its script.
    pub fn start(name: &'static str, nodes: usize, more: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix(&format!("patchbay-{name}-")).tempdir().unwrap().keep();
        let (path, nodes) = (dir.to_str().unwrap().to_owned(), nodes.to_string());
        let owner = std::process::id().to_string();
        let mut args = vec!["start", "--dir", &path, "--nodes", &nodes, "--owner", &owner];
        args.extend(more);
        let told = run(name, &args);
        let addresses = told["addresses"].as_str().unwrap().to_owned();
        Self { name, dir, addresses, pids: pids(&told) }
    }

    pub fn nodes(&self) -> Vec<String> {
        self.addresses.split(',').map(str::to_owned).collect()
    }

    fn signal(&self, node: usize, signal: &str) {
        assert!(send(self.pids[node - 1], signal));
    }

    /// SIGKILL of one node, from 1.
    pub fn kill(&self, node: usize) {
        self.signal(node, "-KILL");
    }

    /// SIGSTOP.
    pub fn freeze(&self, node: usize) {
        self.signal(node, "-STOP");
    }

    /// SIGCONT.
    pub fn thaw(&self, node: usize) {
        self.signal(node, "-CONT");
    }

    /// Lets a node run a tenth of the time, until this is dropped.
    pub fn slow(&self, node: usize) -> Slow {
        let (pid, over) = (self.pids[node - 1], Arc::new(AtomicBool::new(false)));
        let told = over.clone();
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                send(pid, "-STOP");
                std::thread::sleep(Duration::from_millis(225));
                send(pid, "-CONT");
                std::thread::sleep(Duration::from_millis(25));
            }
        });
        Slow { over, thread: Some(thread) }
    }

    /// Starts a node that has ended again, where it was.
    pub fn restart(&mut self, node: usize) {
        let told =
            run(self.name, &["start", "--dir", self.dir.to_str().unwrap(), "--node", &node.to_string()]);
        self.pids = pids(&told);
    }

    /// SIGTERM, and waits.
    pub fn stop(&self, node: usize) {
        run(self.name, &["stop", "--dir", self.dir.to_str().unwrap(), "--node", &node.to_string()]);
    }
}

/// A node that is slow.
pub struct Slow {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new(script(self.name)).args(["wipe", "--dir"]).arg(&self.dir).status();
    }
}

fn shared(name: &'static str, variable: &str, own: &'static OnceLock<Server>) -> String {
    std::env::var(variable)
        .unwrap_or_else(|_| own.get_or_init(|| Server::start(name, 1, &[])).addresses.clone())
}

/// A Cassandra node that many tests use, each with a keyspace of its own.
pub fn cassandra() -> Vec<String> {
    static OWN: OnceLock<Server> = OnceLock::new();
    shared("cassandra", "PATCHBAY_TEST_CASSANDRA", &OWN).split(',').map(str::to_owned).collect()
}

/// A broker that many tests use, each with topics of its own.
pub fn kafka() -> String {
    static OWN: OnceLock<Server> = OnceLock::new();
    shared("kafka", "PATCHBAY_TEST_KAFKA", &OWN)
}

/// A Redis server that many tests use, each with keys of its own.
pub fn redis() -> String {
    static OWN: OnceLock<Server> = OnceLock::new();
    shared("redis", "PATCHBAY_TEST_REDIS", &OWN)
}

/// A session of a test's own, to look with.
pub async fn session(addresses: &str) -> scylla::client::session::Session {
    let nodes = addresses.split(',');
    scylla::client::session_builder::SessionBuilder::new().known_nodes(nodes).build().await.unwrap()
}

/// A name that no other test has.
pub fn fresh(what: &str) -> String {
    format!("{what}_{:08x}", rand::random::<u32>())
}
