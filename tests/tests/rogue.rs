//! Clients with a valid login that attack each other through the gateway.

use std::sync::atomic::{AtomicU64, Ordering};

use rvpn_lab::rogue::{Lookout, Rogue, Sighting, lease, sighted};
use rvpn_lab::scene::{Scene, drops, number, round_trip};
use rvpn_lab::topology::UP4;
use rvpn_lab::tunnel_client::{DIALECTS, Event, Session, Speech, on};
use rvpn_lab::{packet, wait_until};
use rvpn_proto::control::{Message as Control, Stage, Stats};
use rvpn_proto::packet::grammar::Client;
use serde_json::Value;
use tokio::sync::watch;
use tokio_tungstenite::tungstenite::Message;

const CLIENTS: [Speech; 5] = [
    Speech::Native { offload: true },
    Speech::Native { offload: false },
    Speech::Text4,
    Speech::Text46,
    Speech::Padded,
];
const EACH: u64 = 100_000;

/// What one client did and saw.
#[derive(Default)]
struct Tally {
    sent: AtomicU64,
    /// What passes counts by segment; this is how much more than `sent` that makes.
    more: AtomicU64,
    foreign: AtomicU64,
    spoiled: AtomicU64,
    received: AtomicU64,
    done: AtomicU64,
}

impl Tally {
    fn of(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}

fn seed() -> u64 {
    let given = std::env::var("RVPN_SEED").ok().and_then(|s| s.parse().ok());
    let seed = given.unwrap_or_else(rvpn_lab::token::now);
    println!("RVPN_SEED={seed}");
    seed
}

#[test]
fn spf_29_five_rogues_never_reach_each_other() {
    let seed = seed();
    let scene = Scene::new("slots = 8\n", DIALECTS);
    let (outside, neighbour) = (Lookout::on(&scene.lab.up), Lookout::on(&scene.lab.nb));
    let tallies: [Tally; 5] = Default::default();
    let (stop, stopped) = watch::channel(false);
    let (begin, begun) = watch::channel(Vec::<Client>::new());
    std::thread::scope(|threads| {
        // Gone with this thread, so that none waits for a verdict that never comes.
        let (stop, begin) = (stop, begin);
        let running: Vec<_> = (0_u8..)
            .zip(CLIENTS)
            .zip(&tallies)
            .map(|((index, speech), tally)| {
                let (scene, stopped, begun) = (&scene, stopped.clone(), begun.clone());
                threads.spawn(move || {
                    on(&scene.phone, || {
                        play(scene, seed, index, speech, tally, begun, stopped)
                    });
                })
            })
            .collect();
        wait_until("all five are in", || scene.gateway.sessions().len() == 5);
        let all = (0..5).map(|n| lease(&scene.row(&account(n)))).collect();
        begin.send(all).expect("they wait");
        while !tallies.iter().all(|tally| Tally::of(&tally.done) == 1) {
            assert!(
                !running.iter().any(|r| r.is_finished()),
                "a client was lost"
            );
            std::thread::park_timeout(std::time::Duration::from_millis(20));
        }
        for (n, tally) in (0..).zip(&tallies) {
            judge(&scene, n, tally);
        }
        stop.send(true).expect("they listen");
    });
    let (up, nb) = (outside.seen(), neighbour.seen());
    println!("on the wire: {up:?}, at the neighbour: {nb:?}");
    assert!(up.lawful > 1000, "the lawful packets left: {up:?}");
    assert_eq!((up.stray, up.private), (0, 0), "{up:?}");
    assert_eq!((nb.lawful, nb.stray, nb.private), (0, 0, 0), "{nb:?}");
}

fn account(n: u8) -> String {
    format!("rogue-{n}")
}

/// One client: shoots, and looks at everything it gets.
async fn play(
    scene: &Scene,
    seed: u64,
    index: u8,
    speech: Speech,
    tally: &Tally,
    mut begun: watch::Receiver<Vec<Client>>,
    mut stopped: watch::Receiver<bool>,
) {
    let session = scene.session(speech, &account(index)).await;
    let all = begun.wait_for(|all| !all.is_empty()).await;
    let all = all.expect("a beginning").clone();
    let own = Client {
        v4: session.v4,
        v6: session.v6.unwrap_or(all[usize::from(index)].v6),
    };
    let supers = speech == Speech::Native { offload: true };
    let mut rogue = Rogue::new(seed ^ u64::from(index) << 56, index, own, &all, supers);
    let Session { mut tx, mut rx, .. } = session;
    let shooting = async {
        for n in 1..=EACH {
            let shot = rogue.shoot();
            let count = |counter: &AtomicU64, n| counter.fetch_add(n, Ordering::Relaxed);
            if shot.spoiled {
                count(&tally.spoiled, 1);
            } else if shot.foreign || (own_family(speech, &shot.packet)) {
                count(&tally.foreign, 1);
            } else {
                count(&tally.more, shot.segments - 1);
            }
            tx.feed(&shot.packet, shot.offload).await;
            if n % 64 == 0 {
                tx.flush().await;
            }
        }
        tx.flush().await;
        tally.sent.store(EACH, Ordering::Relaxed);
        tally.done.store(1, Ordering::Relaxed);
    };
    let looking = async {
        loop {
            let event = tokio::select! {
                event = rx.wait() => event,
                _ = stopped.wait_for(|stop| *stop) => return,
            };
            match event {
                Event::Packet(packet, offload) => {
                    let segments = match offload.gso_size {
                        0 => 1,
                        size => {
                            let payload = rvpn_proto::packet::parse(&packet).expect("a packet");
                            payload.payload_len().div_ceil(size.into()) as u64
                        }
                    };
                    tally.received.fetch_add(segments, Ordering::Relaxed);
                    let lawful = Sighting {
                        client: index,
                        lawful: true,
                    };
                    let seen = sighted(&packet);
                    assert!(
                        seen.is_none_or(|s| s == lawful),
                        "{index} got {seen:?}: {packet:02x?}"
                    );
                }
                Event::Closed(closed) => panic!("client {index}: {closed:?}"),
                Event::Text(_) | Event::Noise | Event::Ping => {}
            }
        }
    };
    tokio::join!(shooting, looking);
}

/// Whether a packet's family is one that this client has not.
fn own_family(speech: Speech, packet: &[u8]) -> bool {
    packet[0] >> 4 == 6 && !speech.has_v6()
}

/// Every packet passed or was dropped for a reason, and the client got exactly
/// what the gateway says it gave it.
fn judge(scene: &Scene, n: u8, tally: &Tally) {
    let mut row = Value::Null;
    let (sent, more) = (Tally::of(&tally.sent), Tally::of(&tally.more));
    wait_until("the gateway has judged every packet", || {
        row = scene.row(&account(n));
        let dropped: u64 = drops(&row["outbound"]).values().sum();
        number(&row["outbound"]["packets"]) + dropped == sent + more
    });
    wait_until("the client has all that was given to it", || {
        row = scene.row(&account(n));
        number(&row["inbound"]["packets"]) == Tally::of(&tally.received)
    });
    println!(
        "{n}: {sent} sent, {} passed, dropped {}",
        row["outbound"]["packets"], row["outbound"]["drops"]
    );
    let spoofed = drops(&row["outbound"])["spoofed"];
    let (foreign, spoiled) = (Tally::of(&tally.foreign), Tally::of(&tally.spoiled));
    assert!(
        foreign > sent / 10,
        "{foreign} of {sent} had another's source"
    );
    assert!(
        (foreign..=foreign + spoiled).contains(&spoofed),
        "{foreign} {spoiled} {row}"
    );
}

#[test]
fn a_rogue_in_frames_is_sent_away_alone() {
    let scene = Scene::new("slots = 32\nmax-slots = 32\n", DIALECTS);
    let [server, _] = scene.servers();
    on(&scene.phone, async || {
        let mut bystander = scene.session(Speech::Text46, "bystander").await;
        let good = packet::udp("10.0.0.1", 1, UP4, 5353, b"x");
        let length = u8::try_from(good.len()).expect("short");
        let header = |bytes: [u8; 8]| [&bytes[..], &good].concat();
        let frames = [
            vec![],
            vec![1],
            header([0, 0, 1, 0, 0, 0, 0, 0]),
            header([length + 1, 0, 1, 0, 0, 0, 0, 0]),
            header([length - 1, 0, 1, 0, 0, 0, 0, 0]),
            header([length, 0, 2, 0, 0, 0, 0, 0]),
            header([length, 0, 1, 0x10, 0, 0, 0, 0]),
            header([length, 0, 1, 0, 0, 0, 1, 0]),
            header([length, 0, 1, 7, 0xa8, 5, 0, 0]),
            header([length, 0, 1, 0, 0xa8, 5, 0, 0]),
        ];
        for frame in frames {
            let native = Speech::Native { offload: true };
            let mut rogue = scene.session(native, "rogue").await;
            rogue.tx.message(Message::binary(frame.clone())).await;
            let closed = rogue.rx.closed().await;
            assert_eq!(closed.code, 1008, "{frame:02x?}");
            wait_until("it is gone", || scene.gateway.sessions().len() == 1);
            round_trip(&mut bystander, &server, 4000).await;
        }

        // Too long for any message, and too many questions.
        let native = Speech::Native { offload: true };
        let mut rogue = scene.session(native, "rogue").await;
        let long = Message::binary(vec![0; 192 * 1024 + 1]);
        // It may be gone before all of it is taken.
        let _ = rogue.tx.try_message(long).await;
        let closed = rogue.rx.closed().await;
        assert!([1009, 1006].contains(&closed.code), "{closed:?}");
        let mut rogue = scene.session(native, "rogue").await;
        let question = Control::Stats(Stats::default())
            .to_text(Stage::Session)
            .expect("a question");
        for _ in 0..400 {
            if rogue
                .tx
                .try_message(Message::text(question.clone()))
                .await
                .is_err()
            {
                break;
            }
        }
        let closed = rogue.rx.closed().await;
        assert!([1008, 1006].contains(&closed.code), "{closed:?}");
        round_trip(&mut bystander, &server, 4000).await;
        bystander.ping(UP4, 1, 1).await;
    });
}
