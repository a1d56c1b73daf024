//! API keys: 256 random bits, shown once, stored as a hash.

use std::sync::Arc;

use async_trait::async_trait;
use patchbay_actors::clock::Clock;
use patchbay_actors::directory::{Directory, Key, KeyScope};
use patchbay_admin_api::{Authenticator, TokenIssuer};
use patchbay_protocol::ids::{AccountId, AgentId, TenantId};
use patchbay_protocol::principal::{Principal, Role};
use patchbay_protocol::{CommandError, ErrorCode, Timestamp};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::{Auth, Claims, Peer, Refusal};
use crate::limits::Limits;

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

/// A key's id and record around its secret.
fn record(name: &str, scope: KeyScope, secret: &str, now: Timestamp) -> (String, Key) {
    let hash = hash(secret);
    let key = Key {
        name: name.to_owned(),
        scope,
        prefix: secret.chars().take(10).collect(),
        created_at: now,
        last_used_at: None,
        hash: hash.clone(),
    };
    // Of the hash: to store a secret again is to store the same key.
    (format!("key_{}", &hash[..16]), key)
}

/// Stores a given secret as a key of a tenant, once.
pub async fn put(
    directory: &Directory,
    tenant: &TenantId,
    name: &str,
    secret: &str,
    now: Timestamp,
) -> Result<(), CommandError> {
    let (id, key) = record(name, KeyScope::Full, secret, now);
    if directory.key_owner(&key.hash).await?.is_some() {
        return Ok(());
    }
    directory.put_key(tenant, &id, &key).await
}

/// The doorkeeper of the API.
pub struct ApiAuth {
    operator_hash: Option<[u8; 32]>,
    directory: Arc<Directory>,
    auth: Arc<Auth>,
    clock: Clock,
    limits: Arc<Limits>,
}

impl ApiAuth {
    /// Without an operator key nobody is the operator.
    pub fn new(
        operator_key: Option<&str>,
        directory: Arc<Directory>,
        auth: Arc<Auth>,
        clock: Clock,
        limits: Arc<Limits>,
    ) -> Self {
        let operator_hash =
            operator_key.filter(|k| !k.is_empty()).map(|k| Sha256::digest(k.as_bytes()).into());
        Self { operator_hash, directory, auth, clock, limits }
    }
}

/// Claims of somebody of a tenant, issued at `now`.
fn claims(tenant: &TenantId, sub: &str, now: Timestamp) -> Claims {
    let jti: u128 = rand::random();
    Claims {
        tenant: Some(tenant.to_string()),
        sub: sub.to_owned(),
        role: None,
        account: None,
        name: None,
        iat: now.as_millis() / 1000,
        exp: None,
        jti: Some(format!("{jti:032x}")),
    }
}

impl ApiAuth {
    /// Agents and visitors come with the token of their socket.
    async fn by_token(&self, token: &str) -> Result<Principal, CommandError> {
        match self.auth.admit(token, self.clock.now()).await {
            Ok((Peer::Agent(agent), _)) => {
                self.limits.agent(&agent.tenant, &agent.agent)?;
                Ok(Principal::Agent(agent))
            }
            Ok((Peer::Contact(contact), _)) => {
                self.limits.tenant(&contact.tenant)?;
                Ok(Principal::Contact(contact))
            }
            Err(Refusal::Unavailable) => Err(CommandError::unavailable()),
            // An operator's token is for its socket: what an operator does by the API wants the key.
            Ok((Peer::Plain(_) | Peer::Operator, _)) | Err(_) => Err(ErrorCode::Unauthorized.into()),
        }
    }

    fn sign(&self, claims: Claims, ttl_s: u64) -> Result<(String, Timestamp), CommandError> {
        let exp = claims.iat.saturating_add(i64::try_from(ttl_s).unwrap_or(i64::MAX / 2));
        let claims = Claims { exp: Some(exp), ..claims };
        let token = self.auth.keys().issue(&claims).ok_or(ErrorCode::NotAvailable)?;
        Ok((token, Timestamp::from_seconds(exp)))
    }
}

#[async_trait]
impl Authenticator for ApiAuth {
    async fn principal(&self, bearer: &str) -> Result<Principal, CommandError> {
        let given: [u8; 32] = Sha256::digest(bearer.as_bytes()).into();
        if self.operator_hash.is_some_and(|own| own.ct_eq(&given).into()) {
            return Ok(Principal::Operator);
        }
        if bearer.split('.').count() == 3 {
            return self.by_token(bearer).await;
        }
        let owner = self.directory.key_owner(&hex(&given)).await?.ok_or(ErrorCode::Unauthorized)?;
        if let Err(error) = self.directory.key_used(&owner, self.clock.now()).await {
            // The key is good all the same.
            tracing::warn!(code = error.code.name(), "a key's use could not be noted");
        }
        self.limits.tenant(&owner.tenant)?;
        Ok(match owner.scope {
            KeyScope::Full => Principal::Tenant(owner.tenant),
            KeyScope::Read => Principal::Reader(owner.tenant),
        })
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
        let now = self.clock.now().max(not_before.unwrap_or_default());
        self.sign(Claims { role: Some(role), ..claims(tenant, agent.as_str(), now) }, ttl_s)
    }

    fn issue_contact(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        visitor: &str,
        name: Option<&str>,
        ttl_s: u64,
    ) -> Result<(String, Timestamp), CommandError> {
        let contact = Claims {
            role: Some(Role::Contact),
            account: Some(account.to_string()),
            name: name.map(str::to_owned),
            ..claims(tenant, visitor, self.clock.now())
        };
        self.sign(contact, ttl_s)
    }

    async fn create_key(
        &self,
        tenant: &TenantId,
        name: &str,
        scope: KeyScope,
    ) -> Result<(String, String, Key), CommandError> {
        let secret = fresh_secret();
        let (id, key) = record(name, scope, &secret, self.clock.now());
        self.directory.put_key(tenant, &id, &key).await?;
        Ok((id, secret, key))
    }
}
