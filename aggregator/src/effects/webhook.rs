//! The webhook: each change of a verdict is posted to a URL, signed, with a key by which the receiver knows a repetition.
//!
//! ```text
//! POST URL
//! Content-Type: application/json
//! Idempotency-Key: <decision>, or <decision>/hold for a hold that follows from an approval
//! X-Coalmine-Signature: sha256=<HMAC-SHA256 of the body under the key, 64 hexadecimal digits>
//!
//! {"at":..,"canary_version":..,"decision":..,"hash":..,"reason":..,"rollout":..,"score":..,"score_ppm":..,
//!  "service":..,"verdict":"ROLLBACK","worst_tenant":..}
//! ```
//!
//! Any 2xx is an answer. What may pass is tried again for an hour: no answer, 408, 425, 429, 5xx.

use std::{fmt, fs::File, io::Read as _, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{Request, StatusCode, Uri, header};
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::TokioExecutor,
};
use sha2::Sha256;

use super::{
    notice::{Notice, cut},
    plan::{Again, Problem},
};
use crate::client::cause;

/// How long one answer may take, connecting included.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Longest key, in bytes; a longer file is none.
const MAX_KEY_BYTES: u64 = 64 << 10;

/// Where verdicts are posted, and the key that signs them.
pub(crate) struct Webhook {
    url: Uri,
    key: Hmac<Sha256>,
    http: HttpClient<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl fmt::Debug for Webhook {
    /// Neither key nor path: both may be secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Webhook")
            .field("host", &self.url.host())
            .finish_non_exhaustive()
    }
}

impl Webhook {
    /// Takes the settings `--halt-webhook` and `--halt-webhook-key`. The key is the file's content, as it is.
    pub(crate) fn open(url: &str, key: &Path) -> Result<Self, String> {
        let wrong = |problem: String| format!("--halt-webhook-key {}: {problem}", key.display());
        let mut secret = Vec::new();
        File::open(key)
            .and_then(|file| file.take(MAX_KEY_BYTES + 1).read_to_end(&mut secret))
            .map_err(|error| wrong(format!("cannot be read: {error}")))?;
        if secret.is_empty() || u64::try_from(secret.len()).unwrap_or(u64::MAX) > MAX_KEY_BYTES {
            return Err(wrong(format!(
                "a key has 1 to {MAX_KEY_BYTES} bytes; write 32 random ones"
            )));
        }
        Self::new(url, &secret)
    }

    fn new(url: &str, key: &[u8]) -> Result<Self, String> {
        // The address itself may have a secret in it, so it is not repeated.
        let url: Uri = url
            .parse()
            .map_err(|error| format!("--halt-webhook is not a URL: {error}"))?;
        let has_user = url.authority().is_some_and(|it| it.as_str().contains('@'));
        if !matches!(url.scheme_str(), Some("http" | "https")) || url.host().is_none() || has_user {
            return Err("--halt-webhook must be a URL as in https://HOST/PATH, without a user".to_owned());
        }
        let key =
            Hmac::<Sha256>::new_from_slice(key).map_err(|error| format!("--halt-webhook-key: {error}"))?;
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls()?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp());
        let http = HttpClient::builder(TokioExecutor::new()).build(connector);
        Ok(Self { url, key, http })
    }

    /// Posts a verdict. Says what was answered.
    pub(super) async fn post(&self, notice: &Notice) -> Result<String, Problem> {
        let body = notice.body();
        let request = Request::post(self.url.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .header("idempotency-key", &notice.key)
            .header("x-coalmine-signature", signature(&self.key, body.as_bytes()))
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| Problem::new(format!("it cannot be asked: {error}"), Again::Never))?;
        match tokio::time::timeout(TIMEOUT, self.http.request(request)).await {
            Ok(Ok(answer)) => judge(answer.status()),
            Ok(Err(error)) => {
                let text = format!("it cannot be reached: {}", cause(&error));
                Err(Problem::new(cut(&text), Again::Soon))
            }
            Err(_) => {
                let text = format!("it gave no answer within {} s", TIMEOUT.as_secs());
                Err(Problem::new(text, Again::Soon))
            }
        }
    }
}

fn judge(status: StatusCode) -> Result<String, Problem> {
    match status.as_u16() {
        200..=299 => Ok(format!("answered {status}")),
        408 | 425 | 429 | 500..=599 => Err(Problem::new(format!("it answered {status}"), Again::Soon)),
        // Whoever receives it may not know the key, or the path, yet.
        401 | 403 | 404 => Err(Problem::new(
            format!("it answered {status}; check --halt-webhook and its key"),
            Again::Slowly,
        )),
        _ => Err(Problem::new(
            format!("it answered {status}, so it is not asked again; check --halt-webhook and its key"),
            Again::Never,
        )),
    }
}

fn signature(key: &Hmac<Sha256>, body: &[u8]) -> String {
    let code = key.clone().chain_update(body).finalize().into_bytes();
    let digits: String = code.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256={digits}")
}

fn tcp() -> HttpConnector {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp
}

/// TLS that trusts the roots of the system.
fn tls() -> Result<rustls::ClientConfig, String> {
    let mut roots = rustls::RootCertStore::empty();
    // What cannot be read is missed when it is needed, with an error that says so.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("--halt-webhook: no TLS: {error}"))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::SocketAddr;

    use axum::{Router, extract::State, http::HeaderMap};
    use coalmine_judge::v1::Verdict;
    use tokio::{net::TcpListener, sync::watch};

    use super::*;
    use crate::effects::notice::tests::notice;

    pub(in crate::effects) const KEY: &[u8] = b"a key of the tests";

    /// A post, as the receiver has it.
    #[derive(Debug, Clone)]
    pub(in crate::effects) struct Post {
        pub(in crate::effects) headers: HeaderMap,
        pub(in crate::effects) body: Bytes,
    }

    /// A receiver that answers with these statuses, and then with 200.
    pub(in crate::effects) async fn receiver(
        statuses: &'static [u16],
    ) -> (SocketAddr, watch::Receiver<Vec<Post>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (posts, received) = watch::channel(Vec::new());
        let router = Router::new()
            .route("/hook", axum::routing::post(take))
            .with_state(Arc::new(Receiver { posts, statuses }));
        tokio::spawn(async move { axum::serve(listener, router).await });
        (address, received)
    }

    struct Receiver {
        posts: watch::Sender<Vec<Post>>,
        statuses: &'static [u16],
    }

    async fn take(State(receiver): State<Arc<Receiver>>, headers: HeaderMap, body: Bytes) -> StatusCode {
        let mut number = 0;
        receiver.posts.send_modify(|posts| {
            number = posts.len();
            posts.push(Post { headers, body });
        });
        let status = receiver.statuses.get(number).copied().unwrap_or(200);
        StatusCode::from_u16(status).unwrap()
    }

    pub(in crate::effects) fn webhook(address: SocketAddr) -> Webhook {
        Webhook::new(&format!("http://{address}/hook"), KEY).unwrap()
    }

    fn hmac(key: &[u8], body: &[u8]) -> String {
        signature(&Hmac::<Sha256>::new_from_slice(key).unwrap(), body)
    }

    /// Test cases 1, 2, 3, 6 and 7 of RFC 4231.
    #[test]
    fn signatures_are_those_of_the_rfc() {
        let long = [0xaa; 131];
        let seventh: &[u8] =
            b"This is a test using a larger than block-size key and a larger than block-size data. \
                               The key needs to be hashed before being used by the HMAC algorithm.";
        let cases: [(&[u8], &[u8], &str); 5] = [
            (
                &[0x0b; 20],
                b"Hi There",
                "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
            ),
            (
                b"Jefe",
                b"what do ya want for nothing?",
                "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
            ),
            (
                &[0xaa; 20],
                &[0xdd; 50],
                "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe",
            ),
            (
                &long,
                b"Test Using Larger Than Block-Size Key - Hash Key First",
                "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
            ),
            (
                &long,
                seventh,
                "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2",
            ),
        ];
        for (key, data, expected) in cases {
            assert_eq!(hmac(key, data), format!("sha256={expected}"));
        }
    }

    #[tokio::test]
    async fn a_post_is_signed_and_names_its_decision() {
        let (address, posts) = receiver(&[]).await;
        let notice = notice("r-7", Verdict::Rollback);
        let answered = webhook(address).post(&notice).await.unwrap();
        assert_eq!(answered, "answered 200 OK");
        let post = posts.borrow()[0].clone();
        assert_eq!(post.headers["idempotency-key"], "r-7");
        assert_eq!(post.headers["content-type"], "application/json");
        assert_eq!(post.headers["x-coalmine-signature"], hmac(KEY, &post.body));
        assert_eq!(post.body, notice.body());
    }

    #[tokio::test]
    async fn what_may_pass_is_tried_again_and_nothing_else() {
        let statuses: &'static [u16] = &[503, 429, 408, 425, 401, 403, 404, 400, 302, 204];
        let (address, _posts) = receiver(statuses).await;
        let webhook = webhook(address);
        let mut said = Vec::new();
        for _ in statuses {
            let result = webhook.post(&notice("r-7", Verdict::Hold)).await;
            said.push(result.err().map(|problem| problem.again));
        }
        let [soon, slowly, never] = [Again::Soon, Again::Slowly, Again::Never].map(Some);
        assert_eq!(
            said,
            [soon, soon, soon, soon, slowly, slowly, slowly, never, never, None]
        );
        // Nobody listens at a port that was just given back.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let nobody = listener.local_addr().unwrap();
        drop(listener);
        let problem = super::tests::webhook(nobody)
            .post(&notice("r-7", Verdict::Hold))
            .await;
        assert_eq!(problem.unwrap_err().again, Again::Soon);
    }

    #[test]
    fn settings_that_make_no_sense_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let key = directory.path().join("key");
        let open = |url: &str| Webhook::open(url, &key).map(drop).unwrap_err();
        assert!(open("https://hooks.example/x").contains("cannot be read"));
        std::fs::write(&key, "").unwrap();
        assert!(open("https://hooks.example/x").contains("1 to 65536 bytes"));
        std::fs::write(&key, KEY).unwrap();
        for url in [
            "hooks.example/x",
            "ftp://hooks.example/x",
            "https://me:secret@hooks.example/x",
            "https://",
        ] {
            let problem = open(url);
            assert!(problem.contains("--halt-webhook"), "{problem}");
            assert!(!problem.contains("secret"), "{problem}");
        }
        let webhook = Webhook::open("https://hooks.example/path", &key).unwrap();
        let shown = format!("{webhook:?}");
        assert!(
            shown.contains("hooks.example") && !shown.contains("path"),
            "{shown}"
        );
    }
}
