//! What tests of a cluster of processes share: how its nodes find each other, and who holds what.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::collections::BTreeMap;

use super::{Node, until};

/// As every test on a real store has them.
pub const SHARDS: u64 = 64;
/// What every node verifies tokens by.
pub const SECRET: &str = "secretsecretsecretsecretsecretsecret";
/// What the nodes of one cluster have in common, beside their store.
pub const COMMON: [(&str, &str); 3] = [
    ("PATCHBAY__AUTH__OPERATOR_KEY", "operatoroperator"),
    ("PATCHBAY__AUTH__HMAC_SECRET_KEY", SECRET),
    ("PATCHBAY__MESH__LISTEN", "127.0.0.1:0"),
];

pub fn incarnation(node: &Node) -> u64 {
    node.ready["incarnation"].as_u64().unwrap()
}

/// How many shards each node holds, as `by` knows it.
pub async fn held(by: &Node) -> BTreeMap<u64, u64> {
    let found = by.get(by.operator_key(), "/cluster/nodes").await;
    let nodes = found["nodes"].as_array().unwrap();
    nodes.iter().map(|n| (n["incarnation"].as_u64().unwrap(), n["shards"].as_u64().unwrap())).collect()
}

/// Waits until so many nodes have a share each; what each has.
pub async fn shared_out(by: &Node, nodes: usize) -> BTreeMap<u64, u64> {
    until(&format!("{nodes} nodes have a share each"), async || {
        let held = held(by).await;
        let fair = SHARDS / nodes as u64;
        let shared = held.len() == nodes && held.values().all(|n| (fair..=fair + 1).contains(n));
        shared.then_some(held)
    })
    .await
}
