//! Is it the provider, and these very bytes?

use hmac::{Hmac, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;

use super::Credentials;
use crate::{Headers, Refused};

/// The handshake's challenge is echoed up to this length.
const CHALLENGE_MAX: usize = 256;

/// Echoes the challenge of a handshake whose token is ours.
pub(super) fn challenge(credentials: &Credentials, query: &[(String, String)]) -> Result<String, Refused> {
    let get = |name: &str| query.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str()).ok_or(Refused);
    let (mode, token, challenge) = (get("hub.mode")?, get("hub.verify_token")?, get("hub.challenge")?);
    let ours: bool = token.as_bytes().ct_eq(credentials.verify_token.as_bytes()).into();
    let printable = challenge.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if mode == "subscribe" && ours && printable && (1..=CHALLENGE_MAX).contains(&challenge.len()) {
        Ok(challenge.to_owned())
    } else {
        Err(Refused)
    }
}

/// HMAC-SHA256 of the raw body under the present or the previous secret, as lower-case hex behind `sha256=`.
/// Both keys are always tried, so that time tells nothing.
pub(super) fn signature(credentials: Option<&Credentials>, headers: Headers<'_>, body: &[u8]) -> bool {
    let given = headers("x-hub-signature-256").unwrap_or_default();
    let given = given.strip_prefix(b"sha256=").and_then(unhex).unwrap_or([0; 32]);
    let matches = |secret: &[u8]| -> bool {
        // HMAC takes keys of any length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret) else { return false };
        mac.update(body);
        mac.finalize().into_bytes()[..].ct_eq(&given).into()
    };
    let Some(credentials) = credentials else {
        let _ = matches(b"nobody") | matches(b"nobody either");
        return false;
    };
    let previous = credentials.app_secret_previous.as_deref();
    let now = matches(credentials.app_secret.as_bytes());
    let before = matches(previous.unwrap_or(&credentials.app_secret).as_bytes());
    now | before
}

fn unhex(text: &[u8]) -> Option<[u8; 32]> {
    if text.len() != 64 {
        return None;
    }
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let mut out = [0; 32];
    for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Connector as _, whatsapp::WhatsApp};
    use serde_json::json;

    fn sign(secret: &str, body: &[u8]) -> Vec<u8> {
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
        mac.update(body);
        let hex: String = mac.finalize().into_bytes().iter().map(|b| format!("{b:02x}")).collect();
        format!("sha256={hex}").into_bytes()
    }

    #[test]
    fn a_known_answer() {
        // Computed with another implementation: hmac.new(b'secret', b'{"a":1}', 'sha256') in Python.
        let signature = b"sha256=aa9e2e3575f5d7098b6caccd790888c36d5fdb63342a73bada2d6a51747a8494".to_vec();
        let c = json!({"app_secret": "secret", "verify_token": "v", "access_token": "t"});
        assert!(WhatsApp.verify(&c, &|_| Some(signature.clone()), br#"{"a":1}"#));
        assert!(WhatsApp.verify(&c, &|_| Some(sign("secret", b"{}")), b"{}"));
    }

    #[test]
    fn two_secrets_live_during_rotation_and_no_other() {
        let c = json!({"app_secret": "new", "app_secret_previous": "old", "verify_token": "v", "access_token": "t"});
        for (secret, ok) in [("new", true), ("old", true), ("other", false), ("", false)] {
            assert_eq!(WhatsApp.verify(&c, &|_| Some(sign(secret, b"body")), b"body"), ok, "{secret}");
        }
        assert!(!WhatsApp.verify(&c, &|_| Some(sign("new", b"body")), b"body\n"), "other bytes");
        assert!(!WhatsApp.verify(&c, &|_| None, b"body"), "no header");
        let upper = String::from_utf8(sign("new", b"body"))
            .unwrap()
            .to_uppercase()
            .replace("SHA256", "sha256")
            .into_bytes();
        assert!(!WhatsApp.verify(&c, &|_| Some(upper.clone()), b"body"), "lower hex only");
        assert!(!WhatsApp.verify(&json!({}), &|_| Some(sign("", b"body")), b"body"), "no credentials");
    }

    #[test]
    fn the_challenge_is_echoed_only_for_our_token_and_plain_text() {
        let c = json!({"app_secret": "s", "verify_token": "vt", "access_token": "t"});
        let q = |mode: &str, token: &str, challenge: &str| {
            [("hub.mode", mode), ("hub.verify_token", token), ("hub.challenge", challenge)]
                .map(|(a, b)| (a.to_owned(), b.to_owned()))
                .to_vec()
        };
        assert_eq!(WhatsApp.challenge(&c, &q("subscribe", "vt", "12_a-B")), Ok("12_a-B".into()));
        for bad in [
            q("subscribe", "x", "12"),
            q("unsubscribe", "vt", "12"),
            q("subscribe", "vt", "<b>"),
            q("subscribe", "vt", ""),
            q("subscribe", "vt", &"1".repeat(257)),
            vec![],
        ] {
            assert_eq!(WhatsApp.challenge(&c, &bad), Err(Refused), "{bad:?}");
        }
    }
}
