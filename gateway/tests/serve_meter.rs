//! What visitors move is on the account of who serves them, exactly.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod serve_support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rvpn_gateway::meter::{Meter, Usage};
use rvpn_gateway::serve::splice::{End, Metered, splice};
use rvpn_gateway::serve::table::Table;
use rvpn_gateway::serve::visit::{Unserved, reach};
use rvpn_gateway::serve::{OpenError, Service, Visit};
use serve_support::{name, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinHandle;

struct Office {
    table: Arc<Table>,
    meter: Arc<Meter>,
    _dir: tempfile::TempDir,
}

impl Office {
    fn new(rows: usize) -> Office {
        let dir = tempfile::tempdir().unwrap();
        let meter = Arc::new(Meter::create(dir.path(), rows).unwrap());
        Office {
            table: Arc::new(Table::metered(Arc::clone(&meter))),
            meter,
            _dir: dir,
        }
    }

    /// A visitor of this name: its own end.
    async fn visitor(&self, host: &str) -> Result<(DuplexStream, JoinHandle<End>), Unserved> {
        let visit = Visit {
            peer: "198.51.100.1:5".parse().unwrap(),
            port: 443,
            name: Some(name(host)),
            service: Service::Https,
        };
        let reached = reach(&self.table, &visit, None, Metered::connection).await?;
        let (visitor, near) = duplex(16 * 1024);
        let end = tokio::spawn(splice(near, reached.stream, Duration::from_secs(30)));
        Ok((visitor, end))
    }

    /// Inbound and outbound bytes by account and service.
    fn rows(&self) -> BTreeMap<(String, String), (u64, u64, bool)> {
        let rows = self.meter.usage().into_iter().map(|(_, row)| row);
        rows.map(|row: Usage| {
            let moved = (
                row.totals.inbound.payload,
                row.totals.outbound.payload,
                row.ended_ms.is_some(),
            );
            assert_eq!((row.totals.inbound.wire, row.totals.outbound.wire), (0, 0));
            ((row.account, row.service), moved)
        })
        .collect()
    }
}

fn key(account: &str, service: &str) -> (String, String) {
    (account.to_owned(), service.to_owned())
}

#[tokio::test]
async fn rev_17_what_is_refused_reset_or_truncated_is_on_the_right_account() {
    let office = Office::new(16);
    let mut alice = serve(&office.table, "alice", "1", &["a.ex", "*.a.ex"]);
    let mut bob = serve(&office.table, "bob", "1", &["b.ex"]);
    // Whole.
    let (mut io, end) = office.visitor("a.ex").await.unwrap();
    io.write_all(&[1; 1000]).await.unwrap();
    io.shutdown().await.unwrap();
    let (_, mut stream) = alice.asked.recv().await.unwrap();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).await.unwrap();
    stream.write_all(&[2; 3000]).await.unwrap();
    drop(stream);
    got.clear();
    io.read_to_end(&mut got).await.unwrap();
    assert_eq!((got.len(), end.await.unwrap()), (3000, End::Complete));
    assert_eq!(
        office.rows()[&key("alice", "serve:a.ex")],
        (1000, 3000, false)
    );
    // Reset by the visitor while the client sends: what the client gave counts.
    let (io, end) = office.visitor("b.ex").await.unwrap();
    let (_, mut stream) = bob.asked.recv().await.unwrap();
    let mut given = 0;
    while given < 500_000 {
        let writing = stream.write(&[3; 10_000]);
        match tokio::time::timeout(Duration::from_millis(100), writing).await {
            Ok(n) => given += n.unwrap() as u64,
            // Everything on the way is full.
            Err(_) => break,
        }
    }
    assert!(given < 500_000);
    drop(io);
    assert_eq!(end.await.unwrap(), End::Broken);
    // What the gateway had not taken yet was not given.
    let taken = office.rows()[&key("bob", "serve:b.ex")].1;
    assert!(
        taken <= given && taken >= given - 64 * 1024,
        "{taken} of {given}"
    );
    assert_eq!(office.table.snapshot().servers[1].traffic.outbound, taken);
    // Truncated by the client: what it was given counts, to the byte.
    let (mut io, end) = office.visitor("x.a.ex").await.unwrap();
    io.write_all(&[4; 700]).await.unwrap();
    let (_, mut stream) = alice.asked.recv().await.unwrap();
    stream.read_exact(&mut [0; 700]).await.unwrap();
    drop(stream);
    io.write_all(&[4; 50]).await.unwrap();
    assert_eq!(end.await.unwrap(), End::Broken);
    let wild = office.rows()[&key("alice", "serve:*.a.ex")];
    assert!(wild == (700, 0, false), "{wild:?}");
    // Refused: nothing at all, for anybody.
    let before = office.rows();
    bob.fake.fail(OpenError::Refused);
    assert_eq!(office.visitor("b.ex").await.err(), Some(Unserved::Failed));
    bob.fake.fail(OpenError::Full);
    assert_eq!(office.visitor("b.ex").await.err(), Some(Unserved::Full));
    bob.fake.fail(OpenError::Gone);
    assert_eq!(office.visitor("b.ex").await.err(), Some(Unserved::Nobody));
    assert_eq!(office.visitor("c.ex").await.err(), Some(Unserved::Nobody));
    assert_eq!(office.rows(), before);
    assert_eq!(office.table.snapshot().visitors.current, 0);
    // A row ends with the last who serves the name, and not before.
    drop(alice);
    let ended = office.rows();
    assert!(ended[&key("alice", "serve:a.ex")].2 && ended[&key("alice", "serve:*.a.ex")].2);
    assert!(!ended[&key("bob", "serve:b.ex")].2);
}

#[tokio::test]
async fn a_client_that_does_not_answer_is_asked_whether_it_is_there_and_another_serves() {
    let office = Office::new(16);
    let silent = serve(&office.table, "alice", "1", &["a.ex"]);
    let gone = serve(&office.table, "alice", "2", &["a.ex"]);
    let mut good = serve(&office.table, "alice", "3", &["a.ex"]);
    gone.fake.fail(OpenError::Gone);
    silent.fake.fail(OpenError::Gone);
    for _ in 0..6 {
        office.visitor("a.ex").await.unwrap();
        good.asked.recv().await.unwrap();
    }
    drop((gone, good));
    silent.fake.fail(OpenError::Silent);
    let began = Instant::now();
    let table = Arc::clone(&office.table);
    let waiting = tokio::spawn(async move {
        let visit = Visit {
            peer: "198.51.100.1:5".parse().unwrap(),
            port: 443,
            name: Some(name("a.ex")),
            service: Service::Https,
        };
        reach(&table, &visit, None, Metered::connection).await.err()
    });
    while silent.fake.probed() == 0 {
        assert!(began.elapsed() < Duration::from_secs(3));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!waiting.is_finished());
    waiting.abort();
}

#[tokio::test]
async fn int_07_everything_counted_adds_up() {
    let office = Office::new(64);
    let tenants: Vec<_> = (0..4)
        .map(|n| {
            let (account, host) = (format!("t{n}"), format!("n{n}.ex"));
            let mut served = serve(&office.table, &account, "1", &[&host]);
            let (_gone, nothing) = tokio::sync::mpsc::unbounded_channel();
            let mut asked = std::mem::replace(&mut served.asked, nothing);
            // Counts what it is given, and gives twice as much.
            let counting = tokio::spawn(async move {
                let mut all = (0_u64, 0_u64);
                let mut streams = tokio::task::JoinSet::new();
                while let Some((_, mut stream)) = asked.recv().await {
                    streams.spawn(async move {
                        let (mut buf, mut moved) = (vec![0; 5000], (0, 0));
                        while let Ok(n @ 1..) = stream.read(&mut buf).await {
                            moved.0 += n as u64;
                            if stream.write_all(&buf[..n]).await.is_err() {
                                break;
                            }
                            if stream.write_all(&buf[..n]).await.is_err() {
                                break;
                            }
                            moved.1 += 2 * n as u64;
                        }
                        moved
                    });
                }
                while let Some(one) = streams.join_next().await {
                    let (got, given) = one.unwrap();
                    all = (all.0 + got, all.1 + given);
                }
                all
            });
            (served, counting)
        })
        .collect();
    let mut visitors = tokio::task::JoinSet::new();
    for n in 0..80_usize {
        let (io, end) = office.visitor(&format!("n{}.ex", n % 4)).await.unwrap();
        visitors.spawn(async move {
            let (mut read, mut write) = tokio::io::split(io);
            let size = 1 + n * 997;
            let reading = tokio::spawn(async move {
                let mut got = Vec::new();
                read.read_to_end(&mut got).await.unwrap();
                got.len()
            });
            write.write_all(&vec![7; size]).await.unwrap();
            write.shutdown().await.unwrap();
            assert_eq!(reading.await.unwrap(), 2 * size);
            assert_eq!(end.await.unwrap(), End::Complete);
        });
    }
    while let Some(done) = visitors.join_next().await {
        done.unwrap();
    }
    let shown = office.table.snapshot();
    let mut total = (0, 0);
    for (n, (served, counting)) in tenants.into_iter().enumerate() {
        let of_server = &shown.servers[n];
        assert_eq!(of_server.id, served.place.number());
        drop(served);
        let seen = counting.await.unwrap();
        let row = office.rows()[&key(&format!("t{n}"), &format!("serve:n{n}.ex"))];
        assert_eq!((row.0, row.1), seen);
        assert!(row.2, "it has ended");
        let of_server = of_server.traffic;
        assert_eq!((of_server.inbound, of_server.outbound), seen);
        let of_name = shown.names[n].traffic;
        assert_eq!((of_name.inbound, of_name.outbound), seen);
        assert_eq!(
            (of_name.requests, of_name.responses, of_name.total),
            (20, 20, 20)
        );
        total = (total.0 + seen.0, total.1 + seen.1);
    }
    assert_eq!((shown.traffic.inbound, shown.traffic.outbound), total);
    assert!(total.0 > 0 && total.1 == 2 * total.0);
}
