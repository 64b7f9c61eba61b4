//! Tenants that come and go under load never see a byte of each other.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod front_support;
mod serve_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use front_support::Lab;
use hyper::{Response, StatusCode};
use serve_support::backend::{Backend, Body, Seen, whole};
use serve_support::{Served, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

const TENANTS: u64 = 8;
const REQUESTS: usize = 10_000;
const VISITORS: u64 = 32;
/// The longest that a visitor may wait for a bad answer, or a client for its name.
const SOON: Duration = Duration::from_secs(1);

/// Numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % most
    }
}

fn letter(tenant: u64) -> u8 {
    b'a' + u8::try_from(tenant).unwrap()
}

/// As many of the tenant's letters as the path says, if the request is of the
/// tenant's letters only and for its name.
fn letters(canary: &str, seen: &Seen) -> Response<Body> {
    let own = canary.as_bytes()[0];
    let host = format!("{canary}.ex");
    let right = seen.body.iter().all(|b| *b == own) && seen.all("host") == [host];
    let count = seen.line.rsplit('/').next().unwrap().parse().unwrap();
    let mut answer = whole(vec![own; count]);
    if !right {
        *answer.status_mut() = StatusCode::IM_A_TEAPOT;
    }
    answer
}

struct Client {
    served: Served,
    backend: Backend,
}

fn connect(lab: &Lab, tenant: u64, instance: u64) -> Client {
    let canary = char::from(letter(tenant)).to_string();
    let host = format!("{canary}.ex");
    let mut served = serve(&lab.front.table, &canary, &instance.to_string(), &[&host]);
    let (_gone, nothing) = tokio::sync::mpsc::unbounded_channel();
    let asked = std::mem::replace(&mut served.asked, nothing);
    let backend = Backend::start(&canary, asked, letters);
    Client { served, backend }
}

/// Status and body; `None` if the connection ended before they were whole.
async fn exchange(io: &mut TcpStream, request: &[u8]) -> Option<(u16, Vec<u8>)> {
    io.write_all(request).await.ok()?;
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        if io.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let body = bytes.split_off(head);
    let text = String::from_utf8(bytes).unwrap().to_ascii_lowercase();
    let length = text.split("content-length: ").nth(1).unwrap();
    let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
    let mut body = body;
    while body.len() < length {
        if io.read_buf(&mut body).await.ok()? == 0 {
            return None;
        }
    }
    assert_eq!(body.len(), length, "nothing follows an answer");
    Some((text[9..12].parse().unwrap(), body))
}

#[derive(Default)]
struct Score {
    done: AtomicUsize,
    served: AtomicUsize,
    cut: AtomicUsize,
    unserved: AtomicUsize,
    foreign: AtomicUsize,
    slowest_ms: AtomicU64,
}

async fn visitor(at: std::net::SocketAddr, mut dice: Dice, score: Arc<Score>) {
    let mut io = None;
    while score.done.fetch_add(1, SeqCst) < REQUESTS {
        let tenant = dice.below(TENANTS);
        let own = letter(tenant);
        let (sent, wanted) = (dice.below(3000), dice.below(20_000));
        let mut request = format!(
            "POST /{wanted} HTTP/1.1\r\nHost: {}.ex\r\nContent-Length: {sent}\r\n\r\n",
            char::from(own)
        )
        .into_bytes();
        request.extend(vec![own; usize::try_from(sent).unwrap()]);
        let mut connection = match io.take() {
            Some(connection) => connection,
            None => TcpStream::connect(at).await.unwrap(),
        };
        let began = Instant::now();
        let answer = timeout(SOON * 10, exchange(&mut connection, &request)).await;
        let took = u64::try_from(began.elapsed().as_millis()).unwrap();
        match answer.expect("an answer in time") {
            Some((200, body)) => {
                score.served.fetch_add(1, SeqCst);
                let right = body.len() as u64 == wanted && body.iter().all(|b| *b == own);
                score.foreign.fetch_add(usize::from(!right), SeqCst);
                io = Some(connection);
                // Served is served, however much else goes on here.
                continue;
            }
            Some((502, _)) => {
                score.unserved.fetch_add(1, SeqCst);
            }
            Some((status, _)) => panic!("{status} is no answer here"),
            None => drop(score.cut.fetch_add(1, SeqCst)),
        }
        score.slowest_ms.fetch_max(took, SeqCst);
    }
}

/// Until the tenant is served by a connection that has just come.
async fn reachable(lab: &Lab, tenant: u64) -> Duration {
    let request = format!(
        "GET /1 HTTP/1.1\r\nHost: {}.ex\r\n\r\n",
        char::from(letter(tenant))
    );
    let began = Instant::now();
    loop {
        let mut io = lab.tcp().await;
        let answer = exchange(&mut io, request.as_bytes()).await;
        if answer.is_some_and(|(status, _)| status == 200) {
            return began.elapsed();
        }
        assert!(began.elapsed() < SOON * 5, "tenant {tenant} is not reached");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rev_10_ten_thousand_requests_over_tenants_that_come_and_go() {
    let lab = Lab::new().await;
    // Half of the tenants have one client, the others two.
    let mut clients: Vec<(u64, u64, Client)> = (0..TENANTS)
        .flat_map(|t| (0..1 + t % 2).map(move |i| (t, i)))
        .map(|(t, i)| (t, i, connect(&lab, t, i)))
        .collect();
    let score = Arc::new(Score::default());
    let visitors: Vec<_> = (0..VISITORS)
        .map(|n| tokio::spawn(visitor(lab.at, Dice(n + 1), Arc::clone(&score))))
        .collect();
    let mut dice = Dice(77);
    let (mut kills, mut takeovers, mut slowest) = (0, 0, Duration::ZERO);
    while score.done.load(SeqCst) < REQUESTS {
        let which = usize::try_from(dice.below(clients.len() as u64)).unwrap();
        let (tenant, instance, old) = clients.swap_remove(which);
        let new = match dice.below(2) {
            // Killed, and back after a while.
            0 => {
                kills += 1;
                old.backend.kill();
                drop(old);
                sleep(Duration::from_millis(dice.below(40))).await;
                connect(&lab, tenant, instance)
            }
            // Back before the old one is known to be dead.
            _ => {
                takeovers += 1;
                let new = connect(&lab, tenant, instance);
                assert!(old.served.fake.ended().is_some(), "the old one is told");
                old.backend.kill();
                drop(old);
                new
            }
        };
        clients.push((tenant, instance, new));
        slowest = slowest.max(reachable(&lab, tenant).await);
        sleep(Duration::from_millis(5)).await;
    }
    for visitor in visitors {
        visitor.await.unwrap();
    }
    let of = |n: &AtomicUsize| n.load(SeqCst);
    let (served, unserved, cut) = (of(&score.served), of(&score.unserved), of(&score.cut));
    let worst = score.slowest_ms.load(SeqCst);
    println!(
        "{served} served, {unserved} unserved, {cut} cut; {kills} kills, {takeovers} takeovers; \
         slowest bad answer {worst} ms, slowest return {slowest:?}"
    );
    assert_eq!(of(&score.foreign), 0, "not one byte of another tenant");
    assert_eq!(served + unserved + cut, REQUESTS);
    assert!(
        kills > 10 && takeovers > 10,
        "{kills} kills, {takeovers} takeovers"
    );
    assert!(served > REQUESTS * 3 / 4, "{served} served");
    assert!(worst < 1000, "a bad answer took {worst} ms");
    assert!(slowest < SOON, "a return took {slowest:?}");
    // Nothing is left over.
    for (_, _, client) in &clients {
        client.backend.kill();
    }
    let until = Instant::now() + Duration::from_secs(5);
    while lab.front.table.snapshot().visitors.current > 0 {
        assert!(Instant::now() < until, "visitors are left");
        sleep(Duration::from_millis(20)).await;
    }
}
