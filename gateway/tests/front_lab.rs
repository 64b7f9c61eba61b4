//! The gateway's program on the real helper, from a client's machine through
//! TLS and login to the laboratory's internet and back.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod front_support;

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use front_support::client::{NATIVE, ask, upgrade};
use front_support::tokens::{Signer, b64, claims, now};
use front_support::{NAME, PATIENCE};
use futures_util::{SinkExt, StreamExt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rvpn_lab::ns::{Daemon, Ns};
use rvpn_lab::probe::Canary;
use rvpn_lab::topology::{GW4, UP4};
use rvpn_lab::{Helper, Lab, packet, wait_until};
use rvpn_proto::control::{Hello, Message as Control, Stage};
use serde_json::{Value, json};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

const SERVER: &str = "1.1.1.1:5353";

type Socket = WebSocketStream<TlsStream<TcpStream>>;

/// The program in its namespace.
struct Gateway {
    daemon: Daemon,
    dir: PathBuf,
    ops: Signer,
}

impl Gateway {
    fn start(lab: &Lab, helper: &Helper) -> Gateway {
        let dir = lab.dir.join("front");
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        let ops = Signer::ed25519();
        ops.write_public(&dir.join("ops.pem"));
        let user = match rvpn_lab::topology::many_uids() {
            true => format!("user = {}\n", helper.gateway_uid),
            false => String::new(),
        };
        let text = format!(
            "names = [\"{NAME}\"]\nstate-dir = {:?}\n{user}admin.address = \"unix:{}\"\n\
             [helper]\nsocket = {:?}\nuser = {}\n\
             [[listener]]\naddress = \"{GW4}:443\"\n\
             [[key]]\nname = \"ops\"\nalgorithm = \"EdDSA\"\nfile = \"ops.pem\"\n\
             [[dialect]]\npath = \"/old\"\nkind = \"text46\"\n",
            dir.join("state"),
            dir.join("admin.sock").display(),
            helper.socket,
            helper.uid,
        );
        fs::write(dir.join("gateway.toml"), text).unwrap();
        let daemon = Gateway::run(lab, &dir);
        Gateway { daemon, dir, ops }
    }

    fn run(lab: &Lab, dir: &std::path::Path) -> Daemon {
        let log = fs::File::create(dir.join("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_rvpn-gateway"));
        command
            .env_clear()
            .arg("--config")
            .arg(dir.join("gateway.toml"));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let mut daemon = lab.gw.daemon(&mut command);
        wait_until("the gateway is ready", || {
            let log = fs::read_to_string(dir.join("log")).unwrap();
            if let Some(status) = daemon.child.try_wait().unwrap() {
                panic!("the gateway ended with {status}: {log}");
            }
            log.contains(" ready ")
        });
        daemon
    }

    async fn tls(&self) -> TlsStream<TcpStream> {
        let mut roots = RootCertStore::empty();
        let file = self.dir.join("state/tls.crt");
        roots
            .add(CertificateDer::from_pem_file(file).unwrap())
            .unwrap();
        let config = rustls::ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let at: SocketAddr = format!("{GW4}:443").parse().unwrap();
        let tcp = TcpStream::connect(at).await.unwrap();
        let name = ServerName::try_from(NAME).unwrap();
        TlsConnector::from(Arc::new(config))
            .connect(name, tcp)
            .await
            .unwrap()
    }

    async fn socket(&self, target: &str, more: &str) -> Socket {
        let mut io = self.tls().await;
        let reply = ask(&mut io, &upgrade(target, NAME, more)).await;
        assert_eq!(reply.status, 101, "{reply:?}");
        WebSocketStream::from_partially_read(io, reply.rest, Role::Client, None).await
    }

    /// An older client that knows its address.
    async fn older(&self, token: &str) -> (Socket, String) {
        let mut socket = self.socket(&format!("/old?access_token={token}"), "").await;
        let Message::Text(hello) = next(&mut socket).await else {
            panic!("no greeting");
        };
        let base = hello.split('/').next().unwrap();
        let address = base.strip_suffix(".0").map(|net| format!("{net}.2"));
        (socket, address.unwrap())
    }

    async fn native(&self, token: &str) -> (Socket, rvpn_proto::control::Welcome) {
        let more =
            format!("Sec-WebSocket-Protocol: rvpn.packets.1\r\nAuthorization: Bearer {token}\r\n");
        let mut socket = self.socket(NATIVE, &more).await;
        let hello = Control::Hello(Hello {
            versions: vec![1],
            name: "test".to_owned(),
            instance: "phone".to_owned(),
            ..Hello::default()
        });
        let text = hello.to_text(Stage::BeforeLogin).unwrap();
        socket.send(Message::text(text)).await.unwrap();
        let Message::Text(text) = next(&mut socket).await else {
            panic!("no welcome");
        };
        match Control::parse(&text, Stage::Session).unwrap() {
            Control::Welcome(welcome) => (socket, *welcome),
            other => panic!("{other:?}"),
        }
    }

    async fn api(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let mut io = UnixStream::connect(self.dir.join("admin.sock"))
            .await
            .unwrap();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let reply = ask(&mut io, &request).await;
        assert!(
            (200..300).contains(&reply.status),
            "{path} {}",
            reply.text()
        );
        serde_json::from_slice(&reply.rest).unwrap_or(Value::Null)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.daemon.child.id()).unwrap())
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            eprintln!("gateway's log:\n{log}");
        }
    }
}

async fn next(socket: &mut Socket) -> Message {
    timeout(PATIENCE, socket.next())
        .await
        .expect("a message in time")
        .unwrap()
        .unwrap()
}

async fn close_code(socket: &mut Socket) -> u16 {
    loop {
        if let Message::Close(frame) = next(socket).await {
            return frame.unwrap().code.into();
        }
    }
}

/// A datagram there and one back. Returns how many bytes the packets had.
async fn round_trip(
    socket: &mut Socket,
    server: &std::net::UdpSocket,
    address: &str,
) -> [usize; 2] {
    let there = Canary::new();
    let out = packet::udp(address, 4000, UP4, 5353, &there.0);
    let sent = out.len();
    socket.send(Message::binary(out)).await.unwrap();
    let mut buf = [0; 64];
    let (n, from) = server.recv_from(&mut buf).unwrap();
    assert_eq!(buf[..n], there.0);
    let back = Canary::new();
    server.send_to(&back.0, from).unwrap();
    let Message::Binary(data) = next(socket).await else {
        panic!("no packet");
    };
    assert!(data.ends_with(&back.0), "{data:?}");
    [sent, data.len()]
}

/// Runs a client's part on its own machine.
fn on<F: Future<Output = ()>>(machine: &Ns, part: impl FnOnce() -> F + Send) {
    machine.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(part());
    });
}

#[test]
fn from_a_login_to_the_internet_and_to_the_bill() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let server = lab.up.udp(SERVER);
    let mut gateway = Gateway::start(&lab, &helper);
    let phone = lab.client("phone", 10);
    on(&phone, async || {
        let token = gateway.ops.good();
        let (mut socket, address) = gateway.older(&token).await;
        let mut bytes = [0; 2];
        for _ in 0..5 {
            let [out, back] = round_trip(&mut socket, &server, &address).await;
            bytes = [bytes[0] + out, bytes[1] + back];
        }
        // A turn is counted when it is over, a moment after its packets have left.
        let deadline = Instant::now() + PATIENCE;
        let live = loop {
            let live = gateway.api("GET", "/api/v1/sessions", &Value::Null).await;
            if live["sessions"][0]["inbound"]["payload"] == bytes[1] {
                break live;
            }
            assert!(Instant::now() < deadline, "{live}");
            tokio::task::yield_now().await;
        };
        let row = &live["sessions"][0];
        assert_eq!(
            (row["account"].as_str(), row["service"].as_str()),
            (Some("alice"), Some("text-dual"))
        );
        assert_eq!(
            row["peer"].as_str().unwrap().split(':').next(),
            Some("1.1.1.10")
        );
        assert_eq!(row["outbound"]["packets"], 5);
        assert_eq!(row["outbound"]["payload"], bytes[0]);
        // The ledger has it within seconds, while the session still runs.
        let deadline = Instant::now() + PATIENCE;
        loop {
            let usage = gateway
                .api("GET", "/api/v1/usage/accounts", &Value::Null)
                .await;
            if usage["accounts"][0]["outbound"]["payload"] == bytes[0] {
                break;
            }
            assert!(Instant::now() < deadline, "{usage}");
            tokio::task::yield_now().await;
        }

        // AUT-14 with everything real: gone within two seconds, and not let in again.
        let start = Instant::now();
        let body = json!({"scope": "subject", "value": "alice"});
        let revoked = gateway.api("POST", "/api/v1/revocations", &body).await;
        assert_eq!(revoked["ended"], 1);
        assert_eq!(close_code(&mut socket).await, 1008);
        assert!(start.elapsed() < Duration::from_secs(2));
        let mut io = gateway.tls().await;
        let target = format!("/old?access_token={token}");
        assert_eq!(ask(&mut io, &upgrade(&target, NAME, "")).await.status, 403);

        // A device joins by an invite, and its session ends with the gateway.
        let body = json!({"account": "bob"});
        let invited = gateway.api("POST", "/api/v1/invites", &body).await;
        let device = Signer::ed25519();
        let join = json!({"code": invited["code"], "public-key": b64(&device.public)}).to_string();
        let request = format!(
            "POST /rvpn/v1/join HTTP/1.1\r\nHost: {NAME}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{join}",
            join.len()
        );
        let reply = ask(&mut gateway.tls().await, &request).await;
        let joined: Value = serde_json::from_slice(&reply.rest).unwrap();
        let token = device.named(joined["key-id"].as_str().unwrap(), &claims("bob"));
        let (mut socket, welcome) = gateway.native(&token).await;
        assert!(!welcome.resumed && welcome.ticket.is_some());
        kill(gateway.pid(), Signal::SIGTERM).unwrap();
        assert_eq!(close_code(&mut socket).await, 1012);
    });
    let status = gateway.daemon.child.wait().unwrap();
    assert_eq!(
        status.code(),
        Some(0),
        "{}",
        fs::read_to_string(gateway.dir.join("log")).unwrap()
    );
}

#[test]
fn a_killed_gateway_bills_what_was_used_and_lets_its_client_resume() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "linger = 60\n");
    let server = lab.up.udp(SERVER);
    let mut gateway = Gateway::start(&lab, &helper);
    let phone = lab.client("phone", 10);
    let token = gateway
        .ops
        .claims(&json!({"sub": "alice", "exp": now() + 300, "jti": "t1"}));
    let (mut total, mut each, mut address) = ([0; 2], [0; 2], String::new());
    on(&phone, async || {
        let (mut socket, own) = gateway.older(&token).await;
        for _ in 0..5 {
            each = round_trip(&mut socket, &server, &own).await;
            total = [total[0] + each[0], total[1] + each[1]];
        }
        address = own;
        // In the middle of everything.
        kill(gateway.pid(), Signal::SIGKILL).unwrap();
    });
    gateway.daemon.child.wait().unwrap();
    let start = Instant::now();
    gateway.daemon = Gateway::run(&lab, &gateway.dir);
    assert!(start.elapsed() < Duration::from_secs(5));
    on(&phone, async || {
        let usage = gateway.api("GET", "/api/v1/usage", &Value::Null).await;
        let row = &usage["usage"][0];
        // Short by a message at most, and never over.
        for (way, total, each) in [
            ("outbound", total[0], each[0]),
            ("inbound", total[1], each[1]),
        ] {
            let billed = row[way]["payload"].as_u64().unwrap();
            let (total, each) = (total as u64, each as u64);
            assert!(
                (total - each..=total).contains(&billed),
                "{way} {total}: {usage}"
            );
        }
        assert!(row["ended-ms"].is_u64());
        // The same token leads to the same lease.
        let (mut socket, again) = gateway.older(&token).await;
        assert_eq!(again, address);
        round_trip(&mut socket, &server, &address).await;
    });
}
