//! Keys that an issuer publishes by HTTPS, asked for when a token names one.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod front_support;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use front_support::Lab;
use front_support::tokens::{Signer, b64, claims};
use futures_util::future::join_all;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rvpn_gateway::auth::Gate;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// Limits that these tests do not run into.
const MANY: &str = "[limits]\nlogin-failures = 100000\n";

/// What the issuer does when it is asked.
#[derive(Clone)]
enum Manner {
    Answers(&'static str, String),
    BreaksOff,
    Never,
}

struct Issuer {
    at: SocketAddr,
    manner: Arc<Mutex<Manner>>,
    asked: Arc<AtomicUsize>,
}

impl Issuer {
    /// Its certificate is written to `ca_file`.
    async fn new(ca_file: &Path) -> Issuer {
        let key = KeyPair::generate().unwrap();
        let names = vec!["127.0.0.1".to_owned()];
        let certificate = CertificateParams::new(names).unwrap();
        let certificate = certificate.self_signed(&key).unwrap();
        std::fs::write(ca_file, certificate.pem()).unwrap();
        let tls = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from(certificate.der().to_vec())],
                PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            )
            .unwrap();
        let tls = TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let issuer = Issuer {
            at: listener.local_addr().unwrap(),
            manner: Arc::new(Mutex::new(Manner::Never)),
            asked: Arc::default(),
        };
        let (manner, asked) = (Arc::clone(&issuer.manner), Arc::clone(&issuer.asked));
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (tls, manner, asked) = (tls.clone(), Arc::clone(&manner), Arc::clone(&asked));
                tokio::spawn(async move {
                    // Who does not believe us leaves here.
                    let Ok(mut stream) = tls.accept(tcp).await else {
                        return;
                    };
                    let mut request = Vec::new();
                    while !request.ends_with(b"\r\n\r\n") {
                        match stream.read_buf(&mut request).await {
                            Ok(1..) => {}
                            _ => return,
                        }
                    }
                    assert!(request.starts_with(b"GET /keys?of=us HTTP/1.1\r\n"));
                    asked.fetch_add(1, Ordering::SeqCst);
                    let manner = manner.lock().unwrap().clone();
                    match manner {
                        Manner::Answers(status, body) => {
                            let answer = format!(
                                "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}",
                                body.len()
                            );
                            // A body that is too long is not read to its end.
                            let _ = stream.write_all(answer.as_bytes()).await;
                            let _ = stream.shutdown().await;
                        }
                        Manner::BreaksOff => {
                            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConte").await;
                        }
                        Manner::Never => tokio::time::sleep(Duration::from_secs(60)).await,
                    }
                });
            }
        });
        issuer
    }

    fn publishes(&self, keys: &[(&str, &Signer)]) {
        let keys: Vec<_> = keys
            .iter()
            .map(|(name, signer)| {
                json!({"kty": "OKP", "crv": "Ed25519", "kid": name, "x": b64(&signer.public)})
            })
            .collect();
        let set = json!({ "keys": keys }).to_string();
        self.does(Manner::Answers("200 OK", set));
    }

    fn does(&self, manner: Manner) {
        *self.manner.lock().unwrap() = manner;
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

/// As after a reload, with an issuer that may be asked at once.
fn believe(lab: &Lab, at: SocketAddr, ca_file: &str) {
    let key = format!(
        "[[key]]\nname = \"id\"\njwks-url = \"https://{at}/keys?of=us\"\nca-file = \"{ca_file}\"\n"
    );
    let config = lab.config(&(MANY.to_owned() + &key));
    lab.front.gate.commit(Gate::prepare(&config).unwrap());
}

#[tokio::test]
async fn an_issuer_is_asked_once_for_a_key_that_many_clients_name() {
    let lab = Lab::and(MANY).await;
    let issuer = Issuer::new(&lab.dir.path().join("issuer.pem")).await;
    let (a, b) = (Signer::ed25519(), Signer::ed25519());
    issuer.publishes(&[("a", &a)]);
    believe(&lab, issuer.at, "issuer.pem");
    let token = a.named("a", &claims("alice"));
    let statuses = join_all((0..5).map(|_| lab.try_token(&token))).await;
    assert_eq!(statuses, [101; 5]);
    assert_eq!(issuer.asked(), 1);
    // A stranger who names other keys does not make it ask again so soon.
    issuer.publishes(&[("a", &a), ("b", &b)]);
    let other = b.named("b", &claims("bob"));
    for _ in 0..5 {
        assert_eq!(lab.try_token(&other).await, 403);
    }
    assert_eq!(issuer.asked(), 1);
    assert_eq!(lab.try_token(&token).await, 101);
    assert_eq!(lab.try_token(&b.named("a", &claims("bob"))).await, 403);
}

#[tokio::test]
async fn what_is_no_answer_leaves_the_keys_as_they_were() {
    let lab = Lab::and(MANY).await;
    let issuer = Issuer::new(&lab.dir.path().join("issuer.pem")).await;
    let (a, b) = (Signer::ed25519(), Signer::ed25519());
    issuer.publishes(&[("a", &a)]);
    believe(&lab, issuer.at, "issuer.pem");
    let known = a.named("a", &claims("alice"));
    assert_eq!(lab.try_token(&known).await, 101);
    let named_b = json!({"keys": [
        {"kty": "OKP", "crv": "Ed25519", "kid": "b", "x": b64(&b.public)},
    ]})
    .to_string();
    let huge = named_b.clone() + &" ".repeat(300 * 1024);
    let bad = [
        Manner::Answers("500 Internal Server Error", named_b.clone()),
        Manner::Answers("302 Found", named_b),
        Manner::Answers("200 OK", huge),
        Manner::Answers("200 OK", "{\"keys\": 7}".to_owned()),
        Manner::Answers("200 OK", String::new()),
        Manner::BreaksOff,
        Manner::Never,
    ];
    for (n, manner) in (1..).zip(bad) {
        issuer.does(manner);
        believe(&lab, issuer.at, "issuer.pem");
        let unknown = lab.try_token(&b.named("b", &claims("bob"))).await;
        assert_eq!((unknown, issuer.asked()), (403, n + 1), "{n}");
        assert_eq!(lab.try_token(&known).await, 101, "{n}");
    }
}

#[tokio::test]
async fn only_an_issuer_with_the_right_certificate_is_believed() {
    let lab = Lab::and(MANY).await;
    let issuer = Issuer::new(&lab.dir.path().join("issuer.pem")).await;
    let _other = Issuer::new(&lab.dir.path().join("other.pem")).await;
    let a = Signer::ed25519();
    issuer.publishes(&[("a", &a)]);
    let token = a.named("a", &claims("alice"));
    believe(&lab, issuer.at, "other.pem");
    assert_eq!((lab.try_token(&token).await, issuer.asked()), (403, 0));
    std::fs::write(lab.dir.path().join("empty.pem"), "").unwrap();
    let url = format!("https://{}/keys", issuer.at);
    let key = format!("[[key]]\nname = \"id\"\njwks-url = \"{url}\"\nca-file = \"empty.pem\"\n");
    let refused = Gate::prepare(&lab.config(&key)).map(drop).unwrap_err();
    let text = refused.to_string();
    assert!(text.contains("empty.pem: it has no certificate"), "{text}");
    believe(&lab, issuer.at, "issuer.pem");
    assert_eq!((lab.try_token(&token).await, issuer.asked()), (101, 1));
}
