//! How many, how often, how long: AUT-12 to AUT-14, AUT-22, DOS-12.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod front_support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use front_support::client::{ask, login};
use front_support::tokens::{Signer, b64, claims, now, with};
use front_support::{Lab, NAME, PATIENCE};
use futures_util::StreamExt;
use rvpn_gateway::http::join;
use rvpn_gateway::store::{Invite, Revocation, Scope};
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

impl Lab {
    /// A code that is good for so many devices.
    async fn invite(&self, account: &str, uses: u32, device_life: Option<u64>) -> String {
        let (code, hash) = join::new_code().unwrap();
        let invite = Invite {
            id: code.clone(),
            account: account.into(),
            left: uses,
            created: now(),
            expires: now() + 60,
            device_life,
            class: 0,
            names: Vec::new(),
            ports: Vec::new(),
        };
        let store = self.front.gate.store();
        store
            .run(move |e| e.add_invite(&hash, &invite))
            .await
            .unwrap();
        code
    }

    async fn join(&self, code: &str, device: &Signer) -> (u16, Value) {
        let body = json!({"code": code, "public-key": b64(&device.public), "name": "phone"});
        self.post_join(&body.to_string(), "application/json").await
    }

    async fn post_join(&self, body: &str, kind: &str) -> (u16, Value) {
        let request = format!(
            "POST /rvpn/v1/join HTTP/1.1\r\nHost: {NAME}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let reply = self.request(&request).await;
        let document = serde_json::from_slice(&reply.rest).unwrap_or(Value::Null);
        (reply.status, document)
    }

    /// A device that has joined, and the id of its key.
    async fn device(&self, account: &str) -> (Signer, String) {
        let device = Signer::ed25519();
        let code = self.invite(account, 1, None).await;
        let (status, joined) = self.join(&code, &device).await;
        assert_eq!(status, 200, "{joined}");
        assert_eq!(joined["account"], account);
        (device, joined["key-id"].as_str().unwrap().to_owned())
    }

    async fn revoke(&self, scope: Scope, value: &str) -> usize {
        let revocation = Revocation {
            scope,
            value: value.into(),
            reason: String::new(),
            created: now(),
            until: None,
        };
        self.front.gate.revoke(revocation).await.unwrap()
    }
}

const MANY: &str = "[limits]\nlogin-failures = 100000\n";

#[tokio::test]
async fn a_device_that_joined_signs_its_own_tokens() {
    let lab = Lab::and(MANY).await;
    let (device, id) = lab.device("alice").await;
    assert_eq!(
        lab.try_token(&device.named(&id, &claims("alice"))).await,
        101
    );
    let admission = lab.echo.last();
    assert_eq!(
        (&*admission.account, &*admission.subject),
        ("alice", id.as_str())
    );
    assert_eq!(admission.expires_at, None, "the registration has no end");
    // Neither for another, nor for long, nor without its name, nor by another.
    let stranger = Signer::ed25519();
    for token in [
        device.named(&id, &claims("bob")),
        device.named(&id, &with("exp", json!(now() + 7200))),
        device.named(&id, &with("aud", json!("x"))),
        device.claims(&claims("alice")),
        stranger.named(&id, &claims("alice")),
        lab.ops.named(&id, &claims("alice")),
    ] {
        assert_eq!(lab.try_token(&token).await, 403);
    }
}

#[tokio::test]
async fn joining_is_strict_about_what_it_is_given() {
    let lab = Lab::and(MANY).await;
    let device = Signer::ed25519();
    let code = lab.invite("alice", 1, None).await;
    let key = b64(&device.public);
    let good = json!({"code": code, "public-key": key}).to_string();
    for (body, kind, status) in [
        (good.clone(), "text/plain", 415),
        (good.clone(), "application/x-www-form-urlencoded", 415),
        (json!({"code": code}).to_string(), "application/json", 400),
        (
            json!({"code": code, "public-key": key, "x": 1}).to_string(),
            "application/json",
            400,
        ),
        (
            json!({"code": code, "public-key": b64(&[7; 31])}).to_string(),
            "application/json",
            400,
        ),
        (
            json!({"code": code, "public-key": key, "name": "a\nb"}).to_string(),
            "application/json",
            400,
        ),
        (
            json!({"code": "x", "public-key": key}).to_string(),
            "application/json",
            400,
        ),
        (
            json!({"code": b64(&[7; 16]), "public-key": key}).to_string(),
            "application/json",
            403,
        ),
        ("x".repeat(5000), "application/json", 413),
        ("[".repeat(4000), "application/json", 400),
    ] {
        assert_eq!(lab.post_join(&body, kind).await.0, status, "{body}");
    }
    let foreign = format!(
        "POST /rvpn/v1/join HTTP/1.1\r\nHost: {NAME}\r\nOrigin: https://evil.test\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{good}",
        good.len()
    );
    assert_eq!(lab.request(&foreign).await.status, 403);
    assert_eq!(lab.post_join(&good, "application/json").await.0, 200);
    // The answer may have been lost, so the same key may ask again; another may not.
    assert_eq!(lab.post_join(&good, "application/json").await.0, 200);
    assert_eq!(lab.join(&code, &Signer::ed25519()).await.0, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn aut_12_a_hundred_joins_with_one_code_let_one_in() {
    let lab = Arc::new(Lab::and(MANY).await);
    let code = lab.invite("alice", 1, None).await;
    let tries: Vec<_> = (0..100)
        .map(|_| {
            let (lab, code) = (Arc::clone(&lab), code.clone());
            tokio::spawn(async move { lab.join(&code, &Signer::ed25519()).await.0 })
        })
        .collect();
    let mut statuses = Vec::new();
    for one in tries {
        statuses.push(one.await.unwrap());
    }
    assert_eq!(
        statuses.iter().filter(|s| **s == 200).count(),
        1,
        "{statuses:?}"
    );
    assert_eq!(
        statuses.iter().filter(|s| **s == 403).count(),
        99,
        "{statuses:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn aut_13_a_hundred_logins_at_once_fill_the_account_exactly() {
    let lab = Arc::new(Lab::and("[limits]\nsessions-per-account = 7\n").await);
    let token = lab.ops.good();
    let tries: Vec<_> = (0..100)
        .map(|_| {
            let (lab, token) = (Arc::clone(&lab), token.clone());
            tokio::spawn(async move {
                let mut io = lab.tls().await;
                let status = ask(&mut io, &login(&token)).await.status;
                (status, io)
            })
        })
        .collect();
    let mut held = Vec::new();
    let mut refused = 0;
    for one in tries {
        match one.await.unwrap() {
            (101, io) => held.push(io),
            (429, _) => refused += 1,
            (other, _) => panic!("{other}"),
        }
    }
    assert_eq!((held.len(), refused), (7, 93));
    // Another account is not concerned, and a place that is given up is free.
    assert_eq!(lab.try_token(&lab.ops.claims(&claims("bob"))).await, 101);
    held.pop();
    let freed = async {
        while lab.try_token(&token).await != 101 {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, freed)
        .await
        .expect("a place becomes free");
}

#[tokio::test]
async fn aut_14_whoever_is_revoked_leaves_within_two_seconds_and_stays_out() {
    let lab = Lab::and(MANY).await;
    let one = lab.ops.claims(&with("jti", json!("t1")));
    let other = lab.ops.claims(&with("jti", json!("t2")));
    let bob = lab.ops.claims(&claims("bob"));
    let (device, id) = lab.device("carol").await;
    let carol = device.named(&id, &claims("carol"));
    let mut sockets = Vec::new();
    for token in [&one, &other, &bob, &carol] {
        sockets.push(lab.socket(&login(token)).await);
    }
    let [mut first, mut second, mut third, mut fourth] = <[_; 4]>::try_from(sockets).ok().unwrap();

    let start = Instant::now();
    assert_eq!(lab.revoke(Scope::Jti, "t1").await, 1);
    let close = timeout(PATIENCE, first.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    let Message::Close(Some(frame)) = close else {
        panic!("{close:?}");
    };
    assert_eq!(u16::from(frame.code), 1008);
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(lab.try_token(&one).await, 403);
    assert_eq!(lab.try_token(&other).await, 101, "only that token");
    let gate = &lab.front.gate;
    assert!(gate.is_revoked("alice", Some("t1")) && !gate.is_revoked("alice", Some("t2")));

    assert!(lab.revoke(Scope::Subject, "alice").await >= 1);
    assert!(matches!(second.next().await, Some(Ok(Message::Close(_)))));
    assert_eq!(lab.try_token(&other).await, 403);
    assert!(gate.is_revoked("alice", None));
    // A device goes with its key, and with its account.
    assert_eq!(gate.remove_device(&id).await.unwrap(), Some(1));
    assert!(matches!(fourth.next().await, Some(Ok(Message::Close(_)))));
    assert_eq!(lab.try_token(&carol).await, 403);
    let (device, id) = lab.device("dora").await;
    let dora = device.named(&id, &claims("dora"));
    assert_eq!(lab.try_token(&dora).await, 101);
    lab.revoke(Scope::Subject, "dora").await;
    assert_eq!(lab.try_token(&dora).await, 403);
    // Bob has noticed nothing.
    let quiet = timeout(Duration::from_millis(100), third.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    // What is taken back can be given back.
    assert!(gate.unrevoke(Scope::Subject, "alice").await.unwrap());
    assert_eq!(lab.try_token(&other).await, 101);
    assert_eq!(lab.try_token(&one).await, 403);
}

#[tokio::test]
async fn aut_14_a_revocation_outlives_the_process() {
    let lab = Lab::and(MANY).await;
    lab.revoke(Scope::Subject, "alice").await;
    let config = lab.front.config();
    let path = lab.dir.path().join("store.db");
    let reopened = tokio::task::spawn_blocking(move || {
        let engine = rvpn_gateway::store::Sqlite::open(&path).unwrap();
        let store = rvpn_gateway::store::Store::start(engine).unwrap();
        rvpn_gateway::auth::Gate::open(&config, store).unwrap()
    });
    assert!(reopened.await.unwrap().is_revoked("alice", None));
}

#[tokio::test(flavor = "multi_thread")]
async fn aut_22_bad_logins_cost_their_own_address_only() {
    let lab = Arc::new(Lab::and("[limits]\nlogin-failures = 20\n").await);
    let bad = Signer::ed25519().good();
    let from = async |address: &'static str, token: &str| {
        let io = lab.tcp_from(address).await;
        let mut io = lab.over(io).await;
        ask(&mut io, &login(token)).await.status
    };
    let mut seen = Vec::new();
    for _ in 0..40 {
        seen.push(from("127.0.0.2", &bad).await);
    }
    assert_eq!(seen.iter().filter(|s| **s == 403).count(), 20, "{seen:?}");
    assert_eq!(seen.iter().filter(|s| **s == 429).count(), 20, "{seen:?}");
    // Not even a good login is looked at from there; from elsewhere it is, at once.
    assert_eq!(from("127.0.0.2", &lab.ops.good()).await, 429);
    let flood = {
        let (lab, bad) = (Arc::clone(&lab), bad.clone());
        tokio::spawn(async move {
            loop {
                let io = lab.tcp_from("127.0.0.2").await;
                let mut io = lab.over(io).await;
                ask(&mut io, &login(&bad)).await;
            }
        })
    };
    let mut times = Vec::new();
    for _ in 0..100 {
        let start = Instant::now();
        assert_eq!(from("127.0.0.3", &lab.ops.good()).await, 101);
        times.push(start.elapsed());
    }
    flood.abort();
    times.sort();
    assert!(times[98] < Duration::from_secs(1), "p99 {:?}", times[98]);
}

#[tokio::test]
async fn aut_22_joining_is_limited_in_the_same_way() {
    let lab = Lab::and("[limits]\nlogin-failures = 5\n").await;
    let device = Signer::ed25519();
    let mut seen = Vec::new();
    for n in 0..8 {
        seen.push(lab.join(&b64(&[n; 16]), &device).await.0);
    }
    assert_eq!(seen, [403, 403, 403, 403, 403, 429, 429, 429]);
}

/// Counts the lines that a subscriber would write.
#[derive(Clone, Default)]
struct Lines(Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn dos_12_a_million_refusals_make_few_lines_and_show_no_token() {
    use rvpn_gateway::auth::Denied;
    use rvpn_gateway::limits::Refusals;
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, || {
        let start = Instant::now();
        let refusals = Refusals::new(start);
        let peer = "192.0.2.1".parse().unwrap();
        // A million in twenty seconds of the clock.
        for n in 0..1_000_000_u32 {
            refusals.note(
                Denied::Signature,
                peer,
                start + n * Duration::from_micros(20),
            );
        }
        assert_eq!(refusals.total(), 1_000_000);
    });
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let count = text.lines().count();
    assert!((10..=10 * 20).contains(&count), "{count} lines");
    assert!(text.contains("bad signature: 500"), "{text}");
}
