//! Sessions on leases of the real helper: through its devices, its rules and
//! its translation to the laboratory's internet and back.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod session_support;

use std::io::{Read, Write};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rvpn_gateway::admit::{Admission, Kind, Sessions as _, TokenId};
use rvpn_gateway::cores::Cores;
use rvpn_gateway::helper::{Helper, HelperConfig};
use rvpn_gateway::meter::Meter;
use rvpn_gateway::session::begin::Arrival;
use rvpn_gateway::session::{Sessions, Settings, Shared};
use rvpn_gateway::ticket::TicketKey;
use rvpn_ipc::Key;
use rvpn_lab::capture::readable;
use rvpn_lab::helper::{as_user, give};
use rvpn_lab::probe::Canary;
use rvpn_lab::topology::{UP4, UP6};
use rvpn_lab::{Lab, packet};
use rvpn_proto::control::{Hello, Message as Control, Stage};
use rvpn_proto::record::{Offload, Reader, append};
use session_support::fake_helper::PATIENCE;
use session_support::plain::{LONG, Plain};
use session_support::wire::{Client, connect, connect_io};
use tokio::sync::watch;
use tokio::time::timeout;

const SERVER: &str = "1.1.1.1:5353";

struct Gateway {
    shared: Arc<Shared>,
    revoke: watch::Sender<bool>,
    root: mpsc::Sender<(String, mpsc::Sender<()>)>,
}

/// Runs the scenario where the gateway runs: in its namespace, as its user.
/// What it asks of the administrator is done by `root` outside.
fn in_gateway<F: Future<Output = ()>>(
    lab: &Lab,
    helper: &rvpn_lab::Helper,
    scenario: impl FnOnce(Gateway) -> F + Send,
    mut root: impl FnMut(&str),
) {
    let (ask, asked) = mpsc::channel::<(String, mpsc::Sender<()>)>();
    std::thread::scope(|threads| {
        threads.spawn(|| as_gateway(lab, helper, scenario, ask));
        // Ends when the gateway has gone.
        for (what, done) in asked {
            root(&what);
            done.send(()).unwrap();
        }
    });
}

fn as_gateway<F: Future<Output = ()>>(
    lab: &Lab,
    helper: &rvpn_lab::Helper,
    scenario: impl FnOnce(Gateway) -> F + Send,
    root: mpsc::Sender<(String, mpsc::Sender<()>)>,
) {
    let state = lab.dir.join("gateway");
    std::fs::create_dir_all(&state).unwrap();
    give(&state, helper.gateway_uid);
    lab.gw.run(|| {
        as_user(helper.gateway_uid, || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async {
                let client = Helper::start(HelperConfig {
                    socket: helper.socket.clone(),
                    uid: helper.uid,
                    successor: false,
                });
                timeout(PATIENCE, client.ready()).await.unwrap().unwrap();
                let settings = Settings {
                    ticket_life: Duration::from_secs(3600),
                    dns: Vec::new(),
                    routes: Vec::new(),
                };
                let shared = Shared::new(
                    Cores::start(2, false).unwrap(),
                    client,
                    Arc::new(Meter::create(&state, 16).unwrap()),
                    TicketKey::load_or_create(&state.join("ticket.key")).unwrap(),
                    settings,
                );
                let revoke = watch::channel(false).0;
                let gateway = Gateway {
                    shared,
                    revoke,
                    root,
                };
                scenario(gateway).await;
            });
        });
    });
}

impl Gateway {
    /// Has the administrator do something, and waits for it.
    fn ask_root(&self, what: impl Into<String>) {
        let (done, wait) = mpsc::channel();
        self.root.send((what.into(), done)).unwrap();
        wait.recv().unwrap();
    }

    /// A client with the welcome read.
    async fn client(&self, key: u8) -> (Client, String) {
        let (mut client, socket) = connect().await;
        let guest = self.guest();
        let protocol = Plain {
            patience: LONG,
            lingers: true,
        };
        let arrival = Arrival {
            socket,
            protocol,
            admission: guest,
            key: Key([key; 16]),
            epoch: 0,
            seat: self.shared.cores.least_loaded(),
        };
        arrival.settle(Arc::clone(&self.shared));
        let welcome = client.text().await;
        let address = welcome.split(' ').next().unwrap().to_owned();
        (client, address)
    }

    /// A native client without offload, and its addresses.
    async fn native(&self) -> (Client, [String; 2]) {
        let (mut client, io) = connect_io().await;
        Sessions(Arc::clone(&self.shared)).admit(self.guest(), io, Bytes::new());
        let hello = Control::Hello(Hello {
            versions: vec![1],
            name: "test".to_owned(),
            instance: "browser".to_owned(),
            ..Hello::default()
        });
        let text = hello.to_text(Stage::BeforeLogin).unwrap();
        client
            .send(tokio_tungstenite::tungstenite::Message::text(text))
            .await;
        match Control::parse(&client.text().await, Stage::Session).unwrap() {
            Control::Welcome(welcome) => {
                let v6 = welcome.v6.unwrap().address;
                (client, [welcome.v4.address.to_string(), v6.to_string()])
            }
            other => panic!("{other:?} in place of a welcome"),
        }
    }

    fn guest(&self) -> Admission {
        Admission {
            account: "alice".into(),
            subject: "alice".into(),
            token_id: TokenId([1; 16]),
            expires_at: None,
            kind: Kind::Native,
            anonymous: false,
            class: 0,
            rights: Default::default(),
            peer: "127.0.0.1:9".parse().unwrap(),
            listener: 0,
            revoked: self.revoke.subscribe(),
        }
    }
}

/// A datagram out and one back through one flow; returns the flow's outer address.
async fn round_trip(
    client: &mut Client,
    server: &std::net::UdpSocket,
    address: &str,
) -> std::net::SocketAddr {
    let there = Canary::new();
    client
        .send(packet::udp(address, 4000, UP4, 5353, &there.0))
        .await;
    let mut buf = [0; 64];
    let (n, from) = server.recv_from(&mut buf).unwrap();
    assert_eq!(buf[..n], there.0);
    let back = Canary::new();
    server.send_to(&back.0, from).unwrap();
    let data = client.data().await;
    assert!(data.ends_with(&back.0), "{data:?}");
    from
}

#[test]
fn a_lost_client_comes_back_to_its_flows() {
    let lab = Lab::new();
    let helper = rvpn_lab::Helper::serving(&lab, "linger = 60\n");
    let server = lab.up.udp(SERVER);
    in_gateway(
        &lab,
        &helper,
        async |gateway| {
            let (mut client, address) = gateway.client(1).await;
            let outer = round_trip(&mut client, &server, &address).await;
            drop(client);
            let (mut client, again) = gateway.client(1).await;
            assert_eq!(again, address);
            assert_eq!(round_trip(&mut client, &server, &address).await, outer);
            // And the same when the first connection is still there.
            let (mut second, again) = gateway.client(1).await;
            assert_eq!(again, address);
            assert_eq!(round_trip(&mut second, &server, &address).await, outer);
            assert_eq!(client.close_frame().await.1, "continued elsewhere");
        },
        |_| unreachable!(),
    );
}

#[test]
fn a_session_goes_on_while_the_helper_is_killed_and_started_again() {
    let lab = Lab::new();
    let mut helper = rvpn_lab::Helper::serving(&lab, "linger = 60\n");
    let server = lab.up.udp(SERVER);
    // The closure needs the running helper's names only; the process is another's.
    let names = rvpn_lab::Helper::prepared(&lab, "linger = 60\n");
    in_gateway(
        &lab,
        &names,
        async |gateway| {
            let (mut client, address) = gateway.client(1).await;
            let outer = round_trip(&mut client, &server, &address).await;
            gateway.ask_root("kill");
            assert_eq!(round_trip(&mut client, &server, &address).await, outer);
            gateway.ask_root("start");
            timeout(PATIENCE, gateway.shared.helper.ready())
                .await
                .unwrap()
                .unwrap();
            assert_eq!(round_trip(&mut client, &server, &address).await, outer);
            // A goodbye after the restart reaches the new helper.
            client
                .send(tokio_tungstenite::tungstenite::Message::text("goodbye"))
                .await;
            assert_eq!(client.close_frame().await.0, 1000);
            let (_other, theirs) = gateway.client(2).await;
            assert!(theirs.starts_with("10.64.0."), "{theirs}");
        },
        |what| match what {
            "kill" => helper.kill(),
            _ => helper.start(&lab.gw),
        },
    );
}

#[test]
fn a_deleted_device_ends_its_session_with_a_reason() {
    let lab = Lab::new();
    let helper = rvpn_lab::Helper::serving(&lab, "");
    in_gateway(
        &lab,
        &helper,
        async |gateway| {
            let (mut client, _) = gateway.client(1).await;
            let slot = gateway.shared.hub.cards()[0].slot.unwrap();
            gateway.ask_root(format!("link delete rv{slot}"));
            let (code, reason) = client.close_frame().await;
            assert_eq!((code, reason.as_str()), (1011, "the tunnel device is gone"));
        },
        |words| {
            lab.gw.ip(words);
        },
    );
}

/// In one message, so that the gateway has them at once.
async fn send_all(client: &mut Client, packets: &[Vec<u8>]) {
    let mut message = Vec::new();
    for packet in packets {
        append(&mut message, packet, Offload::NONE).unwrap();
    }
    client.send(message).await;
}

/// The next packet for the client that is TCP of this IP, and where its payload
/// begins. What the other flow still repeats is passed over.
async fn next_tcp(client: &mut Client, waiting: &mut Vec<Vec<u8>>, v6: bool) -> (Vec<u8>, usize) {
    loop {
        while let Some(packet) = waiting.pop() {
            let (l4, tcp) = if v6 {
                (40, packet[0] >> 4 == 6 && packet[6] == 6)
            } else {
                (20, packet[0] >> 4 == 4 && packet[9] == 6)
            };
            if tcp {
                let payload = l4 + usize::from(packet[l4 + 12] >> 4) * 4;
                return (packet, payload);
            }
        }
        let message = client.data().await;
        waiting.extend(Reader::new(&message).map(|r| r.unwrap().packet.to_vec()));
        waiting.reverse();
    }
}

#[test]
fn what_is_joined_for_the_device_arrives_as_it_was_sent() {
    const COUNT: u32 = 30;
    const LEN: usize = 1300;
    let lab = Lab::new();
    let helper = rvpn_lab::Helper::serving(&lab, "");
    let datagrams = [(UP4, SERVER), (UP6, "[2606:4700:4700::1111]:5353")]
        .map(|(far, at)| (far, lab.up.udp(at)));
    let streams = [(UP4, "1.1.1.1:7000"), (UP6, "[2606:4700:4700::1111]:7000")]
        .map(|(far, at)| (far, lab.up.tcp(at)));
    let part = |n: u32| -> Vec<u8> { (0..LEN as u32).map(|at| (at * 13 + n) as u8).collect() };
    in_gateway(
        &lab,
        &helper,
        async |gateway| {
            let (mut client, own) = gateway.native().await;
            for ((far, socket), own) in datagrams.iter().zip(&own) {
                let sent: Vec<_> = (0..COUNT)
                    .map(|n| packet::udp(own, 4000, far, 5353, &part(n)))
                    .map(|mut p| {
                        // Not a word about its number, as hosts do that never fragment.
                        if p[0] >> 4 == 4 {
                            p[6] = 0x40;
                            packet::fix_header(&mut p);
                        }
                        p
                    })
                    .collect();
                send_all(&mut client, &sent).await;
                let mut buf = [0; 2000];
                for n in 0..COUNT {
                    let (len, _) = socket.recv_from(&mut buf).unwrap();
                    assert_eq!(buf[..len], part(n), "datagram {n} to {far}");
                }
            }
            for ((far, listener), own) in streams.iter().zip(&own) {
                let mut waiting = Vec::new();
                let v6 = *far == UP6;
                let (here, there) = ((own.as_str(), 4001), (*far, 7000));
                let syn = packet::tcp(here, there, "S", 99, 0, b"");
                send_all(&mut client, &[syn]).await;
                let (answer, _) = next_tcp(&mut client, &mut waiting, v6).await;
                let l4 = if v6 { 40 } else { 20 };
                let theirs = u32::from_be_bytes(answer[l4 + 4..l4 + 8].try_into().unwrap());
                let mut sent = vec![packet::tcp(here, there, ".", 100, theirs + 1, b"")];
                sent.extend((0..COUNT).map(|n| {
                    let sequence = 100 + n * LEN as u32;
                    packet::tcp(here, there, ".", sequence, theirs + 1, &part(n))
                }));
                send_all(&mut client, &sent).await;
                assert!(readable(listener, PATIENCE), "no connection to {far}");
                let (mut stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let mut got = vec![0; COUNT as usize * LEN];
                stream.read_exact(&mut got).unwrap();
                let expected: Vec<u8> = (0..COUNT).flat_map(part).collect();
                assert!(got == expected, "the stream to {far}");
                // And back, where the kernel's super-packet is cut.
                stream.write_all(&expected[..4000]).unwrap();
                let mut back = Vec::new();
                while back.len() < 4000 {
                    let (packet, payload) = next_tcp(&mut client, &mut waiting, v6).await;
                    assert!(packet.len() <= 1500);
                    back.extend_from_slice(&packet[payload..]);
                }
                assert!(back == expected[..4000], "the stream from {far}");
            }
            let id = gateway.shared.hub.cards()[0].id;
            // Two handshakes, and every segment and datagram by itself; counted
            // when the turn is over.
            let packets = 2 * 2 + 4 * u64::from(COUNT);
            let deadline = Instant::now() + PATIENCE;
            loop {
                let usage = gateway.shared.meter.usage();
                let row = usage.iter().find(|(_, u)| u.session == id).unwrap();
                let totals = row.1.totals;
                assert_eq!(totals.drops(), 0);
                if totals.outbound.packets == packets {
                    break;
                }
                assert!(Instant::now() < deadline, "{totals:?}");
                tokio::task::yield_now().await;
            }
        },
        |_| unreachable!(),
    );
}
