//! Layers point one way: a crate may depend on what stands below it, and on nothing else of ours.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// What each crate may use of ours.
const ALLOWED: [(&str, &[&str]); 9] = [
    ("patchbay-protocol", &[]),
    ("patchbay-connectors", &["patchbay-protocol"]),
    ("patchbay-storage", &["patchbay-protocol"]),
    ("patchbay-loadtest", &["patchbay-protocol"]),
    ("patchbay-actors", &["patchbay-protocol", "patchbay-connectors", "patchbay-storage"]),
    ("patchbay-sim", &["patchbay-protocol", "patchbay-connectors", "patchbay-storage", "patchbay-actors"]),
    ("patchbay-consumers", &["patchbay-protocol", "patchbay-storage"]),
    (
        "patchbay-admin-api",
        &["patchbay-protocol", "patchbay-connectors", "patchbay-storage", "patchbay-actors"],
    ),
    (
        "patchbay-gateway",
        &[
            "patchbay-protocol",
            "patchbay-connectors",
            "patchbay-storage",
            "patchbay-actors",
            "patchbay-admin-api",
            "patchbay-consumers",
            "patchbay-loadtest",
        ],
    ),
];

/// What must not be in the tree at all, and what only one crate may use.
const BANNED: [&str; 3] = ["aws-lc-sys", "openssl-sys", "native-tls"];
const ONLY_IN: [(&str, &str); 6] = [
    ("tonic", "patchbay-actors"),
    ("ractor", "patchbay-actors"),
    ("fjall", "patchbay-storage"),
    ("scylla", "patchbay-storage"),
    ("rdkafka", "patchbay-storage"),
    ("fred", "patchbay-storage"),
];

#[test]
fn dependencies_point_down_only() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.into_iter().collect();
    let packages = metadata["packages"].as_array().unwrap();
    let ours: Vec<_> = packages.iter().filter(|p| p["source"].is_null()).collect();
    assert_eq!(ours.len(), ALLOWED.len(), "every crate of ours has its place in the table");
    for package in &ours {
        let name = package["name"].as_str().unwrap();
        let dependencies = package["dependencies"].as_array().unwrap();
        let used: BTreeSet<&str> = dependencies
            .iter()
            .filter(|d| d["kind"].is_null())
            .map(|d| d["name"].as_str().unwrap())
            .collect();
        for dependency in used.iter().filter(|d| d.starts_with("patchbay-")) {
            assert!(allowed[name].contains(dependency), "{name} must not use {dependency}");
        }
        for (library, only) in ONLY_IN {
            assert!(name == only || !used.contains(library), "{name} must not use {library}");
        }
    }
    for package in packages {
        let name = package["name"].as_str().unwrap();
        assert!(!BANNED.contains(&name), "{name} is in the tree");
    }
}
