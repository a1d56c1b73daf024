//! The guarded HTTP client: the one way out. What may be called is in the module `guard`.
//!
//! An account's `api_base` must be https to a host of `providers.allowed_hosts` (in `dev` also plain http to
//! loopback). Names are resolved here, every address is checked, and the connection is made to a checked address; no
//! redirect is followed; answers are bounded in size and time.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use patchbay_actors::directory::Account;
use patchbay_protocol::outbound::{Call, CallResult};
use reqwest::{Response, Url};

mod guard;

use guard::CheckedResolver;
pub use guard::{Guard, is_public};

/// The largest answer that is read.
const ANSWER_BYTES_MAX: usize = 256 * 1024;
/// The client.
pub struct Outgoing {
    guard: Guard,
    client: reqwest::Client,
    timeout: Duration,
}

impl Outgoing {
    /// A client with these bounds.
    pub fn new(guard: Guard, timeout: Duration) -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .dns_resolver(Arc::new(CheckedResolver(guard.clone())))
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .connect_timeout(timeout.min(Duration::from_secs(5)))
            .build()?;
        Ok(Self { guard, client, timeout })
    }

    async fn answer(mut response: reqwest::Response) -> Option<CallResult> {
        let status = response.status().as_u16();
        let header = response.headers().get("retry-after").and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        let mut body = BytesMut::new();
        while let Some(chunk) = response.chunk().await.ok()? {
            if body.len() + chunk.len() > ANSWER_BYTES_MAX {
                return None;
            }
            body.extend_from_slice(&chunk);
        }
        Some(CallResult::Answered {
            status,
            retry_after: header.map(Duration::from_secs),
            body: Bytes::from(body),
        })
    }
}

/// Redirects of a file that are followed, within its host.
const REDIRECTS_MAX: usize = 3;
/// How long a file's next bytes may take.
const FILE_PAUSE_MAX: Duration = Duration::from_secs(20);

/// Why something was not fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfetched {
    /// It may not be fetched from there.
    Forbidden,
    /// It may be had later.
    Later,
    /// The other side says no: its status.
    Refused(u16),
}

fn key_of(account: &Account) -> &str {
    account.credentials.get("access_token").and_then(|t| t.as_str()).unwrap_or("")
}

impl Outgoing {
    /// Makes a call for an account. Never fails: what is not an answer says whether it can have been seen.
    pub async fn call(&self, account: &Account, call: Call) -> CallResult {
        let Some(url) = self.guard.url(&account.settings, &call.path) else { return CallResult::NotSent };
        let request = self.client.post(url).bearer_auth(key_of(account));
        let request =
            request.header("content-type", "application/json").timeout(self.timeout).body(call.body);
        Self::result(request.send().await).await
    }

    /// Puts a file at an account's provider.
    pub async fn upload(
        &self,
        account: &Account,
        path: &str,
        form: reqwest::multipart::Form,
        patience: Duration,
    ) -> CallResult {
        let Some(url) = self.guard.url(&account.settings, path) else { return CallResult::NotSent };
        let request = self.client.post(url).bearer_auth(key_of(account)).timeout(patience).multipart(form);
        Self::result(request.send().await).await
    }

    async fn result(sent: Result<Response, reqwest::Error>) -> CallResult {
        match sent {
            Ok(response) => Self::answer(response).await.unwrap_or(CallResult::Lost),
            // Only a connection that was never made proves that nothing was written.
            Err(e) if e.is_connect() || e.is_builder() => CallResult::NotSent,
            Err(_) => CallResult::Lost,
        }
    }

    /// Asks an account's provider for a small JSON answer.
    pub async fn ask(&self, account: &Account, path: &str) -> Result<Bytes, Unfetched> {
        let url = self.guard.url(&account.settings, path).ok_or(Unfetched::Forbidden)?;
        let request = self.client.get(url).bearer_auth(key_of(account)).timeout(self.timeout);
        let response = request.send().await.map_err(|_| Unfetched::Later)?;
        let status = response.status();
        match Self::answer(response).await {
            Some(CallResult::Answered { body, .. }) if status.is_success() => Ok(body),
            Some(_) if status.is_client_error() && !matches!(status.as_u16(), 408 | 429) => {
                Err(Unfetched::Refused(status.as_u16()))
            }
            _ => Err(Unfetched::Later),
        }
    }

    /// Opens a file at an address that a provider has named. The account's key goes to hosts of
    /// `providers.media_hosts` only, and nowhere else is fetched from; redirects are followed within the host.
    pub async fn open(&self, account: &Account, url: &str) -> Result<Response, Unfetched> {
        let mut url = self.guard.media_url(url).ok_or(Unfetched::Forbidden)?;
        for _ in 0..=REDIRECTS_MAX {
            let request = self.client.get(url.clone()).bearer_auth(key_of(account));
            let sent = tokio::time::timeout(self.timeout, request.send()).await;
            let response = sent.map_err(|_| Unfetched::Later)?.map_err(|_| Unfetched::Later)?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            if !status.is_redirection() {
                let gone = status.is_client_error() && !matches!(status.as_u16(), 408 | 429);
                return Err(if gone { Unfetched::Refused(status.as_u16()) } else { Unfetched::Later });
            }
            url = self.redirected(&url, &response).ok_or(Unfetched::Forbidden)?;
        }
        Err(Unfetched::Forbidden)
    }

    fn redirected(&self, from: &Url, response: &Response) -> Option<Url> {
        let to = from.join(response.headers().get("location")?.to_str().ok()?).ok()?;
        let same = (to.scheme(), to.host_str(), to.port_or_known_default())
            == (from.scheme(), from.host_str(), from.port_or_known_default());
        if same { self.guard.media_url(to.as_str()) } else { None }
    }

    /// The next bytes of a file; a sender that stops is given up.
    pub async fn next(&self, response: &mut Response) -> Result<Option<Bytes>, Unfetched> {
        let chunk = tokio::time::timeout(self.timeout.min(FILE_PAUSE_MAX), response.chunk()).await;
        chunk.map_err(|_| Unfetched::Later)?.map_err(|_| Unfetched::Later)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use patchbay_actors::directory::Settings;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    fn account(base: &str) -> Account {
        Account {
            connector: "whatsapp".into(),
            inbox: "main".parse().unwrap(),
            name: String::new(),
            external_id: "1".into(),
            credentials: serde_json::json!({"access_token": "the-key"}),
            settings: Settings { api_base: base.into(), api_version: "v1".into(), ..Settings::default() },
        }
    }

    fn client(loopback: bool) -> Outgoing {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let hosts = vec!["localhost".to_owned(), "graph.facebook.com".to_owned()];
        let guard = Guard { allowed_hosts: hosts.clone(), media_hosts: hosts, loopback };
        Outgoing::new(guard, Duration::from_millis(300)).unwrap()
    }

    /// A server that says this to whoever comes, and goes on holding the connection; what it was asked.
    async fn says(answer: Vec<u8>) -> (String, tokio::sync::mpsc::Receiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let (asked, seen) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (answer, asked) = (answer.clone(), asked.clone());
                tokio::spawn(async move {
                    let mut head = vec![0; 4096];
                    let n = stream.read(&mut head).await.unwrap_or(0);
                    let _ = asked.send(String::from_utf8_lossy(&head[..n]).into_owned()).await;
                    let _ = stream.write_all(&answer).await;
                    let _ = stream.read(&mut head).await;
                });
            }
        });
        (base, seen)
    }

    #[tokio::test]
    async fn a_name_that_leads_to_a_private_address_is_not_called() {
        // The name is on the list; where it leads now is checked all the same, at the connection itself.
        let called = client(false).call(&account("https://localhost:1"), call()).await;
        assert_eq!(called, CallResult::NotSent);
        let opened = client(false).open(&account(""), "https://localhost:1/x").await;
        assert_eq!(opened.err(), Some(Unfetched::Later), "nobody was asked");
    }

    fn call() -> Call {
        Call { path: "1/messages".into(), body: Bytes::from_static(b"{}") }
    }

    #[tokio::test]
    async fn an_answer_that_does_not_end_or_does_not_fit_is_lost() {
        let head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{".to_vec();
        let (slow, _seen) = says(head).await;
        assert_eq!(
            client(true).call(&account(&slow), call()).await,
            CallResult::Lost,
            "it stops in the middle"
        );
        let mut bomb = b"HTTP/1.1 200 OK\r\ncontent-length: 3000000\r\n\r\n".to_vec();
        bomb.resize(3_000_000, b'x');
        let (bomb, _seen) = says(bomb).await;
        assert_eq!(client(true).call(&account(&bomb), call()).await, CallResult::Lost, "it is too large");
        let (silent, _seen) = says(Vec::new()).await;
        assert_eq!(client(true).call(&account(&silent), call()).await, CallResult::Lost, "it says nothing");
        // A compressed answer is what it is: nothing here unpacks it.
        let zip = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc".to_vec();
        let (zip, _seen) = says(zip).await;
        let CallResult::Answered { body, .. } = client(true).call(&account(&zip), call()).await else {
            panic!()
        };
        assert_eq!(body, "abc");
    }

    #[tokio::test]
    async fn no_redirect_leaves_the_host_and_none_takes_the_key_along() {
        let (there, mut elsewhere) = says(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_vec()).await;
        let redirect = format!("HTTP/1.1 302 Found\r\nlocation: {there}/x\r\ncontent-length: 0\r\n\r\n");
        let (here, mut seen) = says(redirect.into_bytes()).await;
        let answered = client(true).call(&account(&here), call()).await;
        assert!(matches!(answered, CallResult::Answered { status: 302, .. }), "{answered:?}");
        let opened = client(true).open(&account(&here), &format!("{here}/file")).await;
        assert_eq!(opened.err(), Some(Unfetched::Forbidden));
        for _ in 0..2 {
            assert!(seen.recv().await.unwrap().contains("Bearer the-key"));
        }
        assert!(elsewhere.try_recv().is_err(), "nobody else was asked");
    }

    #[tokio::test]
    async fn a_file_that_stops_coming_is_given_up() {
        let head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nabc".to_vec();
        let (slow, _seen) = says(head).await;
        let client = client(true);
        let mut response = client.open(&account(&slow), &format!("{slow}/file")).await.unwrap();
        assert_eq!(client.next(&mut response).await, Ok(Some(Bytes::from_static(b"abc"))));
        assert_eq!(client.next(&mut response).await, Err(Unfetched::Later));
    }
}
