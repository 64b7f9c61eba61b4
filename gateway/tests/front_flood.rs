//! Many who come and do not get on: they cost little, and others are served.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod front_support;
#[expect(dead_code, reason = "another test program uses the rest")]
#[path = "../../proto/tests/greeting/mod.rs"]
mod greeting;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use front_support::client::{ask, login};
use front_support::{Lab, NAME};
use futures_util::future::join_all;
use greeting::Greeting;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

/// Both ends of so many connections fit into this process.
fn room_for(wanted: usize) -> usize {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let fits = usize::try_from(hard)
        .unwrap_or(usize::MAX)
        .saturating_sub(600)
        / 2;
    assert!(fits >= 200, "a limit of {hard} open files shows nothing");
    wanted.min(fits)
}

/// Memory of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    let digits: String = line.chars().filter(char::is_ascii_digit).collect();
    digits.parse::<usize>().unwrap() * 1024
}

/// From one of many addresses of this machine.
async fn from(lab: &Lab, n: usize) -> TcpStream {
    let address = Ipv4Addr::from(0x7f02_0000 + u32::try_from(n % 60_000).unwrap() + 1);
    let socket = TcpSocket::new_v4().unwrap();
    socket
        .bind(SocketAddr::new(IpAddr::V4(address), 0))
        .unwrap();
    socket.connect(lab.at).await.unwrap()
}

/// DOS-03, as many of the 10,000 as descriptors allow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dos_03_ten_thousand_unfinished_greetings_cost_little_and_end_in_time() {
    const LIMIT: Duration = Duration::from_secs(8);
    let count = room_for(10_000);
    let lab =
        Lab::and("[limits]\npending = 20000\npending-per-address = 20000\nlogin-seconds = 8\n")
            .await;
    // A whole one, so that whatever is made once is there.
    assert_eq!(lab.try_token(&lab.ops.good()).await, 101);
    let mut greeting = Greeting::of(NAME.as_bytes()).long(16 * 1024).bytes();
    greeting.truncate(greeting.len() - 1);
    let before = resident();
    let start = Instant::now();
    let mut held = Vec::with_capacity(count);
    for n in 0..count {
        let mut io = from(&lab, n).await;
        io.write_all(&greeting).await.unwrap();
        held.push(io);
    }
    let opened = start.elapsed();
    // Read as far as it goes: nothing is left in the kernel's queues.
    sleep(Duration::from_millis(300)).await;
    assert!(lab.front.pending.count() >= count * 9 / 10 || opened > LIMIT / 2);
    let each = resident().saturating_sub(before) / count;
    // Meanwhile somebody else is served.
    let asked = Instant::now();
    assert_eq!(lab.try_token(&lab.ops.good()).await, 101);
    let meanwhile = asked.elapsed();
    let ends = held.iter_mut().map(|io| async {
        let mut byte = [0];
        let end = timeout(Duration::from_secs(20), io.read(&mut byte)).await;
        // By a reset, as what was sent is never read to its end.
        drop(end.expect("an end"));
    });
    join_all(ends).await;
    let over = start.elapsed();
    drop(held);
    let asked = Instant::now();
    assert_eq!(lab.try_token(&lab.ops.good()).await, 101);
    let after = asked.elapsed();
    eprintln!(
        "{count} greetings: opened in {opened:?}, {each} bytes each, a login meanwhile {meanwhile:?}, all ended after {over:?}, a login after that {after:?}"
    );
    assert!(each <= 32 * 1024, "{each} bytes each");
    assert!(over <= opened + LIMIT + Duration::from_secs(2), "{over:?}");
    assert!(after <= Duration::from_secs(1), "{after:?}");
    assert_eq!(lab.front.pending.count(), 0);
}

/// What slow clients do.
#[derive(Clone, Copy, Debug)]
enum Slow {
    /// One header after the other, for ever.
    Headers,
    /// A body that never ends.
    Body,
    /// Many pages asked for, none read.
    Reading,
    /// A header with very many ranges.
    Ranges,
}

async fn slowly(io: &mut TcpStream, kind: Slow, stop: &AtomicBool) {
    let first = match kind {
        Slow::Headers => format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n"),
        Slow::Body => format!(
            "POST /rvpn/v1/join HTTP/1.1\r\nHost: {NAME}\r\nContent-Type: application/json\r\nContent-Length: 4096\r\n\r\n"
        ),
        Slow::Reading => format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n").repeat(200),
        Slow::Ranges => {
            let ranges: Vec<String> = (0..1000).map(|n| format!("5-{n}")).collect();
            format!(
                "HEAD / HTTP/1.1\r\nHost: {NAME}\r\nRange: bytes=0-,{}\r\n\r\n",
                ranges.join(",")
            )
        }
    };
    if io.write_all(first.as_bytes()).await.is_err() {
        return;
    }
    while !stop.load(Ordering::Relaxed) {
        let more: &[u8] = match kind {
            Slow::Headers => b"X-a: b\r\n",
            Slow::Body => b"a",
            // It only waits. The end shows by an error of the socket.
            Slow::Reading | Slow::Ranges => b"",
        };
        if io.write_all(more).await.is_err() {
            return;
        }
        if more.is_empty() && io.take_error().is_ok_and(|e| e.is_some()) {
            return;
        }
        sleep(Duration::from_millis(500)).await;
    }
}

/// DOS-04: the four manners of slow clients at once, which come back whenever
/// they are thrown out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dos_04_slow_clients_do_not_keep_others_from_being_served() {
    const SECONDS: u64 = 15;
    // What the tools call available, on a machine that has all of this to do.
    const AVAILABLE: Duration = Duration::from_secs(5);
    let count = room_for(4000);
    let lab = Arc::new(
        Lab::and("[limits]\npending = 8192\npending-per-address = 1024\nlogin-seconds = 2\n").await,
    );
    let stop = Arc::new(AtomicBool::new(false));
    let closed = Arc::new(AtomicUsize::new(0));
    let kinds = [Slow::Headers, Slow::Body, Slow::Reading, Slow::Ranges];
    let before = resident();
    let mut slow = Vec::new();
    for n in 0..count {
        let (lab, stop, closed) = (Arc::clone(&lab), Arc::clone(&stop), Arc::clone(&closed));
        let kind = kinds[n % kinds.len()];
        slow.push(tokio::spawn(async move {
            // A thousand a second, as their tools do.
            sleep(Duration::from_millis(n as u64)).await;
            while !stop.load(Ordering::Relaxed) {
                // Five places, so that their limits are reached and not the limit of all.
                let mut io = lab.tcp_from(&format!("127.0.3.{}", n % 5 + 1)).await;
                slowly(&mut io, kind, &stop).await;
                closed.fetch_add(1, Ordering::Relaxed);
                sleep(Duration::from_secs(1)).await;
            }
        }));
    }
    let start = Instant::now();
    let mut took = Vec::new();
    while start.elapsed() < Duration::from_secs(SECONDS) {
        let at = Instant::now();
        let page = async {
            let tcp = lab.tcp_from("127.0.4.1").await;
            ask(
                &mut lab.over(tcp).await,
                &format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n"),
            )
            .await
        };
        let reply = timeout(AVAILABLE, page).await.expect("a page in time");
        assert_eq!(reply.status, 200);
        let tcp = lab.tcp_from("127.0.4.2").await;
        let reply = ask(&mut lab.over(tcp).await, &login(&lab.ops.good())).await;
        assert_eq!(reply.status, 101);
        took.push(at.elapsed());
        sleep(Duration::from_millis(200)).await;
    }
    let grown = resident().saturating_sub(before);
    let pending = lab.front.pending.count();
    stop.store(true, Ordering::Relaxed);
    join_all(slow).await;
    let closed = closed.load(Ordering::Relaxed);
    took.sort();
    let (asked, middle, worst) = (took.len(), took[took.len() / 2], took[took.len() - 1]);
    eprintln!(
        "{count} slow clients: {asked} times served, in {middle:?}, at worst in {worst:?}; {pending} strangers, {closed} thrown out, {} KiB each",
        grown / 1024 / count
    );
    assert!(middle < Duration::from_secs(1), "{middle:?}");
    assert!(worst < AVAILABLE, "{worst:?}");
    // Of one place no more than it may have, and they are thrown out again and again.
    assert!(pending <= 5 * 1024 + 16, "{pending}");
    assert!(closed >= count, "{closed}");
    assert!(grown / count <= 64 * 1024, "{grown} bytes");
}

/// DOS-15: ten thousand ports of one address are one place.
#[tokio::test]
async fn dos_15_many_ports_of_one_address_have_one_share() {
    let lab = Lab::and("[limits]\npending-per-address = 50\nlogin-seconds = 10\n").await;
    let mut held = Vec::new();
    for _ in 0..room_for(2000) {
        held.push(lab.tcp_from("127.0.5.1").await);
    }
    let settled = async {
        while lab.front.pending.count() != 50 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(5), settled)
        .await
        .expect("fifty of them");
    // The others were closed at once.
    let mut open = 0;
    for io in &mut held {
        let mut byte = [0];
        open += usize::from(
            timeout(Duration::from_millis(1), io.read(&mut byte))
                .await
                .is_err(),
        );
    }
    assert!((50..=60).contains(&open), "{open}");
    let tcp = lab.tcp_from("127.0.5.2").await;
    let reply = ask(&mut lab.over(tcp).await, &login(&lab.ops.good())).await;
    assert_eq!(reply.status, 101, "another address has its own");
}
