//! File, environment, flags: read, merged, and every fault named at once.

use std::path::Path;

use serde::Deserialize as _;
use toml::{Table, Value};

use super::Config;

/// Every fault of a configuration, a line each.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigError(pub Vec<String>);

impl std::fmt::Display for ConfigError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for ConfigError {}

/// Variables of the environment that are ours.
const PREFIX: &str = "PATCHBAY__";

/// Reads the file, lays the environment over it and `flags` (key, value) over both.
pub fn load(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    flags: &[(&str, Value)],
) -> Result<Config, ConfigError> {
    let mut faults = Vec::new();
    let mut table = match file {
        Some(path) => read(path, &mut faults),
        None => Table::new(),
    };
    for (name, value) in environment {
        if let Some(rest) = name.strip_prefix(PREFIX) {
            let key = rest.to_lowercase().replace("__", ".");
            let value = parse_env(&key, value);
            set(&mut table, &key, value);
        }
    }
    for (key, value) in flags {
        set(&mut table, key, value.clone());
    }
    unknown(&table, "", &mut faults);
    wrong(&table, &mut faults);
    if !faults.is_empty() {
        return Err(ConfigError(faults));
    }
    let config = Config::deserialize(Value::Table(table)).map_err(|e| ConfigError(vec![fault_of(&e)]))?;
    let faults = config.faults();
    if faults.is_empty() { Ok(config) } else { Err(ConfigError(faults)) }
}

fn read(path: &Path, faults: &mut Vec<String>) -> Table {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) => {
            faults.push(format!("{}: {e}", path.display()));
            return Table::new();
        }
    };
    text.parse().unwrap_or_else(|e: toml::de::Error| {
        faults.push(format!("{}: {}", path.display(), e.message().replace('\n', " ")));
        Table::new()
    })
}

fn fault_of(e: &toml::de::Error) -> String {
    e.message().replace('\n', " ")
}

/// What is wrong with one value by itself.
fn fault_in(key: &str, value: Value) -> Option<String> {
    let mut alone = Table::new();
    set(&mut alone, key, value);
    Config::deserialize(Value::Table(alone)).err().map(|e| fault_of(&e))
}

/// A value of the environment: as TOML (a number, a list) where its key takes that, else as text.
fn parse_env(key: &str, text: String) -> Value {
    let as_toml = format!("v = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("v"));
    match as_toml {
        Some(value) if fault_in(key, value.clone()).is_none() => value,
        _ => Value::String(text),
    }
}

/// Names every key whose value is not what it takes.
fn wrong(table: &Table, faults: &mut Vec<String>) {
    for (key, _) in Config::known_keys() {
        let mut at = Some(table);
        let mut found = None;
        for part in key.split('.') {
            found = at.and_then(|t| t.get(part));
            at = found.and_then(Value::as_table);
        }
        // One of a list of tables is looked at with its list.
        if let Some(fault) = found.and_then(|value| fault_in(&key, value.clone())) {
            faults.push(format!("{key}: {fault}"));
        }
    }
    let lists = table.iter().flat_map(|(section, inner)| {
        inner.as_table().into_iter().flatten().map(move |(name, value)| (format!("{section}.{name}"), value))
    });
    for (key, value) in
        lists.filter(|(_, value)| value.as_array().is_some_and(|l| l.iter().any(Value::is_table)))
    {
        faults.extend(fault_in(&key, value.clone()).map(|fault| format!("{key}: {fault}")));
    }
}

fn set(table: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
        }
        Some((section, rest)) => {
            let inner = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(inner) = inner {
                set(inner, rest, value);
            }
        }
    }
}

/// Names every key that is not known, with the nearest one that is.
fn unknown(table: &Table, prefix: &str, faults: &mut Vec<String>) {
    let known: Vec<String> = Config::known_keys().into_iter().map(|(k, _)| k).collect();
    for (name, value) in table {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        let is_section = known.iter().any(|k| k.starts_with(&format!("{key}.")));
        match value {
            _ if known.contains(&key) => {}
            // A section that is not known is named by its keys, which tell better what was meant.
            Value::Table(inner) if is_section || !inner.is_empty() => unknown(inner, &key, faults),
            Value::Array(list) if is_section => {
                for inner in list.iter().filter_map(Value::as_table) {
                    unknown(inner, &key, faults);
                }
            }
            _ => {
                let nearest = known.iter().min_by_key(|k| distance(k, &key)).map_or("", String::as_str);
                faults.push(format!("unknown key `{key}`; the nearest known key is `{nearest}`"));
            }
        }
    }
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut before = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let change = before + usize::from(ca != *cb);
            before = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(before + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn env(pairs: &[(&str, &str)]) -> impl Iterator<Item = (String, String)> {
        pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn flags_beat_the_environment_beats_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.toml");
        std::fs::write(&file, "[public]\nlisten = \"127.0.0.1:1\"\n[ops]\nlisten = \"127.0.0.1:2\"\n[drain]\ndeadline = \"5s\"\n").unwrap();
        let vars = [
            ("PATCHBAY__OPS__LISTEN", "127.0.0.1:3"),
            ("PATCHBAY__CLUSTER__SHARDS", "16"),
            ("HOME", "/"),
            ("PATCHBAY_X", "1"),
        ];
        let config = load(Some(&file), env(&vars), &[("cluster.shards", Value::Integer(8))]).unwrap();
        assert_eq!(
            (config.public.listen.as_str(), config.ops.listen.as_str(), config.cluster.shards),
            ("127.0.0.1:1", "127.0.0.1:3", 8)
        );
        assert_eq!(config.drain.deadline, Duration::from_secs(5));
    }

    #[test]
    fn every_unknown_key_is_named_with_the_nearest() {
        let ConfigError(faults) =
            load(None, env(&[("PATCHBAY__PUBLIC__LISTN", "x"), ("PATCHBAY__OPPS__LISTEN", "y")]), &[])
                .unwrap_err();
        assert_eq!(faults.len(), 2, "{faults:?}");
        assert!(
            faults.iter().any(|f| f.contains("`public.listn`") && f.contains("`public.listen`")),
            "{faults:?}"
        );
        assert!(
            faults.iter().any(|f| f.contains("`opps.listen`") && f.contains("`ops.listen`")),
            "{faults:?}"
        );
    }

    #[test]
    fn wrong_values_are_faults() {
        let ConfigError(faults) = load(
            None,
            env(&[("PATCHBAY__CLUSTER__SHARDS", "3"), ("PATCHBAY__PUBLIC__LISTEN", "nowhere")]),
            &[],
        )
        .unwrap_err();
        assert_eq!(faults.len(), 2, "{faults:?}");
    }

    #[test]
    fn every_wrong_value_is_named_beside_what_is_unknown() {
        let vars = [
            ("PATCHBAY__DRAIN__DEADLINE", "5"),
            ("PATCHBAY__LIMITS__CONNECTIONS", "x"),
            ("PATCHBAY__PUBLIC__LISTN", "x"),
        ];
        let ConfigError(faults) = load(None, env(&vars), &[]).unwrap_err();
        for key in ["drain.deadline", "limits.connections", "public.listn"] {
            assert_eq!(faults.iter().filter(|f| f.contains(key)).count(), 1, "{key}: {faults:?}");
        }
    }

    #[test]
    fn the_environment_is_typed_by_its_key() {
        let vars = [
            ("PATCHBAY__AUTH__OPERATOR_KEY", "123456"),
            ("PATCHBAY__AUTH__HMAC_SECRET_KEY", "true"),
            ("PATCHBAY__STORAGE__DATA_DIR", "2026-11-21"),
            ("PATCHBAY__PROVIDERS__ALLOWED_HOSTS", "[\"a.example\", \"b.example\"]"),
            ("PATCHBAY__LIMITS__MEMORY", "2GiB"),
        ];
        let config = load(None, env(&vars), &[]).unwrap();
        assert_eq!(config.operator_key().unwrap().as_deref(), Some("123456"));
        assert_eq!(config.storage.data_dir, Path::new("2026-11-21"));
        assert_eq!(config.providers.allowed_hosts, ["a.example", "b.example"]);
    }
}
