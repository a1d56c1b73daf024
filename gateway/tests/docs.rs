//! Generated pages of docs/: a test fails when one is stale. `./x docs` writes them.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::PathBuf;

fn check(page: &str, now: &str) {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/src/generated").join(page);
    if std::env::var_os("PATCHBAY_WRITE_DOCS").is_some() {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, now).unwrap();
    }
    let stored = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(stored == now, "{page} is stale: run ./x docs");
}

#[test]
fn configuration() {
    check("configuration.md", &patchbay_gateway::config::Config::documentation());
}

#[test]
fn metrics() {
    check("metrics.md", &patchbay_gateway::metrics_table::documentation());
}

#[test]
fn codes() {
    check("codes.md", &patchbay_protocol::codes::documentation());
}

#[test]
fn events() {
    let schema = serde_json::to_string_pretty(&patchbay_protocol::event::schema()).unwrap();
    check("event.schema.json", &(schema + "\n"));
}

#[test]
fn async_api() {
    check("asyncapi.json", &patchbay_gateway::edge::client::asyncapi::description());
}

#[test]
fn open_api() {
    let description = patchbay_admin_api::openapi::description();
    let parsed: serde_json::Value = serde_json::from_str(&description).unwrap();
    assert!(parsed["openapi"].as_str().unwrap().starts_with("3.1"));
    check("openapi.json", &(description + "\n"));
}
