//! Signed addresses of files: `/m/<what>.<signature>`. The signature covers tenant, id, expiry and disposition.

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use hmac::{Hmac, Mac};
use patchbay_protocol::{TenantId, Timestamp};
use sha2::Sha256;

/// How a browser treats a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// It shows it.
    Inline,
    /// It saves it.
    Attachment,
}

/// What a link says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Whose.
    pub tenant: TenantId,
    /// Which.
    pub id: String,
    /// Until when, in seconds.
    pub expires: i64,
    /// How it is shown.
    pub disposition: Disposition,
}

/// Why a link opens nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// It is none of ours.
    Forged,
    /// Its time is over.
    Expired,
}

fn mac(key: &[u8; 32], text: &str) -> Hmac<Sha256> {
    // An HMAC takes a key of any length.
    let mut mac = Hmac::<Sha256>::new_from_slice(key).unwrap_or_else(|_| unreachable!("any length"));
    mac.update(text.as_bytes());
    mac
}

impl Link {
    /// The path.
    pub fn sign(&self, key: &[u8; 32]) -> String {
        let inline = if self.disposition == Disposition::Inline { "i" } else { "a" };
        let what = BASE64.encode(format!("{}\n{}\n{}\n{inline}", self.tenant, self.id, self.expires));
        let signature = BASE64.encode(mac(key, &what).finalize().into_bytes());
        format!("/m/{what}.{signature}")
    }

    /// What a path's last part says, when it is ours and in its time.
    pub fn verify(signed: &str, key: &[u8; 32], now: Timestamp) -> Result<Self, Bad> {
        let (what, signature) = signed.split_once('.').ok_or(Bad::Forged)?;
        let given = BASE64.decode(signature).map_err(|_| Bad::Forged)?;
        mac(key, what).verify_slice(&given).map_err(|_| Bad::Forged)?;
        let text = BASE64.decode(what).ok().and_then(|t| String::from_utf8(t).ok()).ok_or(Bad::Forged)?;
        let parts: Vec<&str> = text.split('\n').collect();
        let [tenant, id, expires, inline] = parts[..] else { return Err(Bad::Forged) };
        let link = Self {
            tenant: tenant.parse().map_err(|_| Bad::Forged)?,
            id: id.to_owned(),
            expires: expires.parse().map_err(|_| Bad::Forged)?,
            disposition: if inline == "i" { Disposition::Inline } else { Disposition::Attachment },
        };
        if Timestamp::from_seconds(link.expires) <= now { Err(Bad::Expired) } else { Ok(link) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_opens_what_it_says_until_its_end_and_nothing_else() {
        let link = Link {
            tenant: "t".parse().unwrap(),
            id: "abc".into(),
            expires: 100,
            disposition: Disposition::Attachment,
        };
        let (key, now) = ([1; 32], Timestamp::from_seconds(99));
        let path = link.sign(&key);
        let signed = path.strip_prefix("/m/").unwrap();
        assert_eq!(Link::verify(signed, &key, now), Ok(link.clone()));
        assert_eq!(Link::verify(signed, &key, Timestamp::from_seconds(100)), Err(Bad::Expired));
        assert_eq!(Link::verify(signed, &[2; 32], now), Err(Bad::Forged));
        let inline = Link { disposition: Disposition::Inline, ..link }.sign(&[2; 32]);
        let (what, _) = inline.strip_prefix("/m/").unwrap().split_once('.').unwrap();
        let mixed = format!("{what}.{}", signed.split_once('.').unwrap().1);
        for bad in ["", ".", "a.b", &signed[1..], &mixed] {
            assert_eq!(Link::verify(bad, &key, now), Err(Bad::Forged), "{bad}");
        }
    }
}
