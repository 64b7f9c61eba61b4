//! TCP ports that clients have for themselves.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod front_support;
mod serve_support;

use std::net::TcpListener as StdListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use front_support::Lab;
use front_support::client::read_to_end;
use rvpn_gateway::serve::Service;
use rvpn_gateway::serve::table::{Place, Refused};
use serve_support::{Asked, Fake, rights, server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A port that nothing uses now.
fn free() -> u16 {
    let socket = StdListener::bind("[::]:0").unwrap();
    socket.local_addr().unwrap().port()
}

fn client(lab: &Lab, account: &str, instance: &str, ports: &[u16]) -> (Place, Asked) {
    let (fake, asked) = Fake::new();
    let server = server(account, instance, rights(&[], ports), Arc::clone(&fake));
    (lab.front.table.join(server), asked)
}

async fn visit(port: u16) -> TcpStream {
    TcpStream::connect(("127.0.0.1", port)).await.unwrap()
}

#[tokio::test]
async fn r_25_a_granted_port_serves_whoever_speaks_first() {
    let lab = Lab::new().await;
    let port = free();
    let (place, mut asked) = client(&lab, "alice", "1", &[port]);
    place.listen(port).await.unwrap();
    place.listen(port).await.unwrap();
    // The server speaks first.
    let mut io = visit(port).await;
    let (visit_, mut stream) = asked.recv().await.unwrap();
    assert_eq!(
        (visit_.port, visit_.service, visit_.name),
        (port, Service::Tcp, None)
    );
    assert_eq!(visit_.peer, io.local_addr().unwrap());
    stream.write_all(b"SSH-2.0-server\r\n").await.unwrap();
    let mut banner = [0; 16];
    io.read_exact(&mut banner).await.unwrap();
    assert_eq!(&banner, b"SSH-2.0-server\r\n");
    // The visitor does, and ends before it is answered.
    let mut io = visit(port).await;
    io.write_all(b"question").await.unwrap();
    io.shutdown().await.unwrap();
    let (_, mut stream) = asked.recv().await.unwrap();
    let mut question = String::new();
    stream.read_to_string(&mut question).await.unwrap();
    assert_eq!(question, "question");
    stream.write_all(b"answer").await.unwrap();
    drop(stream);
    assert_eq!(read_to_end(&mut io).await, b"answer");
    // Nobody serves it any more: the port is free again.
    drop(place);
    let until = Instant::now() + Duration::from_secs(10);
    while StdListener::bind(("::", port)).is_err() {
        assert!(Instant::now() < until);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn r_25_what_names_are_for_is_refused_on_a_port() {
    let lab = Lab::new().await;
    let port = free();
    let (place, mut asked) = client(&lab, "alice", "1", &[port]);
    place.listen(port).await.unwrap();
    let mut io = visit(port).await;
    io.write_all(b"GET / HTTP/1.1\r\nHost: a.ex\r\n\r\n")
        .await
        .unwrap();
    let answer = String::from_utf8_lossy(&read_to_end(&mut io).await).into_owned();
    assert!(answer.starts_with("HTTP/1.1 421"), "{answer}");
    let tls = lab.connector(rustls::ALL_VERSIONS);
    let name = rustls::pki_types::ServerName::try_from("a.ex").unwrap();
    assert!(tls.connect(name, visit(port).await).await.is_err());
    assert!(asked.try_recv().is_err());
    // Without a name both are just bytes.
    let mut io = visit(port).await;
    io.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let (_, mut stream) = asked.recv().await.unwrap();
    let mut request = [0; 18];
    stream.read_exact(&mut request).await.unwrap();
    assert_eq!(&request, b"GET / HTTP/1.0\r\n\r\n");
    let mut config = (**tls.config()).clone();
    config.enable_sni = false;
    let tls = tokio_rustls::TlsConnector::from(Arc::new(config));
    let tcp = visit(port).await;
    let _hello = tokio::spawn(async move {
        let name = rustls::pki_types::ServerName::try_from("a.ex").unwrap();
        tls.connect(name, tcp).await
    });
    let (_, mut stream) = asked.recv().await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), 0x16);
    // And with the rule off everything is.
    lab.front
        .configure(Arc::new(lab.config("[serve]\nstrict-ports = false\n")));
    let mut io = visit(port).await;
    io.write_all(b"GET / HTTP/1.1\r\nHost: a.ex\r\n\r\n")
        .await
        .unwrap();
    let (_, mut stream) = asked.recv().await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'G');
}

#[tokio::test]
async fn rev_09_a_port_is_had_by_claim_only() {
    let lab = Lab::new().await;
    let (theirs, busy) = (free(), free());
    let (bob, _b) = client(&lab, "bob", "1", &[theirs]);
    bob.listen(theirs).await.unwrap();
    let (alice, _a) = client(&lab, "alice", "1", &[15432]);
    let admin = 7980;
    for port in [22, 443, admin, theirs, 0, 65535, lab.at.port()] {
        assert_eq!(alice.listen(port).await, Err(Refused::Port(port)));
    }
    // A claim does not make the gateway's own, or another's, ours.
    let _held = StdListener::bind(("::", busy)).unwrap();
    let claims = [admin, theirs, busy, 20_000, 0];
    let (eve, _e) = client(&lab, "eve", "1", &claims);
    lab.front.listeners.forbid((16_384, 32_767));
    for port in [admin, theirs, busy] {
        assert_eq!(
            eve.listen(port).await,
            Err(Refused::PortTaken(port)),
            "{port}"
        );
    }
    assert_eq!(eve.listen(0).await, Err(Refused::Port(0)));
    let translated = eve.listen(20_000).await.unwrap_err();
    assert!(
        translated.to_string().contains("16384 to 32767"),
        "{translated}"
    );
    assert!(!lab.front.table.serves_port(20_000));
    assert!(
        lab.front
            .table
            .snapshot()
            .servers
            .iter()
            .all(|s| s.offers.len() <= 1)
    );
}

#[tokio::test]
async fn several_clients_of_an_account_share_a_port_and_the_last_keeps_it() {
    let lab = Lab::new().await;
    let port = free();
    let (first, mut a) = client(&lab, "alice", "1", &[port]);
    let (second, mut b) = client(&lab, "alice", "2", &[port]);
    first.listen(port).await.unwrap();
    second.listen(port).await.unwrap();
    let mut came = (0, 0);
    for _ in 0..6 {
        let mut io = visit(port).await;
        io.write_all(b"x").await.unwrap();
        tokio::select! {
            _ = a.recv() => came.0 += 1,
            _ = b.recv() => came.1 += 1,
        }
    }
    assert_eq!(came, (3, 3));
    drop(first);
    let mut io = visit(port).await;
    io.write_all(b"x").await.unwrap();
    b.recv().await.unwrap();
    // A client that comes again has its port at once, and no visitor is lost.
    let (again, mut c) = client(&lab, "alice", "2", &[port]);
    let mut io = visit(port).await;
    io.write_all(b"x").await.unwrap();
    again.listen(port).await.unwrap();
    c.recv().await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mut io = visit(port).await;
    io.write_all(b"x").await.unwrap();
    c.recv().await.unwrap();
}
