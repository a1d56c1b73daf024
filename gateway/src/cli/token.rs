//! `patchbay token`: a token of an agent or an operator, signed with the node's own secret.

use clap::Args;
use patchbay_actors::clock::Clock;
use patchbay_protocol::principal::Role;
use patchbay_protocol::{AgentId, TenantId, Timestamp};
use serde_json::json;

use super::{ConfigArgs, Failure, dev};
use crate::auth::Claims;
use crate::auth::TokenKeys;

/// A token of an agent or an operator.
#[derive(Args)]
pub(crate) struct Token {
    #[command(flatten)]
    config: ConfigArgs,
    /// The tenant.
    #[arg(long, default_value = "demo")]
    tenant: TenantId,
    /// The agent.
    #[arg(long, default_value = "anna")]
    agent: AgentId,
    /// `agent`, `supervisor` or `admin`; it can only lower what the agent's document says.
    #[arg(long, default_value = "admin", value_parser = parse_role)]
    role: Role,
    /// Its life in seconds.
    #[arg(long, default_value_t = 3600)]
    ttl: u32,
    /// A token of an operator, who has no tenant.
    #[arg(long)]
    operator: bool,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

fn parse_role(text: &str) -> Result<Role, String> {
    [Role::Agent, Role::Supervisor, Role::Admin]
        .into_iter()
        .find(|r| r.as_str() == text)
        .ok_or_else(|| "agent, supervisor or admin".into())
}

/// The claims of an agent's token that is issued now.
pub(super) fn agent_claims(
    tenant: &TenantId,
    agent: &AgentId,
    role: Role,
    ttl_s: u32,
    now: Timestamp,
) -> Claims {
    let iat = now.as_millis() / 1000;
    let jti: u128 = rand::random();
    Claims {
        tenant: Some(tenant.to_string()),
        sub: agent.to_string(),
        role: Some(role),
        account: None,
        name: None,
        iat,
        exp: Some(iat + i64::from(ttl_s)),
        jti: Some(format!("{jti:032x}")),
    }
}

impl Token {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let config = self.config.load().map_err(Failure::Config)?;
        let keys = if config.auth.hmac_secret_key.is_some() {
            config.token_keys().map_err(Failure::Other)?
        } else {
            let data_dir = &config.storage.data_dir;
            let secret = dev::Secrets::hmac_of(data_dir).map_err(|e| {
                Failure::Other(format!(
                    "{}: {e}; `patchbay dev` makes a secret there when it starts, or set auth.hmac_secret_key",
                    data_dir.join("hmac_secret").display()
                ))
            })?;
            TokenKeys::new(vec![], Some(secret.as_bytes()))
        };
        let mut claims = agent_claims(&self.tenant, &self.agent, self.role, self.ttl, Clock::System.now());
        if self.operator {
            (claims.tenant, claims.sub, claims.role) = (None, "operator".into(), Some(Role::Operator));
        }
        let token =
            keys.issue(&claims).ok_or_else(|| Failure::Other("there is no secret to sign with".into()))?;
        if self.json {
            println!("{}", json!({"token": token, "expires_at": claims.exp.map(Timestamp::from_seconds)}));
        } else {
            println!("{token}");
        }
        Ok(())
    }
}
