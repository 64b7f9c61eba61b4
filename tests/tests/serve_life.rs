//! What `rvpn serve` does when things go wrong, or somebody is slow.

use std::time::{Duration, Instant};

use rvpn_lab::gateway::Gateway;
use rvpn_lab::machine::Machine;
use rvpn_lab::serving::{Identity, SOON, echo, noise, resident, tls_server, visit};
use rvpn_lab::{Helper, Lab, Ns, wait_until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{sleep, timeout};

const SHOP: &str = "shop.example";

fn scene() -> (Lab, Helper, Gateway, Machine) {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "");
    let phone = Machine::new(&lab, "phone", 10);
    (lab, helper, gateway, phone)
}

async fn works(from: &Ns, identity: &Identity) {
    let mut visitor = visit(from, SHOP, identity).await;
    visitor.write_all(b"hello").await.expect("a write");
    let mut back = [0; 5];
    let read = timeout(SOON, visitor.read_exact(&mut back)).await;
    read.expect("in time").expect("a read");
    assert_eq!(&back, b"hello");
}

/// A server that is asked for so many bytes, and sends them.
fn source(ns: &Ns, identity: &Identity) {
    tls_server(ns, "127.0.0.1:8443", identity, |mut tls| async move {
        let Ok(wanted) = tls.read_u64().await else {
            return;
        };
        let piece = noise(3, 1 << 16);
        let mut left = usize::try_from(wanted).expect("a size");
        while left > 0 {
            let n = left.min(piece.len());
            if tls.write_all(&piece[..n]).await.is_err() {
                return;
            }
            left -= n;
        }
        let _gone = tls.shutdown().await;
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rev_15_a_killed_client_that_comes_again_has_its_name_within_a_second() {
    let (lab, _helper, gateway, phone) = scene();
    let identity = Identity::of(SHOP);
    tls_server(&phone.ns, "127.0.0.1:8443", &identity, echo);
    let login = phone.login(&gateway, "alice", &[SHOP], &[]);
    for _ in 0..3 {
        let mut serve = phone.serving(&login, &["tls://:8443"]);
        works(&lab.up, &identity).await;
        serve.daemon.kill();
        let begun = Instant::now();
        let again = phone.serving(&login, &["tls://:8443"]);
        works(&lab.up, &identity).await;
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(1), "{took:?}");
        // The same once more takes over from one that lives, which then ends.
        let mut third = phone.serve(&login, &["tls://127.0.0.1:8443"]);
        third.until("serving");
        works(&lab.up, &identity).await;
        let mut again = again;
        assert_eq!(again.ended(), 69, "{}", again.said());
        assert!(again.said().contains("took over"), "{}", again.said());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_was_killed_finds_its_clients_again() {
    let (lab, _helper, mut gateway, phone) = scene();
    let identity = Identity::of(SHOP);
    tls_server(&phone.ns, "127.0.0.1:8443", &identity, echo);
    let login = phone.login(&gateway, "alice", &[SHOP], &[]);
    let mut serve = phone.serving(&login, &["tls://:8443"]);
    works(&lab.up, &identity).await;
    gateway.kill();
    serve.until("lost");
    gateway.restart();
    serve.until("connected");
    works(&lab.up, &identity).await;
    // In order: it says when to come back.
    gateway.restart();
    serve.until_many("connected", 2);
    works(&lab.up, &identity).await;
    // Access that is taken back ends it, within two seconds and for good.
    let begun = Instant::now();
    let alice = serde_json::json!({"scope": "subject", "value": "alice"});
    gateway.api("POST", "/api/v1/revocations", &alice);
    assert_eq!(serve.ended(), 77, "{}", serve.said());
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    assert!(
        serve.said().contains("access was revoked"),
        "{}",
        serve.said()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_who_do_not_read_cost_no_more_than_a_megabyte_each() {
    const SLOW: usize = 20;
    const MEGABYTE: usize = 1024 * 1024;
    let (lab, _helper, gateway, phone) = scene();
    let identity = Identity::of(SHOP);
    source(&phone.ns, &identity);
    let login = phone.login(&gateway, "alice", &[SHOP], &[]);
    let serve = phone.serving(&login, &["tls://:8443"]);
    // One quick reader first, so that what is needed once is there.
    let mut quick = visit(&lab.up, SHOP, &identity).await;
    quick.write_u64(20_000_000).await.expect("a wish");
    let mut all = Vec::new();
    quick.read_to_end(&mut all).await.expect("all of it");
    assert_eq!(all.len(), 20_000_000);
    let before = [gateway.pid(), serve.pid()].map(resident);
    let mut slow = Vec::new();
    for _ in 0..SLOW {
        let mut visitor = visit(&lab.up, SHOP, &identity).await;
        visitor.write_u64(1 << 30).await.expect("a wish");
        // It reads quickly at first, and so earns a large window, and then stops.
        let mut some = vec![0; 4_000_000];
        visitor.read_exact(&mut some).await.expect("some of it");
        slow.push(visitor);
    }
    sleep(Duration::from_secs(2)).await;
    let after = [gateway.pid(), serve.pid()].map(resident);
    let grown = [0, 1].map(|i| after[i].saturating_sub(before[i]));
    eprintln!(
        "{} and {} kB for {SLOW} slow readers",
        grown[0] / 1024,
        grown[1] / 1024
    );
    for grown in grown {
        assert!(grown <= SLOW * MEGABYTE, "{grown}");
    }
    // Others are served meanwhile, and the slow ones get the rest in the end.
    let mut quick = visit(&lab.up, SHOP, &identity).await;
    quick.write_u64(1_000_000).await.expect("a wish");
    let mut all = Vec::new();
    timeout(SOON, quick.read_to_end(&mut all))
        .await
        .expect("in time")
        .expect("all of it");
    assert_eq!(all.len(), 1_000_000);
    let mut more = vec![0; 10_000_000];
    let read = timeout(SOON, slow[0].read_exact(&mut more)).await;
    read.expect("in time").expect("more of it");
    drop(slow);
    drop(serve);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rev_13_one_stalled_stream_among_a_hundred_slows_nobody() {
    const OTHERS: usize = 99;
    const EACH: u64 = 500_000;
    let (lab, _helper, gateway, phone) = scene();
    let identity = Identity::of(SHOP);
    source(&phone.ns, &identity);
    let login = phone.login(&gateway, "alice", &[SHOP], &[]);
    let _serve = phone.serving(&login, &["tls://:8443"]);
    let round = async || {
        let mut readers = Vec::new();
        for _ in 0..OTHERS {
            readers.push(visit(&lab.up, SHOP, &identity).await);
        }
        let begun = Instant::now();
        let mut tasks = Vec::new();
        for mut reader in readers {
            tasks.push(tokio::spawn(async move {
                reader.write_u64(EACH).await.expect("a wish");
                let mut all = Vec::new();
                let read = timeout(SOON, reader.read_to_end(&mut all)).await;
                read.expect("in time").expect("all of it");
                assert_eq!(all.len() as u64, EACH);
            }));
        }
        for task in tasks {
            task.await.expect("a reader");
        }
        begun.elapsed()
    };
    // What else goes on here disturbs either side: the best of several counts.
    let (mut alone, mut beside) = (Duration::MAX, Duration::MAX);
    for n in 0..16 {
        alone = alone.min(round().await);
        let mut stalled = visit(&lab.up, SHOP, &identity).await;
        stalled.write_u64(1 << 30).await.expect("a wish");
        sleep(Duration::from_millis(200)).await;
        beside = beside.min(round().await);
        drop(stalled);
        if n >= 2 && alone.as_secs_f64() >= 0.9 * beside.as_secs_f64() {
            break;
        }
    }
    let share = alone.as_secs_f64() / beside.as_secs_f64();
    eprintln!("alone {alone:?}, beside a stalled one {beside:?}: {share:.2}");
    assert!(share >= 0.9, "{share}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_not_there_is_no_end() {
    let (lab, _helper, gateway, phone) = scene();
    let identity = Identity::of(SHOP);
    let login = phone.login(&gateway, "alice", &[SHOP], &[]);
    let mut serve = phone.serving(&login, &["tls://:8443"]);
    let lost = rvpn_lab::serving::try_visit(&lab.up, SHOP, &identity).await;
    assert!(lost.is_err());
    let unreachable = serve.until("unreachable");
    assert_eq!(unreachable["target"], "tls://127.0.0.1:8443");
    // As soon as it is there, it is served.
    tls_server(&phone.ns, "127.0.0.1:8443", &identity, echo);
    works(&lab.up, &identity).await;
    wait_until("the visitor has left", || !serve.events("left").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_connections_of_one_client_share_its_visitors() {
    let (lab, _helper, gateway, phone) = scene();
    let identity = Identity::of(SHOP);
    tls_server(&phone.ns, "127.0.0.1:8443", &identity, echo);
    let login = phone.login(&gateway, "alice", &[SHOP, "*.alice.example"], &[15_432]);
    // One target with a name of its own, one whose name is chosen, one with a port.
    let words = [
        "tls://:8443",
        "http://:3000",
        "tcp:8443",
        "--name",
        SHOP,
        "--connections",
        "3",
    ];
    let serve = phone.serving(&login, &words);
    wait_until("all are there", || gateway.sessions().len() == 3);
    let mut visitors = Vec::new();
    for _ in 0..9 {
        visitors.push(visit(&lab.up, SHOP, &identity).await);
    }
    for visitor in &mut visitors {
        visitor.write_all(b"hello").await.expect("a write");
        let mut back = [0; 5];
        let read = timeout(SOON, visitor.read_exact(&mut back)).await;
        read.expect("in time").expect("a read");
        assert_eq!(&back, b"hello");
    }
    // All of them carry visitors: what was written went into each one's wire.
    let wires = || {
        let rows = gateway.sessions();
        let wire = rows
            .iter()
            .map(|row| row["inbound"]["wire"].as_u64().unwrap_or(0));
        wire.collect::<Vec<_>>()
    };
    wait_until("each has had visitors", || {
        wires().iter().all(|n| *n > 3_000)
    });
    drop(visitors);
    assert!(serve.events("trouble").is_empty(), "{}", serve.said());
    assert_eq!(serve.interrupt(), 0);
    wait_until("all have gone", || gateway.sessions().is_empty());
}
