//! The operators' API through its real listener.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod front_support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use front_support::client::{Reply, ask, frame, login};
use front_support::tokens::{Signer, b64, claims};
use front_support::{Lab, NAME};
use rvpn_gateway::api::view::{QueueRow, SessionRow};
use rvpn_gateway::api::{self, Desk, SessionDirectory};
use rvpn_gateway::meter::flush::UsageStore;
use rvpn_gateway::meter::{DropReason, Side, Totals, Usage};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;

/// One session, number 5, until it is kicked.
struct OneSession(std::sync::Mutex<bool>);

impl SessionDirectory for OneSession {
    fn list(&self) -> Vec<SessionRow> {
        let mut side = Side::default();
        side.pass(3, 300);
        side.drop(DropReason::Spoofed, 2);
        let row = SessionRow {
            id: 5,
            account: "alice".into(),
            service: "packets".into(),
            peer: "192.0.2.1:4000".parse().unwrap(),
            started_ms: 1000,
            addresses: vec!["10.64.0.2".parse().unwrap()],
            slot: Some(0),
            outbound: (&side).into(),
            inbound: (&Side::default()).into(),
            queue: QueueRow {
                packets: 7,
                bytes: 9000,
                memory: 65_536,
            },
        };
        let here = *self.0.lock().unwrap();
        here.then_some(row).into_iter().collect()
    }

    fn kick(&self, id: u128) -> bool {
        id == 5 && std::mem::replace(&mut *self.0.lock().unwrap(), false)
    }
}

struct Office {
    lab: Lab,
    at: SocketAddr,
    token: String,
    _stop: watch::Sender<bool>,
}

impl Office {
    async fn open() -> Office {
        let lab = Lab::and("[limits]\nlogin-failures = 100000\n").await;
        let token = api::admin_token(lab.dir.path()).unwrap();
        let shown = String::from_utf8(token.bytes().to_vec()).unwrap();
        let desk = Arc::new(Desk {
            front: Arc::clone(&lab.front),
            directory: Arc::new(OneSession(std::sync::Mutex::new(true))),
            token: Some(token),
            started: Instant::now(),
        });
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = socket.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(api::run(
            api::Socket::Tcp(socket),
            api::router(desk),
            stopped,
        ));
        Office {
            lab,
            at,
            token: shown,
            _stop: stop,
        }
    }

    async fn raw(&self, method: &str, path: &str, headers: &str, body: &str) -> Reply {
        let mut io = TcpStream::connect(self.at).await.unwrap();
        let host = match headers.contains("Host:") {
            true => String::new(),
            false => format!("Host: {}\r\n", self.at),
        };
        let request = format!(
            "{method} {path} HTTP/1.1\r\n{host}{headers}Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        ask(&mut io, &request).await
    }

    async fn call(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let bearer = format!("Authorization: Bearer {}\r\n", self.token);
        let reply = self.raw(method, path, &bearer, body).await;
        if reply.status >= 400 {
            let kind = reply.header("content-type");
            assert_eq!(
                kind,
                Some("application/problem+json"),
                "{method} {path} {reply:?}"
            );
            let problem: Value = serde_json::from_slice(&reply.rest).unwrap();
            assert_eq!(problem["status"], reply.status);
            assert!(!problem["detail"].as_str().unwrap().is_empty());
            return (reply.status, problem);
        }
        let document = serde_json::from_slice(&reply.rest).unwrap_or(Value::Null);
        (reply.status, document)
    }

    async fn get(&self, path: &str) -> Value {
        let (status, document) = self.call("GET", path, "").await;
        assert_eq!(status, 200, "{path} {document}");
        document
    }
}

#[tokio::test]
async fn nothing_without_the_admin_token() {
    let office = Office::open().await;
    let basic = "Authorization: Basic YTpi\r\n".to_owned();
    let wrong = format!("Authorization: Bearer {}x\r\n", office.token);
    let cookie = format!("Cookie: token={0}; Authorization={0}\r\n", office.token);
    for headers in ["", &basic, &wrong, &cookie, "Authorization: Bearer\r\n"] {
        for (method, path) in [
            ("GET", "/api/v1/sessions"),
            ("GET", "/api/v1/config"),
            ("POST", "/api/v1/invites"),
            ("DELETE", "/api/v1/keys/x"),
        ] {
            let reply = office.raw(method, path, headers, "").await;
            assert_eq!(reply.status, 401, "{method} {path}");
            assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
        }
    }
    // A token in the address would be in logs.
    let path = format!("/api/v1/health?token={}", office.token);
    assert_eq!(office.raw("GET", &path, "", "").await.status, 401);
    // Whether it lives is nobody's secret.
    assert_eq!(office.raw("GET", "/livez", "", "").await.status, 200);
    assert_eq!(office.raw("GET", "/readyz", "", "").await.status, 200);
    office.lab.echo.not_ready.store(true, Ordering::SeqCst);
    assert_eq!(office.raw("GET", "/readyz", "", "").await.status, 503);
}

#[tokio::test]
async fn aut_18_a_rebound_name_does_not_reach_the_admin_listener() {
    let office = Office::open().await;
    let bearer = format!("Authorization: Bearer {}\r\n", office.token);
    for (host, status) in [
        ("127.0.0.1", 200),
        ("localhost:7980", 200),
        ("[::1]", 200),
        ("evil.test", 421),
        ("localhost.evil.test", 421),
        ("vpn.test", 421),
        ("192.0.2.1", 421),
    ] {
        let headers = format!("Host: {host}\r\n{bearer}");
        let reply = office.raw("GET", "/api/v1/health", &headers, "").await;
        assert_eq!(reply.status, status, "{host}");
        let reply = office.raw("GET", "/livez", &headers, "").await;
        assert_eq!(reply.status, status, "{host}");
    }
    for origin in [
        "http://evil.test",
        "null",
        "https://vpn.test",
        "http://localhost",
    ] {
        let headers = format!("Origin: {origin}\r\n{bearer}");
        let reply = office.raw("GET", "/api/v1/health", &headers, "").await;
        assert_eq!(reply.status, 403, "{origin}");
    }
    let own = format!("Origin: http://{}\r\n{bearer}", office.at);
    assert_eq!(
        office.raw("GET", "/api/v1/health", &own, "").await.status,
        200
    );
    let absolute = "http://evil.test/api/v1/health";
    assert_eq!(office.raw("GET", absolute, &bearer, "").await.status, 421);
}

#[tokio::test]
async fn sessions_are_listed_and_kicked() {
    let office = Office::open().await;
    let list = office.get("/api/v1/sessions").await;
    let row = &list["sessions"][0];
    let id = "00000000000000000000000000000005";
    assert_eq!(
        (row["id"].as_str(), row["account"].as_str()),
        (Some(id), Some("alice"))
    );
    assert_eq!(row["outbound"]["payload"], 300);
    assert_eq!(row["outbound"]["drops"], json!({"spoofed": 2}));
    assert_eq!(
        row["queue"],
        json!({"packets": 7, "bytes": 9000, "memory": 65_536})
    );
    let path = format!("/api/v1/sessions/{id}");
    assert_eq!(office.call("DELETE", &path, "").await.0, 204);
    assert_eq!(office.call("DELETE", &path, "").await.0, 404);
    for odd in ["5", "../config", "+0000000000000000000000000000005", "g"] {
        let status = office
            .call("DELETE", &format!("/api/v1/sessions/{odd}"), "")
            .await
            .0;
        assert!(matches!(status, 400 | 404 | 405), "{odd} {status}");
    }
    assert_eq!(office.get("/api/v1/sessions").await["sessions"], json!([]));
}

#[tokio::test]
async fn usage_comes_from_the_ledger() {
    let office = Office::open().await;
    let mut totals = Totals::default();
    totals.outbound.pass(10, 1000);
    totals.inbound.drop(DropReason::Overload, 4);
    let usage = |session, account: &str| Usage {
        session,
        account: account.into(),
        service: "packets".into(),
        started_ms: 1000,
        ended_ms: None,
        totals,
    };
    let rows = vec![usage(1, "alice"), usage(2, "alice"), usage(3, "bob")];
    let store = office.lab.front.gate.store().clone();
    tokio::task::spawn_blocking(move || store.put_usage(&rows))
        .await
        .unwrap()
        .unwrap();
    let all = office.get("/api/v1/usage").await;
    assert_eq!(all["usage"].as_array().unwrap().len(), 3);
    let bob = office.get("/api/v1/usage?account=bob").await;
    assert_eq!(bob["usage"].as_array().unwrap().len(), 1);
    assert_eq!(bob["usage"][0]["inbound"]["drops"], json!({"overload": 4}));
    let accounts = office.get("/api/v1/usage/accounts").await;
    assert_eq!(accounts["accounts"][0]["account"], "alice");
    assert_eq!(accounts["accounts"][0]["outbound"]["payload"], 2000);
    for odd in [
        "limit=0",
        "limit=10001",
        "limit=x",
        "acount=bob",
        "since-ms=-1",
    ] {
        let path = format!("/api/v1/usage?{odd}");
        assert_eq!(office.call("GET", &path, "").await.0, 400, "{odd}");
    }
}

#[tokio::test]
async fn an_invite_leads_a_device_in_and_its_key_can_be_removed() {
    let office = Office::open().await;
    let ask_for = json!({"account": "alice", "address": "vpn.test:8443"}).to_string();
    let (status, invited) = office.call("POST", "/api/v1/invites", &ask_for).await;
    assert_eq!(status, 201, "{invited}");
    let code = invited["code"].as_str().unwrap();
    let pin = office.lab.front.tls.fingerprint();
    assert_eq!(
        invited["link"],
        format!("rvpn://vpn.test:8443/?fp={pin}&code={code}")
    );
    let list = office.get("/api/v1/invites").await;
    assert_eq!(list["invites"][0]["account"], "alice");
    assert!(!list.to_string().contains(code), "a code is shown once");

    let device = Signer::ed25519();
    let body = json!({"code": code, "public-key": b64(&device.public)}).to_string();
    let request = format!(
        "POST /rvpn/v1/join HTTP/1.1\r\nHost: vpn.test\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let reply = office.lab.request(&request).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let joined: Value = serde_json::from_slice(&reply.rest).unwrap();
    let id = joined["key-id"].as_str().unwrap();
    let token = device.named(id, &claims("alice"));
    assert_eq!(office.lab.try_token(&token).await, 101);
    assert_eq!(office.get("/api/v1/invites").await["invites"], json!([]));

    let keys = office.get("/api/v1/keys").await;
    assert_eq!(keys["devices"][0]["id"], id);
    assert_eq!(
        keys["configured"][0],
        json!({"name": "ops", "algorithm": "EdDSA"})
    );
    let held = office.lab.socket(&login(&token)).await;
    let (status, removed) = office
        .call("DELETE", &format!("/api/v1/keys/{id}"), "")
        .await;
    assert_eq!((status, &removed["ended"]), (200, &json!(1)));
    assert_eq!(office.lab.try_token(&token).await, 403);
    drop(held);
    assert_eq!(
        office
            .call("DELETE", &format!("/api/v1/keys/{id}"), "")
            .await
            .0,
        404
    );
    for odd in [
        "{}",
        "x",
        "[]",
        r#"{"account":"a b"}"#,
        r#"{"account":"legacy:old"}"#,
        r#"{"account":"a","uses":0}"#,
        r#"{"account":"a","valid-seconds":0}"#,
        r#"{"account":"a","address":"a b"}"#,
        r#"{"account":"a","acount":"b"}"#,
    ] {
        assert_eq!(
            office.call("POST", "/api/v1/invites", odd).await.0,
            400,
            "{odd}"
        );
    }
    // An invite can be withdrawn before it is used.
    let (_, invited) = office.call("POST", "/api/v1/invites", &ask_for).await;
    let id = invited["invite"]["id"].as_str().unwrap();
    assert_eq!(
        office
            .call("DELETE", &format!("/api/v1/invites/{id}"), "")
            .await
            .0,
        204
    );
    assert_eq!(office.get("/api/v1/invites").await["invites"], json!([]));
}

#[tokio::test]
async fn an_invite_says_what_its_devices_may_serve() {
    let office = Office::open().await;
    let ask_for =
        json!({"account": "alice", "names": ["App.ex.org", "*.x.ex.org"], "ports": [15432]});
    let (status, made) = office
        .call("POST", "/api/v1/invites", &ask_for.to_string())
        .await;
    assert_eq!(status, 201, "{made}");
    assert_eq!(made["invite"]["names"], json!(["app.ex.org", "*.x.ex.org"]));
    assert_eq!(made["invite"]["ports"], json!([15432]));
    let many: Vec<u16> = (1..300).collect();
    for (what, odd) in [
        ("names", json!(["*.org"])),
        ("names", json!(["a b"])),
        ("names", json!([NAME])),
        ("ports", json!([0])),
        ("ports", json!([65536])),
        ("ports", json!(many)),
    ] {
        let mut ask_for = json!({"account": "alice"});
        ask_for[what] = odd;
        let ask_for = ask_for.to_string();
        let (status, why) = office.call("POST", "/api/v1/invites", &ask_for).await;
        assert_eq!(status, 400, "{ask_for}: {why}");
    }
}

#[tokio::test]
async fn a_revocation_is_made_listed_and_taken_back() {
    let office = Office::open().await;
    let token = office.lab.ops.good();
    let held = office.lab.socket(&login(&token)).await;
    let body = json!({"scope": "subject", "value": "alice", "reason": "left"}).to_string();
    let (status, revoked) = office.call("POST", "/api/v1/revocations", &body).await;
    assert_eq!((status, &revoked["ended"]), (201, &json!(1)));
    assert_eq!(office.lab.try_token(&token).await, 403);
    drop(held);
    let list = office.get("/api/v1/revocations").await;
    assert_eq!(list["revocations"][0]["value"], "alice");
    let path = "/api/v1/revocations/subject/alice";
    assert_eq!(office.call("DELETE", path, "").await.0, 204);
    assert_eq!(office.call("DELETE", path, "").await.0, 404);
    assert_eq!(office.lab.try_token(&token).await, 101);
    for odd in [
        r#"{"scope":"all","value":"x"}"#,
        r#"{"scope":"jti","value":"a b"}"#,
        "null",
    ] {
        assert_eq!(
            office.call("POST", "/api/v1/revocations", odd).await.0,
            400,
            "{odd}"
        );
    }
}

#[tokio::test]
async fn the_configuration_is_shown_without_secrets() {
    let office = Office::open().await;
    let config = office.get("/api/v1/config").await;
    assert_eq!(config["names"], json!(["vpn.test"]));
    assert_eq!(config["keys"][0]["name"], "ops");
    assert_eq!(
        (&config["page"], &config["demo"]),
        (&json!(true), &Value::Null)
    );
    let pin = office.lab.front.tls.fingerprint().to_string();
    assert_eq!(config["fingerprint"], json!(pin));
    assert!(!config.to_string().contains(&office.token));
    let health = office.get("/api/v1/health").await;
    assert_eq!(health["ready"], true);
    for nowhere in ["/api", "/api/v2/health", "/api/v1/nothing", "/console"] {
        assert_eq!(office.call("GET", nowhere, "").await.0, 404, "{nowhere}");
    }
    assert_eq!(office.call("PUT", "/api/v1/health", "").await.0, 405);
    let long = "x".repeat(20_000);
    assert_eq!(office.call("POST", "/api/v1/invites", &long).await.0, 413);
}

#[tokio::test]
async fn the_admin_token_is_made_once_and_kept_from_others() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let first = api::admin_token(dir.path()).unwrap();
    let mode = std::fs::metadata(dir.path().join("admin.token"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(first.bytes().len() >= 43);
    assert_eq!(api::admin_token(dir.path()).unwrap(), first);
    assert!(!format!("{first:?}").contains(std::str::from_utf8(first.bytes()).unwrap()));
}

#[tokio::test]
async fn a_socket_file_needs_no_token() {
    let office = Office::open().await;
    let path = office.lab.dir.path().join("admin.sock");
    let desk = Arc::new(Desk {
        front: Arc::clone(&office.lab.front),
        directory: Arc::new(OneSession(std::sync::Mutex::new(true))),
        token: None,
        started: Instant::now(),
    });
    let socket = UnixListener::bind(&path).unwrap();
    let (_stop, stopped) = watch::channel(false);
    tokio::spawn(api::run(
        api::Socket::Unix(socket),
        api::router(desk),
        stopped,
    ));
    let mut io = UnixStream::connect(&path).await.unwrap();
    let request = "GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\n\r\n";
    assert_eq!(ask(&mut io, request).await.status, 200);
}

/// R-16: ports come and go while the gateway runs, and each request says how it went.
#[tokio::test]
async fn r_16_listeners_are_added_exist_or_cannot_be() {
    let office = Office::open().await;
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = free.local_addr().unwrap();
    let ask = format!("{{\"address\": \"{at}\"}}");
    // Busy: somebody else has it.
    let (status, problem) = office.call("POST", "/api/v1/listeners", &ask).await;
    assert_eq!(status, 409, "{problem}");
    assert!(
        problem["detail"]
            .as_str()
            .unwrap()
            .contains("another listener or program")
    );
    drop(free);
    let (status, added) = office.call("POST", "/api/v1/listeners", &ask).await;
    assert_eq!(
        (status, &added["status"]),
        (201, &"added".into()),
        "{added}"
    );
    assert_eq!(added["address"], at.to_string());
    // It serves all that the first one serves.
    let request = login(&office.lab.ops.good());
    let mut io = TcpStream::connect(at).await.unwrap();
    assert_eq!(ask_on(&mut io, &request).await, 101);
    let (status, exists) = office.call("POST", "/api/v1/listeners", &ask).await;
    assert_eq!((status, &exists["status"]), (200, &"exists".into()));
    let other = format!("{{\"address\": \"{at}\", \"for\": \"box.example\"}}");
    let (status, problem) = office.call("POST", "/api/v1/listeners", &other).await;
    assert_eq!(status, 409, "{problem}");

    let list = office.get("/api/v1/listeners").await;
    let rows = list["listeners"].as_array().unwrap();
    let row = |address: SocketAddr| rows.iter().find(|r| r["address"] == address.to_string());
    assert_eq!(row(at).unwrap()["origin"], "api");
    assert_eq!(row(office.lab.at).unwrap()["origin"], "config");
    assert_eq!(rows.len(), 2);

    // By its port, as by its address. Whoever came through it stays.
    let path = format!("/api/v1/listeners/{}", at.port());
    assert_eq!(office.call("DELETE", &path, "").await.0, 204);
    assert!(TcpStream::connect(at).await.is_err());
    io.write_all(&frame("wire?")).await.unwrap();
    assert!(io.read(&mut [0; 64]).await.unwrap() > 2, "still a session");
    assert_eq!(office.call("DELETE", &path, "").await.0, 404);
    // The port is free at once.
    assert_eq!(office.call("POST", "/api/v1/listeners", &ask).await.0, 201);
    let path = format!("/api/v1/listeners/{at}");
    assert_eq!(office.call("DELETE", &path, "").await.0, 204);

    for (wrong, status, why) in [
        ("{}", 400, "either address or port"),
        ("{\"address\": \"x\"}", 400, "address"),
        ("{\"port\": 70000}", 400, "70000"),
        ("{\"port\": 9, \"address\": \"127.0.0.1:9\"}", 400, "either"),
        ("{\"port\": 9001, \"mode\": \"tsl\"}", 400, "tsl"),
        ("{\"port\": 9001, \"proxy-from\": [\"x\"]}", 400, "network"),
        ("{\"port\": 9001, \"for\": \"a b\"}", 400, "no name"),
        (
            "{\"address\": \"203.0.113.9:9001\"}",
            422,
            "does not have that address",
        ),
    ] {
        let (got, problem) = office.call("POST", "/api/v1/listeners", wrong).await;
        assert_eq!(got, status, "{wrong} {problem}");
        assert!(
            problem["detail"].as_str().unwrap().contains(why),
            "{problem}"
        );
    }
    assert_eq!(
        office.call("DELETE", "/api/v1/listeners/x", "").await.0,
        400
    );
    // Where translated connections come from nobody listens, at run time either.
    office.lab.front.listeners.forbid((16_384, 32_767));
    let ask = "{\"address\": \"127.0.0.1:20000\"}";
    let (status, problem) = office.call("POST", "/api/v1/listeners", ask).await;
    assert_eq!(status, 422);
    assert!(
        problem["detail"]
            .as_str()
            .unwrap()
            .contains("16384 to 32767"),
        "{problem}"
    );
}

async fn ask_on(io: &mut TcpStream, request: &str) -> u16 {
    ask(io, request).await.status
}
