//! Where calls may go: which hosts, over what, and to which addresses.

use std::net::{IpAddr, SocketAddr};

use patchbay_actors::directory::Settings;
use patchbay_admin_api::Destinations;
use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// Where WhatsApp is when an account does not say.
const GRAPH_BASE: &str = "https://graph.facebook.com";
const GRAPH_VERSION: &str = "v23.0";

/// Where calls may go.
#[derive(Clone, Debug)]
pub struct Guard {
    /// Hosts that may be called over https.
    pub allowed_hosts: Vec<String>,
    /// Hosts that files may be fetched from over https, with the account's key.
    pub media_hosts: Vec<String>,
    /// Whether loopback may be called over plain http (`dev` only).
    pub loopback: bool,
}

/// Whether an address is one that the public reaches.
pub fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            let shared = a == 100 && (64..128).contains(&b);
            let special =
                a == 0 || a >= 240 || (a == 192 && b == 0 && c == 0) || (a == 198 && (b & 0xfe) == 18);
            !(v4.is_loopback()
                || v4.is_private()
                || v4.is_link_local()
                || v4.is_multicast()
                || v4.is_broadcast()
                || v4.is_documentation()
                || shared
                || special)
        }
        IpAddr::V6(v6) => {
            if let Some(v4) = v6.to_ipv4_mapped() {
                return is_public(IpAddr::V4(v4));
            }
            let head = v6.segments();
            let nat64 = head[0] == 0x64 && head[1] == 0xff9b;
            let documentation = head[0] == 0x2001 && head[1] == 0xdb8;
            let embedded = head[0] == 0x2002 || (head[0] == 0x2001 && head[1] == 0);
            (head[0] & 0xe000) == 0x2000 && !(nat64 || documentation || embedded)
        }
    }
}

impl Guard {
    pub(super) fn allows(&self, ip: IpAddr) -> bool {
        is_public(ip) || (self.loopback && ip.is_loopback())
    }

    /// The address of a call, if the account may call there.
    pub(super) fn url(&self, settings: &Settings, path: &str) -> Option<Url> {
        let base =
            if settings.api_base.is_empty() { GRAPH_BASE } else { settings.api_base.trim_end_matches('/') };
        let version = if settings.api_version.is_empty() { GRAPH_VERSION } else { &settings.api_version };
        let url = Url::parse(&format!("{base}/{version}/{path}")).ok()?;
        self.checked(url, &self.allowed_hosts)
    }

    /// The address of a file, if one may be fetched there with the account's key.
    pub(super) fn media_url(&self, url: &str) -> Option<Url> {
        self.checked(Url::parse(url).ok()?, &self.media_hosts)
    }

    fn checked(&self, url: Url, hosts: &[String]) -> Option<Url> {
        let host = url.host_str()?;
        let literal: Option<IpAddr> = host.trim_matches(['[', ']']).parse().ok();
        // An address is nobody's name: what is listed is a name, and is resolved here.
        let listed = url.scheme() == "https"
            && literal.is_none()
            && hosts.iter().any(|h| h.eq_ignore_ascii_case(host));
        let local = self.loopback
            && url.scheme() == "http"
            && (literal.is_some_and(|ip| ip.is_loopback()) || host == "localhost");
        let plain = url.username().is_empty() && url.password().is_none();
        (plain && (listed || local)).then_some(url)
    }
}

impl Destinations for Guard {
    fn refused(&self, api_base: &str) -> Option<String> {
        let settings = Settings { api_base: api_base.to_owned(), ..Settings::default() };
        self.url(&settings, "").is_none().then(|| {
            let local = if self.loopback { ", or http to loopback" } else { "" };
            format!("must be https to one of {}{local}", self.allowed_hosts.join(", "))
        })
    }
}

/// Resolves a name and hands on only addresses that were checked.
pub(super) struct CheckedResolver(pub(super) Guard);

impl Resolve for CheckedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = self.0.clone();
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let checked: Vec<SocketAddr> = found.filter(|a| guard.allows(a.ip())).collect();
            if checked.is_empty() {
                return Err("no address that may be called".into());
            }
            Ok(Box::new(checked.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(base: &str) -> Settings {
        Settings { api_base: base.into(), api_version: "v1".into(), ..Settings::default() }
    }

    #[test]
    fn only_listed_hosts_over_https() {
        let guard = Guard {
            allowed_hosts: vec!["graph.facebook.com".into()],
            media_hosts: vec!["lookaside.fbsbx.com".into()],
            loopback: false,
        };
        assert!(guard.url(&settings(""), "1/messages").is_some());
        for bad in [
            "http://graph.facebook.com",
            "https://evil.example",
            "https://graph.facebook.com.evil.example",
            "http://127.0.0.1:1",
            "https://127.0.0.1",
            "https://2130706433",
            "https://[::ffff:127.0.0.1]",
            "ftp://graph.facebook.com",
            "https://graph.facebook.com@evil.example",
            "nonsense",
        ] {
            assert!(guard.url(&settings(bad), "1/messages").is_none(), "{bad}");
        }
        assert!(guard.media_url("https://lookaside.fbsbx.com/x?a=1").is_some());
        for bad in [
            "https://graph.facebook.com/x",
            "http://lookaside.fbsbx.com/x",
            "https://lookaside.fbsbx.com@evil.example/",
            "https://user:pass@lookaside.fbsbx.com/",
            "https://169.254.169.254/latest",
            "http://127.0.0.1/x",
            "file:///etc/passwd",
        ] {
            assert!(guard.media_url(bad).is_none(), "{bad}");
        }
        let dev = Guard { loopback: true, ..guard };
        assert!(dev.url(&settings("http://127.0.0.1:99"), "1/messages").is_some());
        assert!(dev.url(&settings("http://10.0.0.1"), "1/messages").is_none());
    }

    #[test]
    fn private_ranges_are_not_public() {
        for ip in [
            "127.0.0.1",
            "10.1.1.1",
            "172.16.0.1",
            "192.168.0.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "::1",
            "::ffff:10.0.0.1",
            "fe80::1",
            "fd00::1",
            "64:ff9b::a00:1",
            "2002:a00:1::",
            "224.0.0.1",
            "255.255.255.255",
        ] {
            assert!(!is_public(ip.parse().unwrap()), "{ip}");
        }
        for ip in ["1.1.1.1", "157.240.1.1", "2606:4700::1111"] {
            assert!(is_public(ip.parse().unwrap()), "{ip}");
        }
    }
}
