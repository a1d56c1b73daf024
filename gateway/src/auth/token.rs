//! JSON Web Tokens. Every key names its algorithm and the tenants that it may speak for; the header's `alg` only has
//! to agree, `kid` picks the key.

use std::collections::HashSet;

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, decode_header, encode};
use patchbay_protocol::Timestamp;
use patchbay_protocol::principal::Role;
use serde::{Deserialize, Serialize};

use super::Refusal;

/// What a token says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Claims {
    /// The tenant; none for an operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Who.
    #[serde(default)]
    pub sub: String,
    /// As what; none for a plain token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// The account of a contact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
    /// The display name of a contact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// When it was issued, in seconds.
    #[serde(default)]
    pub iat: i64,
    /// When it ends, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exp: Option<i64>,
    /// Its own id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jti: Option<String>,
}

/// For whom a key may speak.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Speaks {
    /// Every tenant, and operators.
    Everyone,
    /// These tenants.
    Tenants(HashSet<String>),
}

/// One key that tokens are verified with.
pub struct TokenKey {
    /// Its id, as in the header's `kid`.
    pub id: Option<String>,
    /// Its algorithm.
    pub algorithm: Algorithm,
    /// The key.
    pub key: DecodingKey,
    /// For whom it may speak.
    pub speaks: Speaks,
}

/// The keys of a node, and the one that it signs with.
pub struct TokenKeys {
    keys: Vec<TokenKey>,
    signing: Option<EncodingKey>,
}

/// The id of the key that a node signs with.
pub const OWN_KEY: &str = "patchbay";
/// The longest token.
const TOKEN_BYTES_MAX: usize = 8 * 1024;
/// Seconds that an `iat` may lie in the future.
const IAT_SKEW_S: i64 = 60;

impl TokenKeys {
    /// Verifies with `keys` and, when there is one, with the node's own secret, which it also signs with.
    pub fn new(mut keys: Vec<TokenKey>, own_secret: Option<&[u8]>) -> Self {
        if let Some(secret) = own_secret {
            let key = DecodingKey::from_secret(secret);
            keys.push(TokenKey {
                id: Some(OWN_KEY.into()),
                algorithm: Algorithm::HS256,
                key,
                speaks: Speaks::Everyone,
            });
        }
        Self { keys, signing: own_secret.map(EncodingKey::from_secret) }
    }

    /// A signed token, when the node has a secret of its own.
    pub fn issue(&self, claims: &Claims) -> Option<String> {
        let header = Header { kid: Some(OWN_KEY.into()), ..Header::new(Algorithm::HS256) };
        encode(&header, claims, self.signing.as_ref()?).ok()
    }

    /// What the token says, if one of the keys that may speak for its tenant has signed it and it is in its time.
    pub fn verify(&self, token: &str, now: Timestamp) -> Result<Claims, Refusal> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(Refusal::Invalid);
        }
        let header = decode_header(token).map_err(|_| Refusal::Invalid)?;
        let fits = |k: &&TokenKey| k.algorithm == header.alg && (header.kid.is_none() || header.kid == k.id);
        let claims =
            self.keys.iter().filter(fits).find_map(|key| verified(key, token)).ok_or(Refusal::Invalid)?;
        check(&claims, now.as_millis())?;
        Ok(claims)
    }
}

fn verified(key: &TokenKey, token: &str) -> Option<Claims> {
    let mut validation = Validation::new(key.algorithm);
    validation.validate_exp = false;
    validation.validate_aud = false;
    validation.required_spec_claims.clear();
    let claims = decode::<Claims>(token, &key.key, &validation).ok()?.claims;
    let speaks = match &key.speaks {
        Speaks::Everyone => true,
        Speaks::Tenants(tenants) => {
            claims.tenant.as_ref().is_some_and(|t| tenants.contains(t)) && claims.role != Some(Role::Operator)
        }
    };
    speaks.then_some(claims)
}

fn check(claims: &Claims, now_ms: i64) -> Result<(), Refusal> {
    if let Some(role) = claims.role {
        let complete = claims.iat > 0
            && claims.exp.is_some()
            && claims.jti.as_ref().is_some_and(|j| !j.is_empty())
            && !claims.sub.is_empty();
        let tenant = claims.tenant.is_some() != (role == Role::Operator);
        let account = claims.account.is_some() || role != Role::Contact;
        if !(complete && tenant && account) {
            return Err(Refusal::Invalid);
        }
    }
    if claims.iat.saturating_sub(IAT_SKEW_S).saturating_mul(1000) > now_ms {
        return Err(Refusal::Invalid);
    }
    match claims.exp {
        Some(exp) if exp.saturating_mul(1000) <= now_ms => Err(Refusal::Expired),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine as _;
    use base64::prelude::BASE64_URL_SAFE_NO_PAD as B64;

    fn claims() -> Claims {
        Claims {
            tenant: Some("demo".into()),
            sub: "anna".into(),
            role: Some(Role::Agent),
            account: None,
            name: None,
            iat: 1000,
            exp: Some(2000),
            jti: Some("j".into()),
        }
    }

    fn now() -> Timestamp {
        Timestamp::from_seconds(1500)
    }

    #[test]
    fn our_own_tokens_are_good_until_they_expire() {
        let keys = TokenKeys::new(vec![], Some(b"secret"));
        let token = keys.issue(&claims()).unwrap();
        assert_eq!(keys.verify(&token, now()), Ok(claims()));
        assert_eq!(keys.verify(&token, Timestamp::from_seconds(2000)), Err(Refusal::Expired));
        assert_eq!(
            keys.verify(&token, Timestamp::from_seconds(10)),
            Err(Refusal::Invalid),
            "issued in the future"
        );
    }

    #[test]
    fn nothing_else_is() {
        let keys = TokenKeys::new(vec![], Some(b"secret"));
        let token = keys.issue(&claims()).unwrap();
        let forged = TokenKeys::new(vec![], Some(b"other")).issue(&claims()).unwrap();
        let none =
            format!("{}.{}.", B64.encode(r#"{"alg":"none","typ":"JWT"}"#), token.split('.').nth(1).unwrap());
        let mut cut = token.clone();
        cut.truncate(token.len() - 2);
        for bad in [forged.as_str(), &none, &cut, "", "a.b.c", &"x".repeat(10_000)] {
            assert_eq!(keys.verify(bad, now()), Err(Refusal::Invalid), "{bad}");
        }
        assert_eq!(
            TokenKeys::new(vec![], None).verify(&token, now()),
            Err(Refusal::Invalid),
            "no key configured"
        );
    }

    #[test]
    fn every_claim_of_a_role_is_required() {
        let keys = TokenKeys::new(vec![], Some(b"secret"));
        let cases: [fn(&mut Claims); 6] = [
            |c| c.tenant = None,
            |c| c.sub.clear(),
            |c| c.iat = 0,
            |c| c.exp = None,
            |c| c.jti = None,
            |c| c.role = Some(Role::Operator),
        ];
        for (n, change) in cases.iter().enumerate() {
            let mut c = claims();
            change(&mut c);
            assert_eq!(keys.verify(&keys.issue(&c).unwrap(), now()), Err(Refusal::Invalid), "case {n}");
        }
    }

    #[test]
    fn a_key_speaks_for_its_tenants_and_by_its_algorithm_only() {
        let key = |tenants: &[&str]| TokenKey {
            id: None,
            algorithm: Algorithm::HS256,
            key: DecodingKey::from_secret(b"secret"),
            speaks: Speaks::Tenants(tenants.iter().map(|t| (*t).to_owned()).collect()),
        };
        let header = Header::new(Algorithm::HS256);
        let token = encode(&header, &claims(), &EncodingKey::from_secret(b"secret")).unwrap();
        assert!(TokenKeys::new(vec![key(&["demo"])], None).verify(&token, now()).is_ok());
        assert_eq!(TokenKeys::new(vec![key(&["other"])], None).verify(&token, now()), Err(Refusal::Invalid));
        let longer =
            encode(&Header::new(Algorithm::HS512), &claims(), &EncodingKey::from_secret(b"secret")).unwrap();
        assert_eq!(TokenKeys::new(vec![key(&["demo"])], None).verify(&longer, now()), Err(Refusal::Invalid));
    }

    /// A key as it is configured.
    fn configured(algorithm: &str, pem: &str) -> Result<TokenKeys, String> {
        let mut config = crate::config::Config::default();
        config.auth.keys.push(
            serde_json::from_value(serde_json::json!({
                "algorithm": algorithm, "public_key": pem, "tenants": ["demo"],
            }))
            .unwrap(),
        );
        config.token_keys()
    }

    #[test]
    fn what_others_have_signed_by_their_own_keys_is_good_by_that_key_and_algorithm_only() {
        let signed = [
            ("RS256", include_str!("signed/RS256.pem"), include_str!("signed/RS256.jwt")),
            ("ES256", include_str!("signed/ES256.pem"), include_str!("signed/ES256.jwt")),
            ("EdDSA", include_str!("signed/EdDSA.pem"), include_str!("signed/EdDSA.jwt")),
        ];
        for (algorithm, pem, token) in signed {
            let keys = configured(algorithm, pem).unwrap();
            assert_eq!(keys.verify(token.trim(), now()), Ok(claims()), "{algorithm}");
            for (other, _, token) in signed.iter().filter(|(other, ..)| *other != algorithm) {
                assert_eq!(keys.verify(token.trim(), now()), Err(Refusal::Invalid), "{algorithm} {other}");
            }
            let mut forged = token.trim().to_owned();
            forged.replace_range(
                forged.len() - 9..forged.len() - 8,
                if forged.as_bytes()[forged.len() - 9] == b'A' { "B" } else { "A" },
            );
            assert_eq!(keys.verify(&forged, now()), Err(Refusal::Invalid), "{algorithm}");
            // A public key is no shared secret.
            let confused =
                encode(&Header::new(Algorithm::HS256), &claims(), &EncodingKey::from_secret(pem.as_bytes()));
            assert_eq!(keys.verify(&confused.unwrap(), now()), Err(Refusal::Invalid), "{algorithm}");
        }
        assert!(configured("RS256", include_str!("signed/ES256.pem")).is_err());
        assert!(configured("RS512", include_str!("signed/RS256.pem")).is_err());
    }
}
