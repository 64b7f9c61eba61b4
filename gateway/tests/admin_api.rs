//! Who serves what, in our words and in the ancestor's, and the page for operators.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod front_support;
mod serve_support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use front_support::client::{Reply, ask};
use front_support::{Lab, PATIENCE};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use rvpn_gateway::api::view::SessionRow;
use rvpn_gateway::api::{self, Desk, SessionDirectory};
use serde_json::{Value, json};
use serve_support::{Served, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

struct Nobody;

impl SessionDirectory for Nobody {
    fn list(&self) -> Vec<SessionRow> {
        Vec::new()
    }

    fn kick(&self, _: u128) -> bool {
        false
    }
}

struct Office {
    lab: Lab,
    at: SocketAddr,
    token: String,
    _stop: watch::Sender<bool>,
}

impl Office {
    async fn open(more: &str) -> Office {
        let lab = Lab::and(more).await;
        let token = api::admin_token(lab.dir.path()).unwrap();
        let shown = String::from_utf8(token.bytes().to_vec()).unwrap();
        let desk = Arc::new(Desk {
            front: Arc::clone(&lab.front),
            directory: Arc::new(Nobody),
            token: Some(token),
            started: Instant::now(),
        });
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = socket.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        let router = api::router(desk);
        tokio::spawn(api::run(api::Socket::Tcp(socket), router, stopped));
        Office {
            lab,
            at,
            token: shown,
            _stop: stop,
        }
    }

    async fn raw(&self, method: &str, path: &str, headers: &str) -> Reply {
        let mut io = TcpStream::connect(self.at).await.unwrap();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\n{headers}Connection: close\r\n\r\n",
            self.at
        );
        ask(&mut io, &request).await
    }

    async fn call(&self, method: &str, path: &str) -> Reply {
        let bearer = format!("Authorization: Bearer {}\r\n", self.token);
        self.raw(method, path, &bearer).await
    }

    async fn get(&self, path: &str) -> Value {
        let reply = self.call("GET", path).await;
        assert_eq!(reply.status, 200, "{path} {reply:?}");
        serde_json::from_slice(&reply.rest).unwrap()
    }

    /// The result of an ancestor's endpoint, whose envelope is looked at too.
    async fn result(&self, path: &str) -> Value {
        let document = self.get(&format!("/api/com.daplie.tunnel/{path}")).await;
        assert_eq!(document["error"], "ok", "{document}");
        document["result"].clone()
    }

    /// A visitor whose TLS is passed on: it says hello, and gets `answer` back.
    /// Returns how long its hello was.
    async fn visit(&self, name: &str, served: &mut Served, answer: usize) -> usize {
        let config = ClientConfig::builder()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let server = ServerName::try_from(name.to_owned()).unwrap();
        let mut hello = ClientConnection::new(Arc::new(config), server).unwrap();
        let mut bytes = Vec::new();
        hello.write_tls(&mut bytes).unwrap();
        let mut visitor = self.lab.tcp().await;
        visitor.write_all(&bytes).await.unwrap();
        let asked = timeout(PATIENCE, served.asked.recv()).await.unwrap();
        let (_, mut far) = asked.expect("a visitor");
        let mut got = vec![0; bytes.len()];
        far.read_exact(&mut got).await.unwrap();
        assert_eq!(got, bytes);
        far.write_all(&vec![7; answer]).await.unwrap();
        let mut back = vec![0; answer];
        visitor.read_exact(&mut back).await.unwrap();
        drop(far);
        drop(visitor);
        bytes.len()
    }
}

/// Waits until the bytes of a visit are counted.
async fn counted(office: &Office, bytes: usize) {
    let deadline = Instant::now() + PATIENCE;
    while office.lab.front.table.snapshot().traffic.outbound < bytes as u64 {
        assert!(Instant::now() < deadline, "the bytes are not counted");
        sleep(Duration::from_millis(5)).await;
    }
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<_> = value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    keys.sort_unstable();
    keys
}

#[tokio::test]
async fn r_18_every_endpoint_of_the_ancestor_has_its_names() {
    let office = Office::open("").await;
    let table = &office.lab.front.table;
    let mut a = serve(table, "alice", "one", &["a.example", "*.b.example"]);
    let hello = office.visit("a.example", &mut a, 5000).await;
    counted(&office, 5000).await;

    let reply = office.call("GET", "/api/com.daplie.rvpn/servers").await;
    assert_eq!(
        reply.header("content-type"),
        Some("application/json; charset=UTF-8")
    );
    let first: Value = serde_json::from_slice(&reply.rest).unwrap();
    let fields = [
        "error",
        "error_description",
        "error_uri",
        "result",
        "schema",
        "txid",
        "txts",
        "type",
    ];
    assert_eq!(keys(&first), fields);
    assert_eq!(
        (&first["type"], &first["schema"]),
        (&json!("servers/GET"), &json!(""))
    );
    let second = office.get("/api/com.daplie.tunnel/servers").await;
    assert!(second["txid"].as_u64() > first["txid"].as_u64());

    let counts = ["bytes_in", "bytes_out", "requests", "responses"];
    let server = second["result"]["servers"][0].clone();
    let mut fields = vec![
        "domains",
        "duration",
        "idle",
        "server_id",
        "server_name",
        "server_state",
        "source_address",
    ];
    fields.extend(counts);
    fields.sort_unstable();
    assert_eq!(keys(&server), fields);
    assert_eq!(server["server_name"], "a.example");
    assert_eq!(
        (&server["server_state"], &server["server_id"]),
        (&json!(true), &json!(1))
    );
    let domain = &server["domains"][0];
    let mut fields = vec!["domain_name", "server_id", "source_addr"];
    fields.extend(counts);
    fields.sort_unstable();
    assert_eq!(keys(domain), fields);
    assert_eq!(server["domains"][1]["domain_name"], "*.b.example");

    // One direction means one thing, on every object.
    let in_out = |v: &Value| {
        (
            v["bytes_in"].as_u64().unwrap(),
            v["bytes_out"].as_u64().unwrap(),
        )
    };
    let expected = (5000, hello as u64);
    assert_eq!(in_out(&server), expected);
    assert_eq!(in_out(domain), expected);
    let one = office.result("server/1").await;
    assert_eq!(in_out(&one), expected);
    assert!(one.get("requests").is_none() && one.get("responses").is_none());
    let of_name = office.result("domain/a.example").await;
    assert_eq!(
        (of_name.as_array().unwrap().len(), in_out(&of_name[0])),
        (1, expected)
    );
    let domains = office.result("domains").await;
    assert_eq!(domains["domain_total"], 2);
    let named = domains["domains"].as_array().unwrap();
    let named = named
        .iter()
        .find(|d| d["domain_name"] == "a.example")
        .unwrap();
    let traffic = ["BytesIn", "BytesOut", "Requests", "Responses"];
    for one in [
        &named["traffic"],
        &named["servers"][0]["traffic"],
        &domains["traffic"],
    ] {
        assert_eq!(keys(one), traffic);
        assert_eq!(
            (&one["BytesIn"], &one["BytesOut"]),
            (&json!(5000), &json!(hello))
        );
    }

    let status = office.result("status/").await;
    assert_eq!(
        keys(&status),
        [
            "admin_domain",
            "admin_traffic",
            "dead_time",
            "ext_connections",
            "loadbalance_default_method",
            "name",
            "traffic",
            "uptime",
            "wss_connections",
            "wss_domain"
        ]
    );
    assert_eq!(
        keys(&status["dead_time"]),
        ["cancel_check", "dwell", "idle"]
    );
    assert_eq!(status["wss_domain"], "vpn.test");
    assert_eq!(
        status["wss_connections"],
        json!({"current_connections": 1, "total_connections": 1})
    );
    assert_eq!(status["ext_connections"]["total_connections"], 1);
    assert!(status["admin_traffic"]["Requests"].as_u64() >= Some(6));
    assert!(status["admin_traffic"]["BytesOut"].as_u64() > Some(1000));

    let early = office.get("/api/servers").await;
    assert_eq!(keys(&early), ["servers"]);
    let early = &early["servers"][0];
    assert_eq!(
        keys(early),
        [
            "bytes_in",
            "bytes_out",
            "domains",
            "duration",
            "server_name"
        ]
    );
    assert_eq!(
        keys(&early["domains"][0]),
        ["bytes_in", "bytes_out", "domain"]
    );
    assert_eq!(in_out(early), expected);
}

#[tokio::test]
async fn r_13_counters_are_exact_for_each_client_each_name_and_in_total() {
    let office = Office::open("").await;
    let table = &office.lab.front.table;
    let mut a = serve(table, "alice", "one", &["a.example", "c.example"]);
    let mut b = serve(table, "bob", "one", &["b.example"]);
    let mut expected = std::collections::BTreeMap::new();
    let mut total = 0;
    for (name, answer) in [
        ("a.example", 1),
        ("b.example", 70_001),
        ("c.example", 333),
        ("a.example", 16_385),
        ("b.example", 0),
    ] {
        let client = if name == "b.example" { &mut b } else { &mut a };
        let hello = office.visit(name, client, answer).await;
        let sums = expected.entry(name).or_insert((0, 0, 0));
        *sums = (sums.0 + hello as u64, sums.1 + answer as u64, sums.2 + 1);
        total += answer;
    }
    counted(&office, total).await;
    let row = |v: &Value| ["inbound", "outbound", "visitors-total"].map(|k| v[k].as_u64().unwrap());
    let names = office.get("/api/v1/names").await;
    let names = names["names"].as_array().unwrap();
    assert_eq!(names.len(), 3);
    let mut whole = [0, 0, 0];
    for one in names {
        let (hello, answer, visits) = expected[one["name"].as_str().unwrap()];
        assert_eq!(row(one), [hello, answer, visits], "{one}");
        whole.iter_mut().zip(row(one)).for_each(|(w, n)| *w += n);
    }
    let servers = office.get("/api/v1/servers").await;
    let mut of_clients = [0, 0, 0];
    for one in servers["servers"].as_array().unwrap() {
        let mut of_names = [0, 0, 0];
        for offer in one["offers"].as_array().unwrap() {
            of_names
                .iter_mut()
                .zip(row(offer))
                .for_each(|(w, n)| *w += n);
        }
        assert_eq!(row(one), of_names, "a client is the sum of its names");
        of_clients
            .iter_mut()
            .zip(of_names)
            .for_each(|(w, n)| *w += n);
    }
    assert_eq!(of_clients, whole);
    let status = office.result("status/").await;
    assert_eq!(status["traffic"]["BytesOut"], json!(whole[0]));
    assert_eq!(status["traffic"]["BytesIn"], json!(whole[1]));
    assert_eq!(
        status["ext_connections"]["total_connections"],
        json!(whole[2])
    );
}

#[tokio::test]
async fn r_18_its_errors_are_answers_and_its_slashes_are_corrected() {
    let office = Office::open("").await;
    for (path, error) in [
        ("server/", "server-id is missing"),
        ("server/x", "server-id is not an integer"),
        ("server/7", "server-id was not found"),
        ("domain/", "domain-name is missing"),
        ("domain/a.example", "domain-name was not found"),
    ] {
        let path = format!("/api/com.daplie.tunnel/{path}");
        let document = office.get(&path).await;
        assert_eq!(document["error"], error);
        assert_eq!(document["error_uri"], json!(path));
        assert_eq!(document["result"], Value::Null);
    }
    for (from, to) in [
        ("status", "status/"),
        ("servers/", "servers"),
        ("server", "server/"),
        ("server/1/", "server/1"),
        ("domains/?x=1", "domains?x=1"),
        ("domain", "domain/"),
        ("domain/a.example/", "domain/a.example"),
    ] {
        for prefix in ["/api/com.daplie.tunnel", "/api/com.daplie.rvpn"] {
            let reply = office.call("GET", &format!("{prefix}/{from}")).await;
            assert_eq!(reply.status, 301, "{from}");
            let expected = format!("{prefix}/{to}");
            assert_eq!(reply.header("location"), Some(expected.as_str()));
        }
    }
}

#[tokio::test]
async fn r_18_nobody_reads_it_without_the_admin_token() {
    let office = Office::open("").await;
    for path in [
        "/api/com.daplie.tunnel/status/",
        "/api/com.daplie.tunnel/servers",
        "/api/com.daplie.rvpn/server/1",
        "/api/com.daplie.rvpn/domains",
        "/api/com.daplie.rvpn/domain/a.example",
        "/api/servers",
        "/api/v1/servers",
        "/api/v1/names",
        "/api/v1/certificates",
    ] {
        assert_eq!(office.raw("GET", path, "").await.status, 401, "{path}");
        // Nor does anybody at all on the public port.
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: vpn.test\r\nAuthorization: Bearer {}\r\nConnection: close\r\n\r\n",
            office.token
        );
        assert_eq!(office.lab.request(&request).await.status, 404, "{path}");
    }
}

#[tokio::test]
async fn r_15_a_dead_server_is_shown_and_then_reaped() {
    let office = Office::open("[serve.dead-time]\nidle = 2\n").await;
    let table = &office.lab.front.table;
    let a = serve(table, "alice", "one", &["a.example"]);
    let id = a.place.number();
    drop(a);
    let one = office.result(&format!("server/{id}")).await;
    assert_eq!(one["server_state"], false);
    // It serves nobody any more.
    let found = office.result("domain/a.example").await;
    assert_eq!(found.as_array().map(Vec::len), Some(1));
    let status = office.result("status/").await;
    assert_eq!(status["wss_connections"]["current_connections"], 0);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let all = office.result("servers").await;
        if all["servers"] == json!([]) {
            break;
        }
        assert!(Instant::now() < deadline, "it stays: {all}");
        sleep(Duration::from_millis(50)).await;
    }
    let path = format!("/api/com.daplie.tunnel/server/{id}");
    assert_eq!(office.get(&path).await["error"], "server-id was not found");
}

#[tokio::test]
async fn r_31_servers_are_listed_and_ended() {
    let office = Office::open("").await;
    let table = &office.lab.front.table;
    let mut a = serve(table, "alice", "one", &["a.example"]);
    let b = serve(table, "alice", "two", &["a.example"]);
    let all = office.get("/api/v1/servers").await;
    let ids: Vec<_> = all["servers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["id"].as_u64().unwrap())
        .collect();
    assert_eq!(ids, [a.place.number(), b.place.number()]);
    assert_eq!(all["servers"][1]["instance"], "two");
    assert_eq!(all["servers"][1]["offers"][0]["name"], "a.example");
    let names = office.get("/api/v1/names").await;
    assert_eq!(names["names"][0]["servers"], json!(ids));
    assert_eq!(names["names"][0]["account"], "alice");

    let path = format!("/api/v1/servers/{}", b.place.number());
    assert_eq!(office.call("DELETE", &path).await.status, 204);
    assert_eq!(b.fake.ended(), Some((1008, "disconnected by the operator")));
    assert_eq!(a.fake.ended(), None);
    // Nobody is sent to it from now on, though its connection is not closed yet.
    for _ in 0..3 {
        office.visit("a.example", &mut a, 10).await;
    }
    let names = office.get("/api/v1/names").await;
    assert_eq!(names["names"][0]["servers"], json!([a.place.number()]));
    for (path, status) in [
        (path.as_str(), 404),
        ("/api/v1/servers/99", 404),
        ("/api/v1/servers/x", 400),
    ] {
        let reply = office.call("DELETE", path).await;
        assert_eq!(reply.status, status, "{path}");
        assert_eq!(
            reply.header("content-type"),
            Some("application/problem+json")
        );
    }
}

#[tokio::test]
async fn r_17_the_page_is_found_and_brings_everything_along() {
    let office = Office::open("").await;
    let to = |reply: Reply| (reply.status, reply.header("location").map(str::to_owned));
    assert_eq!(
        to(office.raw("GET", "/", "").await),
        (301, Some("/admin".to_owned()))
    );
    assert_eq!(
        to(office.raw("GET", "/admin", "").await),
        (301, Some("/admin/".to_owned()))
    );
    for (path, kind) in [
        ("/admin/", "text/html; charset=utf-8"),
        ("/admin/admin.css", "text/css; charset=utf-8"),
        ("/admin/admin.js", "text/javascript; charset=utf-8"),
    ] {
        let reply = office.raw("GET", path, "").await;
        assert_eq!(
            (reply.status, reply.header("content-type")),
            (200, Some(kind))
        );
        let policy = reply.header("content-security-policy").unwrap();
        assert!(
            policy.starts_with("default-src 'none';") && !policy.contains("unsafe"),
            "{policy}"
        );
        let text = reply.text();
        for outside in ["http://", "https://", "innerHTML", "style=", "onclick"] {
            assert!(!text.contains(outside), "{path} has {outside}");
        }
    }
    let page = office.raw("GET", "/admin/", "").await.text();
    for part in ["admin.css", "admin.js", "id=\"search\"", "id=\"refresh\""] {
        assert!(page.contains(part), "{part}");
    }
}
