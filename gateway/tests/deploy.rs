//! What deploy/ ships fits the program: the configuration of compose is one that it takes, every metric of the dashboard
//! is one that it has, and YAML and JSON parse.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use patchbay_gateway::config::load;
use patchbay_gateway::metrics_table::METRICS;

fn compose() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/compose")
}

#[test]
fn the_configuration_of_compose_is_one_that_we_take() {
    let text = std::fs::read_to_string(compose().join("patchbay.toml")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    // Its secrets are files of the machine that it runs on.
    let secret = dir.path().join("secret");
    std::fs::write(&secret, "a-secret-of-this-test").unwrap();
    let text = ["operator_key", "hmac_secret"].into_iter().fold(text, |text, name| {
        text.replace(&format!("/etc/patchbay/secrets/{name}"), secret.to_str().unwrap())
    });
    let file = dir.path().join("patchbay.toml");
    std::fs::write(&file, text).unwrap();
    let config = load(Some(&file), std::iter::empty::<(String, String)>(), &[]);
    assert!(config.is_ok(), "{:?}", config.err().map(|e| e.0));
}

#[test]
fn the_dashboard_shows_metrics_that_there_are() {
    let text =
        std::fs::read_to_string(compose().join("grafana/provisioning/dashboards/patchbay.json")).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&text).unwrap();
    let known: BTreeSet<&str> = METRICS.iter().map(|m| m.0).collect();
    let mut shown = 0;
    for target in
        dashboard["panels"].as_array().unwrap().iter().flat_map(|p| p["targets"].as_array().unwrap())
    {
        let expression = target["expr"].as_str().unwrap();
        for word in expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')) {
            if let Some(name) = word.starts_with("patchbay_").then(|| word.trim_end_matches("_bucket")) {
                assert!(known.contains(name), "{name}");
                shown += 1;
            }
        }
    }
    assert!(shown >= 10);
}

#[test]
fn the_files_of_compose_parse() {
    let files = [
        "compose.yaml",
        "prometheus/prometheus.yml",
        "grafana/provisioning/datasources/prometheus.yaml",
        "grafana/provisioning/dashboards/patchbay.yaml",
    ];
    for file in files {
        let text = std::fs::read_to_string(compose().join(file)).unwrap();
        let parsed: serde_json::Value =
            serde_norway::from_str(&text).unwrap_or_else(|e| panic!("{file}: {e}"));
        assert!(parsed.is_object(), "{file}");
    }
    let text = std::fs::read_to_string(compose().join("compose.yaml")).unwrap();
    let compose: serde_json::Value = serde_norway::from_str(&text).unwrap();
    let services = compose["services"].as_object().unwrap();
    for (name, service) in services {
        assert!(service["image"].is_string() || service["build"].is_object(), "{name} has no image");
        for volume in service["volumes"].as_array().into_iter().flatten() {
            let source = volume.as_str().unwrap().split(':').next().unwrap();
            let named = compose["volumes"].get(source).is_some();
            assert!(named || source.starts_with("./"), "{name}: {source} is no volume");
        }
    }
}
