//! API keys: 256 random bits, shown once, stored as a hash.

use std::sync::Arc;

use async_trait::async_trait;
use patchbay_actors::clock::Clock;
use patchbay_actors::directory::{Directory, Key};
use patchbay_admin_api::{Authenticator, TokenIssuer};
use patchbay_protocol::ids::{AgentId, TenantId};
use patchbay_protocol::principal::{Principal, Role};
use patchbay_protocol::{CommandError, ErrorCode, Timestamp};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::{Auth, Claims};

/// A fresh secret: `pb_` and 64 hex digits.
pub fn fresh_secret() -> String {
    let bits: [u8; 32] = rand::random();
    format!("pb_{}", hex(&bits))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// What a secret is stored by.
pub fn hash(secret: &str) -> String {
    hex(&Sha256::digest(secret.as_bytes()))
}

/// Stores a new key of a tenant; the secret is told only here.
pub async fn create(
    directory: &Directory,
    tenant: &TenantId,
    name: &str,
    now: Timestamp,
) -> Result<String, CommandError> {
    let secret = fresh_secret();
    put(directory, tenant, name, &secret, now).await?;
    Ok(secret)
}

/// Stores a given secret as a key of a tenant.
pub async fn put(
    directory: &Directory,
    tenant: &TenantId,
    name: &str,
    secret: &str,
    now: Timestamp,
) -> Result<(), CommandError> {
    let key = Key {
        tenant: tenant.clone(),
        name: name.to_owned(),
        prefix: secret.chars().take(10).collect(),
        created_at: now,
    };
    directory.put_key(&hash(secret), &key).await.map(|_| ())
}

/// The doorkeeper of the API.
pub struct ApiAuth {
    operator_hash: Option<[u8; 32]>,
    directory: Arc<Directory>,
    auth: Arc<Auth>,
    clock: Clock,
}

impl ApiAuth {
    /// Without an operator key nobody is the operator.
    pub fn new(operator_key: Option<&str>, directory: Arc<Directory>, auth: Arc<Auth>, clock: Clock) -> Self {
        let operator_hash =
            operator_key.filter(|k| !k.is_empty()).map(|k| Sha256::digest(k.as_bytes()).into());
        Self { operator_hash, directory, auth, clock }
    }
}

#[async_trait]
impl Authenticator for ApiAuth {
    async fn principal(&self, bearer: &str) -> Result<Principal, CommandError> {
        let given: [u8; 32] = Sha256::digest(bearer.as_bytes()).into();
        if self.operator_hash.is_some_and(|own| own.ct_eq(&given).into()) {
            return Ok(Principal::Operator);
        }
        match self.directory.key(&hex(&given)).await? {
            Some(key) => Ok(Principal::Tenant(key.tenant)),
            None => Err(ErrorCode::Unauthorized.into()),
        }
    }
}

#[async_trait]
impl TokenIssuer for ApiAuth {
    fn issue(
        &self,
        tenant: &TenantId,
        agent: &AgentId,
        role: Role,
        ttl_s: u64,
        not_before: Option<Timestamp>,
    ) -> Result<(String, Timestamp), CommandError> {
        let now = self.clock.now().max(not_before.unwrap_or_default()).as_millis() / 1000;
        let exp = now.saturating_add(i64::try_from(ttl_s).unwrap_or(i64::MAX / 2));
        let jti: u128 = rand::random();
        let claims = Claims {
            tenant: Some(tenant.to_string()),
            sub: agent.to_string(),
            role: Some(role),
            account: None,
            iat: now,
            exp: Some(exp),
            jti: Some(format!("{jti:032x}")),
        };
        let token = self.auth.keys().issue(&claims).ok_or(ErrorCode::NotAvailable)?;
        Ok((token, Timestamp::from_seconds(exp)))
    }

    async fn create_key(&self, tenant: &TenantId, name: &str) -> Result<String, CommandError> {
        create(&self.directory, tenant, name, self.clock.now()).await
    }
}
