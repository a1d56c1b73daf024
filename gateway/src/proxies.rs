//! Who asks by way of a proxy: `X-Forwarded-For`, and the PROXY protocol (version 2), both only of proxies that are named.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr as _;

use axum::http::HeaderMap;
use ipnet::IpNet;
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// What a PROXY header of version 2 begins with.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// The longest that one may be behind its 16 bytes: addresses, and what else the proxy says.
const HEADER_BYTES_MAX: usize = 4096;
/// Addresses that are looked at of one `X-Forwarded-For`, the last ones.
const FORWARDED_MAX: usize = 32;

/// The proxies that are believed.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    ranges: Vec<IpNet>,
    /// Whether they say by the PROXY protocol whom they speak for.
    pub speak_proxy: bool,
}

impl Proxies {
    /// Those in these ranges (`10.0.0.0/8`, or one address).
    ///
    /// # Errors
    /// The range that is none.
    pub fn new(ranges: &[String], speak_proxy: bool) -> Result<Self, String> {
        let range = |text: &String| {
            let one = IpAddr::from_str(text).map(IpNet::from);
            one.or_else(|_| IpNet::from_str(text)).map_err(|_| format!("`{text}` is no range of addresses"))
        };
        Ok(Self { ranges: ranges.iter().map(range).collect::<Result<_, _>>()?, speak_proxy })
    }

    /// Whether this is one of them.
    pub fn are_at(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.ranges.iter().any(|range| range.contains(&ip))
    }

    /// Who asks, when this is who connected: the last address that none of them has.
    pub fn client(&self, from: IpAddr, headers: &HeaderMap) -> IpAddr {
        let mut client = from;
        if !self.are_at(from) {
            return client;
        }
        let lists = headers.get_all("x-forwarded-for").iter().rev();
        let addresses = lists.flat_map(|list| list.to_str().unwrap_or_default().rsplit(','));
        for said in addresses.take(FORWARDED_MAX) {
            // What is no address was said by somebody else, and whatever stands before it.
            let Some(ip) = address(said.trim()) else { break };
            client = ip;
            if !self.are_at(ip) {
                break;
            }
        }
        client
    }
}

/// An address, with or without a port.
fn address(text: &str) -> Option<IpAddr> {
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    bare.parse().ok().or_else(|| text.parse::<SocketAddr>().ok().map(|at| at.ip()))
}

/// Reads whom a proxy speaks for; none: for itself.
///
/// # Errors
/// What comes is no PROXY header of version 2.
pub async fn read_header(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<IpAddr>> {
    let wrong = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    let mut head = [0; 16];
    stream.read_exact(&mut head).await?;
    let length = usize::from(u16::from_be_bytes([head[14], head[15]]));
    if head[..12] != SIGNATURE || head[12] >> 4 != 2 {
        return Err(wrong("no PROXY header"));
    }
    if length > HEADER_BYTES_MAX {
        return Err(wrong("a PROXY header that is too long"));
    }
    let mut rest = vec![0; length];
    stream.read_exact(&mut rest).await?;
    match (head[12] & 0xf, head[13] >> 4) {
        // Of its own: it looks whether we are there.
        (0, _) => Ok(None),
        (1, 1) => {
            let ip: [u8; 4] = rest.get(..4).and_then(|ip| ip.try_into().ok()).ok_or(wrong("no address"))?;
            Ok(Some(IpAddr::V4(Ipv4Addr::from(ip))))
        }
        (1, 2) => {
            let ip: [u8; 16] = rest.get(..16).and_then(|ip| ip.try_into().ok()).ok_or(wrong("no address"))?;
            Ok(Some(IpAddr::V6(Ipv6Addr::from(ip)).to_canonical()))
        }
        // It does not say for whom.
        (1, _) => Ok(None),
        (_, _) => Err(wrong("a PROXY command that is none")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies() -> Proxies {
        Proxies::new(&["10.0.0.0/8".into(), "::1".into(), "192.0.2.9".into()], false).unwrap()
    }

    fn asked(from: &str, lists: &[&str]) -> String {
        let mut headers = HeaderMap::new();
        for list in lists {
            headers.append("x-forwarded-for", list.parse().unwrap());
        }
        proxies().client(from.parse().unwrap(), &headers).to_string()
    }

    #[test]
    fn only_proxies_that_are_named_are_believed() {
        assert_eq!(asked("203.0.113.5", &["198.51.100.7"]), "203.0.113.5", "a stranger says what it likes");
        assert_eq!(asked("10.1.2.3", &["198.51.100.7"]), "198.51.100.7");
        assert_eq!(asked("::ffff:10.1.2.3", &["198.51.100.7"]), "198.51.100.7");
        assert_eq!(asked("10.1.2.3", &[]), "10.1.2.3");
        // By way of two of them; what the client has put before is not believed.
        assert_eq!(asked("::1", &["1.2.3.4, 198.51.100.7", "192.0.2.9"]), "198.51.100.7");
        assert_eq!(asked("10.1.2.3", &["198.51.100.7:4711"]), "198.51.100.7");
        assert_eq!(asked("10.1.2.3", &["[2001:db8::1]:443, 10.9.9.9"]), "2001:db8::1");
        assert_eq!(asked("10.1.2.3", &["198.51.100.7, nonsense, 10.9.9.9"]), "10.9.9.9");
        assert_eq!(asked("10.1.2.3", &[&"10.0.0.1,".repeat(1000)]), "10.1.2.3");
        assert!(Proxies::new(&["10.0.0.0/33".into()], false).is_err());
    }

    async fn read(bytes: &[u8]) -> io::Result<Option<IpAddr>> {
        read_header(&mut &bytes[..]).await
    }

    fn header(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [&SIGNATURE[..], &[command, family], &length, rest].concat()
    }

    #[tokio::test]
    async fn a_header_names_whom_it_is_for_or_nobody() {
        let four = [198, 51, 100, 7, 127, 0, 0, 1, 0x12, 0x34, 0, 80, 0xee, 0, 1, 7];
        assert_eq!(read(&header(0x21, 0x11, &four)).await.unwrap(), Some("198.51.100.7".parse().unwrap()));
        let mut six = [0; 36];
        six[..16].copy_from_slice(&"2001:db8::1".parse::<Ipv6Addr>().unwrap().octets());
        assert_eq!(read(&header(0x21, 0x21, &six)).await.unwrap(), Some("2001:db8::1".parse().unwrap()));
        assert_eq!(read(&header(0x20, 0x11, &four)).await.unwrap(), None);
        assert_eq!(read(&header(0x21, 0x00, &[])).await.unwrap(), None);
        for wrong in [
            header(0x11, 0x11, &four),
            header(0x22, 0x11, &four),
            header(0x21, 0x11, &four[..3]),
            header(0x21, 0x11, &[0; HEADER_BYTES_MAX + 1]),
            b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(),
            b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n".to_vec(),
            header(0x21, 0x11, &four)[..20].to_vec(),
        ] {
            assert!(read(&wrong).await.is_err(), "{wrong:?}");
        }
    }
}
