//! A tenant of its own on the node under test: two accounts, agents, conversations.

use patchbay_protocol::client::Encoding;
use patchbay_protocol::{AccountId, ConversationId, TenantId};
use serde_json::{Value, json};

use super::Plan;

/// What signs customers' webhooks.
pub const APP_SECRET: &str = "load";
/// The number that they write to.
pub const NUMBER: &str = "1001";

/// The node under test.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its public address: `127.0.0.1:8000`.
    pub public: String,
    /// The operator's key.
    pub operator_key: String,
    /// Its process, whose CPU time is told apart.
    pub pid: Option<u32>,
    /// The client.
    pub http: reqwest::Client,
}

/// Why a load cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request.
    #[error("{0}")]
    Http(#[from] reqwest::Error),
    /// A socket.
    #[error("{0}")]
    Socket(#[from] Box<tokio_tungstenite::tungstenite::Error>),
    /// It was told to come again.
    #[error("told to come again")]
    Again,
    /// An answer that was not expected.
    #[error("{0}")]
    Refused(String),
    /// A file.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// What was set up.
#[derive(Clone)]
pub struct World {
    /// The tenant.
    pub tenant: String,
    /// Agents' tokens.
    pub tokens: Vec<String>,
    /// Conversations with customers, by the customer's number.
    pub customers: Vec<(String, ConversationId)>,
    /// Conversations with visitors.
    pub visitors: Vec<ConversationId>,
}

impl Target {
    /// The node that wrote this ready file.
    pub fn of_ready_file(file: &std::path::Path) -> Result<Self, Error> {
        let ready: Value = serde_json::from_slice(&std::fs::read(file)?).map_err(std::io::Error::other)?;
        let text = |name: &str| ready[name].as_str().unwrap_or("").to_owned();
        Ok(Self { public: text("public"), operator_key: text("operator_key"), pid: None, http: client()? })
    }

    async fn ask(&self, key: &str, method: reqwest::Method, path: &str, body: Value) -> Result<Value, Error> {
        let url = format!("http://{}/api/v1{path}", self.public);
        let answer = self.http.request(method.clone(), url).bearer_auth(key).json(&body).send().await?;
        let status = answer.status();
        let text = answer.text().await?;
        if status.is_success() {
            Ok(serde_json::from_str(&text).unwrap_or(Value::Null))
        } else {
            Err(Error::Refused(format!("{method} {path}: {status} {text}")))
        }
    }
}

/// A client that keeps its connections.
pub fn client() -> Result<reqwest::Client, reqwest::Error> {
    reqwest::Client::builder().no_proxy().pool_max_idle_per_host(512).build()
}

fn id_of(tenant: &str, account: &str, thread: &str) -> Result<ConversationId, Error> {
    let bad = |_| Error::Refused("a name of our own".into());
    let (tenant, account): (TenantId, AccountId) =
        (tenant.parse().map_err(bad)?, account.parse().map_err(bad)?);
    Ok(ConversationId::derive(&tenant, &account, thread))
}

/// Sets everything up.
pub(super) async fn prepare(target: &Target, plan: &Plan) -> Result<World, Error> {
    use reqwest::Method;
    let tenant = format!("load-{:08x}", rand::random::<u32>());
    let made = target
        .ask(&target.operator_key, Method::POST, "/tenants", json!({"id": tenant, "name": "Load"}))
        .await?;
    let key = made["key"].as_str().unwrap_or("").to_owned();
    let put = async |path: &str, body: Value| target.ask(&key, Method::PUT, path, body).await;
    put("/inboxes/main", json!({"name": "Main"})).await?;
    let chat = json!({"connector": "webchat", "inbox": "main", "name": "Chat", "external_id": "site", "credentials": {}});
    put("/accounts/chat", chat).await?;
    let wa = json!({
        "connector": "whatsapp", "inbox": "main", "name": "WhatsApp", "external_id": NUMBER,
        "credentials": {"app_secret": APP_SECRET, "verify_token": "v", "access_token": "t"},
    });
    put("/accounts/wa", wa).await?;
    let mut world = World { tenant: tenant.clone(), tokens: vec![], customers: vec![], visitors: vec![] };
    for n in 0..plan.agents {
        let agent = json!({"name": "Load", "role": "admin", "inboxes": ["main"]});
        put(&format!("/agents/agent-{n}"), agent).await?;
        let path = format!("/agents/agent-{n}/tokens");
        let token = target.ask(&key, Method::POST, &path, json!({"ttl_s": 86400})).await?;
        world.tokens.push(token["token"].as_str().unwrap_or("").to_owned());
    }
    for n in 0..plan.conversations {
        let visitor = format!("visitor-{n}");
        let hello =
            json!({"to": visitor, "client_id": "hello", "content": {"type": "text", "text": "hello"}});
        target.ask(&key, Method::POST, "/accounts/chat/messages", hello).await?;
        world.visitors.push(id_of(&tenant, "chat", &visitor)?);
        if plan.customer_rate > 0.0 {
            let customer = format!("3460{n:07}");
            let body = super::customer::body(&customer, &format!("open-{tenant}-{n}"), "hello");
            super::customer::post(target, &tenant, body).await?;
            world.customers.push((customer.clone(), id_of(&tenant, "wa", &customer)?));
        }
    }
    Ok(world)
}

/// The encoding of the `n`th agent.
pub(super) fn encoding(plan: &Plan, n: usize) -> Encoding {
    plan.encodings.get(n % plan.encodings.len().max(1)).copied().unwrap_or(Encoding::Json)
}
