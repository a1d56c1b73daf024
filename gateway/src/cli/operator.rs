//! How a command of the operator reaches a node.

use clap::Args;
use reqwest::Method;
use serde_json::Value;

use super::{ConfigArgs, Failure};
use crate::config::Config;

/// Which node, and by which key.
#[derive(Args)]
pub(crate) struct OperatorArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The node's public address, such as `http://127.0.0.1:8000`. Otherwise the one that runs on the data directory.
    #[arg(long)]
    url: Option<String>,
    /// The operator's key. Otherwise the configured one, or that of the data directory.
    #[arg(long, env = "PATCHBAY_OPERATOR_KEY", hide_env_values = true)]
    key: Option<String>,
}

/// The operator's key: what was given, what is configured, or what the data directory keeps.
pub(super) fn key(given: Option<&String>, config: &Config) -> Result<String, Failure> {
    let kept = || std::fs::read_to_string(config.storage.data_dir.join("operator_key")).ok();
    let key = match given {
        Some(key) => Some(key.clone()),
        None => config.operator_key().map_err(Failure::Other)?.or_else(kept),
    };
    key.ok_or_else(|| Failure::Other("the operator's key is not known: give --key".into()))
}

impl OperatorArgs {
    /// Asks the node's admin API; null where it answers nothing.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<Value, Failure> {
        let config = self.config.load().map_err(Failure::Config)?;
        let dir = &config.storage.data_dir;
        let url = match &self.url {
            Some(url) => url.trim_end_matches('/').to_owned(),
            None => {
                let node = super::backup::running(dir)
                    .ok_or_else(|| Failure::Other("no node runs there: give --url".into()))?;
                format!("http://{}", node["public"].as_str().unwrap_or_default())
            }
        };
        let key = key(self.key.as_ref(), &config)?;
        let client = reqwest::Client::builder().no_proxy().build()?;
        let mut request = client.request(method, format!("{url}/api/v1/{path}")).bearer_auth(key.trim());
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await?;
        let status = answer.status();
        let text = answer.text().await?;
        let value: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        if status.is_success() {
            return Ok(value);
        }
        let detail = value["detail"].as_str().or(value["title"].as_str()).unwrap_or_default();
        Err(Failure::Other(format!("the node answered {status}: {detail}")))
    }
}
