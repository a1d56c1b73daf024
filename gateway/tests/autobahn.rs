//! Autobahn's WebSocket cases (groups 1 to 7 and 10) against our settings: none failed, none unclean.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

const GROUPS: [&str; 8] = ["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*"];

/// Cargo builds examples beside the tests.
fn echo() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().join("examples/echo")
}

#[test]
fn none_failed_none_unclean() {
    if std::env::var_os("PATCHBAY_TEST_QUICK").is_some() {
        return;
    }
    let sdk = PathBuf::from(std::env::var_os("PATCHBAY_SDK").expect("`./x test` says where the tools are"));
    let mut server = Command::new(echo()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut address = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut address).unwrap();
    let reports = tempfile::tempdir().unwrap();
    let mut kosoku = Command::new(sdk.join("py/bin/kosoku"));
    kosoku.arg(address.trim()).arg("-o").arg(reports.path()).args(["-p", "4"]);
    for group in GROUPS {
        kosoku.args(["-i", group]);
    }
    let output = kosoku.output().unwrap();
    // Its input ends, and so does it.
    drop(server.stdin.take());
    server.wait().unwrap();
    let index = std::fs::read(reports.path().join("index.json")).unwrap_or_else(|_| panic!("{output:?}"));
    let index: BTreeMap<String, BTreeMap<String, Value>> = serde_json::from_slice(&index).unwrap();
    let cases: Vec<(&String, &Value)> = index.values().flatten().collect();
    assert!(cases.len() >= 247, "{} cases", cases.len());
    for (case, result) in cases {
        let (behaviour, close) =
            (result["behavior"].as_str().unwrap(), result["behaviorClose"].as_str().unwrap());
        assert!(["OK", "NON-STRICT", "INFORMATIONAL"].contains(&behaviour), "case {case}: {behaviour}");
        assert!(["OK", "INFORMATIONAL"].contains(&close), "case {case} closes {close}");
    }
    assert!(output.status.success());
}
