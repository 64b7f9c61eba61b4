//! Ports that come and go: those of the configuration, and those of clients.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod front_support;
#[expect(dead_code, reason = "another test program uses the rest")]
#[path = "../../proto/tests/greeting/mod.rs"]
mod greeting;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use front_support::client::{ask, login, read_to_end};
use front_support::served::{name_of, port_of, serve};
use front_support::{Lab, PATIENCE, Setup};
use greeting::Greeting;
use rvpn_gateway::config::{Listener, Mode};
use rvpn_gateway::front::listeners::{Added, Fault, Origin, Purpose};
use rvpn_gateway::front::named::Named;
use rvpn_gateway::serve::table::{Ending, Offer, Refused};
use rvpn_proto::name::{Name, Pattern};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

fn settings(address: SocketAddr) -> Listener {
    Listener {
        address,
        mode: Mode::Auto,
        proxy_from: Vec::new(),
        forwarded_from: Vec::new(),
    }
}

/// An address that nobody listens at.
fn free() -> SocketAddr {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap()
}

/// A port that nobody listens at, on any address.
fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("[::]:0").unwrap();
    socket.local_addr().unwrap().port()
}

#[tokio::test]
async fn r_16_a_reload_opens_and_closes_what_the_file_says() {
    let lab = Lab::new().await;
    let (first, second) = (free(), free());
    let listeners = &lab.front.listeners;
    let of_file = |addresses: &[SocketAddr]| {
        let all = addresses.iter().map(|at| settings(*at));
        all.collect::<Vec<_>>()
    };
    let open = |at: SocketAddr| async move { TcpStream::connect(at).await.is_ok() };
    let asked = free();
    let added = listeners.add(&lab.front, settings(asked), Purpose::Front);
    assert_eq!(added, Added::Added(asked));

    // The lab's own stands in the configuration as port 0.
    let own: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let plan = listeners.plan(&of_file(&[own, first, second])).unwrap();
    assert!(open(first).await, "bound, so that nothing can fail later");
    listeners.follow(&lab.front, plan);
    for at in [lab.at, first, second, asked] {
        let mut io = TcpStream::connect(at).await.unwrap();
        assert_eq!(
            ask(&mut io, &login(&lab.ops.good())).await.status,
            101,
            "{at}"
        );
    }

    // One that cannot be: nothing changes, the good ones of the file either.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let third = free();
    let wanted = of_file(&[own, third, taken.local_addr().unwrap()]);
    let fault = listeners.plan(&wanted).err().unwrap();
    assert!(
        matches!(fault, Fault::System { in_use: true, .. }),
        "{fault}"
    );
    assert!(!open(third).await && open(first).await);

    // Those that are gone from the file close; who asked for one keeps it; the
    // others take new settings.
    let mut wanted = of_file(&[own, first]);
    wanted[1].mode = Mode::Tls;
    let plan = listeners.plan(&wanted).unwrap();
    listeners.follow(&lab.front, plan);
    let closed = async {
        while open(second).await {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, closed).await.expect("closed");
    assert!(open(lab.at).await && open(asked).await);
    let mut io = TcpStream::connect(first).await.unwrap();
    io.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert_eq!(
        read_to_end(&mut io).await.first(),
        Some(&21),
        "TLS only, by now"
    );

    // What the file has as well is the file's from then on.
    let plan = listeners.plan(&of_file(&[own, asked])).unwrap();
    listeners.follow(&lab.front, plan);
    let view = listeners.list();
    let origins = view.iter().map(|v| v.origin);
    assert_eq!(origins.collect::<Vec<_>>(), [Origin::Config; 2]);
    listeners.close().await;
    assert!(!open(asked).await && !open(lab.at).await);
    let late = listeners.add(&lab.front, settings(free()), Purpose::Front);
    assert_eq!(late, Added::Fault(Fault::Closed));
}

/// Says its name, then repeats.
async fn repeats(mut io: DuplexStream) {
    drop(io.write_all(b"hello ").await);
    let mut bytes = [0; 4096];
    while let Ok(n @ 1..) = io.read(&mut bytes).await {
        if io.write_all(&bytes[..n]).await.is_err() {
            return;
        }
    }
}

async fn expect(io: &mut TcpStream, expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    let read = timeout(PATIENCE, io.read_exact(&mut bytes)).await;
    read.unwrap().unwrap();
    assert_eq!(bytes, expected, "{:?}", String::from_utf8_lossy(&bytes));
}

#[tokio::test]
async fn a_port_for_a_name_takes_whatever_comes() {
    let lab = Lab::new().await;
    let device = serve(
        &lab.front.table,
        "db.example",
        None,
        Ending::There,
        |_, io| repeats(io),
    );
    let at = free();
    let name = Name::parse("db.example").unwrap();
    let purpose = Purpose::Taken(Arc::new(Named(name)));
    let listeners = &lab.front.listeners;
    let added = listeners.add(&lab.front, settings(at), purpose.clone());
    assert_eq!(added, Added::Added(at));
    let again = listeners.add(&lab.front, settings(at), purpose);
    assert_eq!(again, Added::Exists(at));
    for sent in [
        &b""[..],
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01",
        b"SSH-2.0",
    ] {
        let mut io = TcpStream::connect(at).await.unwrap();
        io.write_all(sent).await.unwrap();
        expect(&mut io, &[b"hello ", sent].concat()).await;
    }
    assert_eq!(device.visits(), 4);
    drop(device);
    let mut io = TcpStream::connect(at).await.unwrap();
    assert!(read_to_end(&mut io).await.is_empty(), "nobody serves it");
}

#[tokio::test]
async fn r_25_a_clients_own_port_serves_those_who_speak_first_and_those_who_wait() {
    let lab = Lab::and("[limits]\nlogin-seconds = 3\n").await;
    let port = free_port();
    let (device, place) = port_of(&lab.front.table, "alice", &[port], |visit, io| {
        assert!(visit.name.is_none());
        repeats(io)
    });
    assert_eq!(
        place.listen(port + 1).await,
        Err(Refused::Port(port + 1)),
        "not hers"
    );
    place.listen(port).await.unwrap();
    place.listen(port).await.unwrap();
    let at = SocketAddr::from(([127, 0, 0, 1], port));
    let nameless = Greeting::new().bytes();
    for sent in [
        &b""[..],
        b"SSH-2.0-x\r\n",
        b"\0\x01\x02",
        b"GET key\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        &nameless,
    ] {
        let mut io = TcpStream::connect(at).await.unwrap();
        io.write_all(sent).await.unwrap();
        expect(&mut io, &[b"hello ", sent].concat()).await;
    }
    assert_eq!(device.visits(), 6);
    // Names have the shared port: here they would lead to whoever has this one.
    let named = Greeting::of(b"bank.example").bytes();
    let mut io = TcpStream::connect(at).await.unwrap();
    io.write_all(&named).await.unwrap();
    assert_eq!(read_to_end(&mut io).await, [21, 3, 1, 0, 2, 2, 112]);
    let mut io = TcpStream::connect(at).await.unwrap();
    for piece in [&b"GET / HTTP/1.1\r\nhO"[..], b"st: bank.example\r\n\r\n"] {
        io.write_all(piece).await.unwrap();
        sleep(Duration::from_millis(20)).await;
    }
    assert!(read_to_end(&mut io).await.starts_with(b"HTTP/1.1 421 "));
    assert_eq!(device.visits(), 6);
    // A client that comes again finds its port open; one that does not loses it.
    drop(place);
    let (again, place) = port_of(&lab.front.table, "alice", &[port], |_, io| repeats(io));
    place.listen(port).await.unwrap();
    sleep(Duration::from_millis(2300)).await;
    let mut io = TcpStream::connect(at).await.unwrap();
    expect(&mut io, b"hello ").await;
    assert_eq!(again.visits(), 1);
    drop(place);
    let closed = async {
        while TcpStream::connect(at).await.is_ok() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, closed).await.expect("closed");
    // In the gateway's way, and in the helper's.
    let (_device, place) = port_of(
        &lab.front.table,
        "bob",
        &[lab.at.port(), 20_000],
        |_, io| repeats(io),
    );
    lab.front.listeners.forbid((16_384, 32_767));
    assert!(matches!(
        place.listen(20_000).await,
        Err(Refused::PortFault(20_000, _))
    ));
    let own = lab.at.port();
    assert!(place.listen(own).await.is_err(), "the gateway's own");
}

/// Between two connections of a client its name is nobody's; a visitor who
/// comes just then is neither refused nor shown another certificate.
#[tokio::test]
async fn r_3_a_greeting_waits_for_a_client_that_is_coming_back() {
    let lab = Lab::new().await;
    let table = &lab.front.table;
    let greeting = Greeting::of(b"app.example").bytes();
    let offer = || Offer::of(Pattern::parse("app.example").unwrap());
    let (first, place) = name_of(table, "app.example", |_, io| repeats(io));
    place.offer(offer()).unwrap();
    // It takes its own place, and has not said yet what it serves.
    let (second, next) = name_of(table, "app.example", |_, io| repeats(io));
    drop(place);
    let mut io = lab.tcp().await;
    io.write_all(&greeting).await.unwrap();
    sleep(Duration::from_millis(200)).await;
    next.offer(offer()).unwrap();
    expect(&mut io, &[b"hello ", &greeting[..]].concat()).await;
    assert_eq!((first.visits(), second.visits()), (0, 1));
    // One that does not come is not waited for longer than that.
    drop(next);
    let mut io = lab.tcp().await;
    let begun = std::time::Instant::now();
    io.write_all(&greeting).await.unwrap();
    let mut answer = [0];
    timeout(PATIENCE, io.read_exact(&mut answer))
        .await
        .unwrap()
        .unwrap();
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(second.visits(), 1);
}

/// Behind a proxy every protocol is told apart as in front of it, and a server
/// hears of the visitor and not of the proxy.
#[tokio::test]
async fn pro_04_a_proxys_header_precedes_any_protocol() {
    let lab = Lab::with(Setup {
        listener: "proxy-from = [\"127.0.0.2\"]\n",
        more: "[limits]\nlogin-seconds = 3\n[front]\ndefault-service = \"box.example\"\nsilent = \"box.example\"\n".into(),
    })
    .await;
    let tells = |name: &str| {
        serve(
            &lab.front.table,
            name,
            None,
            Ending::There,
            |visit, mut io| async move {
                let line = format!("{} {}", visit.service, visit.peer);
                drop(io.write_all(line.as_bytes()).await);
                // Whoever ends without having read cuts the other side off.
                drop(tokio::io::copy(&mut io, &mut tokio::io::sink()).await);
            },
        )
    };
    let (app, other) = (tells("app.example"), tells("box.example"));
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".to_vec();
    header.extend([198, 51, 100, 7, 10, 0, 0, 1, 0x30, 0x39, 1, 0xbb]);
    let greeting = Greeting::of(b"app.example").bytes();
    for (first, told) in [
        (&greeting[..], "https 198.51.100.7:12345"),
        (b"SSH-2.0-x\r\n", "ssh 198.51.100.7:12345"),
        (b"\x01\x02", "tcp 198.51.100.7:12345"),
        (b"", "tcp 198.51.100.7:12345"),
    ] {
        // In one segment with the header, and behind it.
        for cut in [0, header.len()] {
            let mut io = lab.tcp_from("127.0.0.2").await;
            let all = [&header[..], first].concat();
            io.write_all(&all[..cut]).await.unwrap();
            sleep(Duration::from_millis(20)).await;
            io.write_all(&all[cut..]).await.unwrap();
            expect(&mut io, told.as_bytes()).await;
        }
    }
    assert_eq!((app.visits(), other.visits()), (2, 6));
    // From others it is no header but bytes like any.
    let mut io = lab.tcp_from("127.0.0.3").await;
    io.write_all(&[&header[..], &greeting].concat())
        .await
        .unwrap();
    let mut answer = vec![0; 14];
    timeout(PATIENCE, io.read_exact(&mut answer))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(answer, b"tcp 127.0.0.3:");
    assert_eq!(app.visits(), 2);
}
