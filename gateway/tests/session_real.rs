//! Sessions on leases of the real helper: through its devices, its rules and
//! its translation to the laboratory's internet and back.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod session_support;

use std::sync::{Arc, mpsc};
use std::time::Duration;

use rvpn_gateway::admit::{Admission, Kind, TokenId};
use rvpn_gateway::cores::Cores;
use rvpn_gateway::helper::{Helper, HelperConfig};
use rvpn_gateway::meter::Meter;
use rvpn_gateway::session::begin::Arrival;
use rvpn_gateway::session::{Settings, Shared};
use rvpn_gateway::ticket::TicketKey;
use rvpn_ipc::Key;
use rvpn_lab::helper::{as_user, give};
use rvpn_lab::probe::Canary;
use rvpn_lab::topology::UP4;
use rvpn_lab::{Lab, packet};
use session_support::fake_helper::PATIENCE;
use session_support::plain::{LONG, Plain};
use session_support::wire::{Client, connect};
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
        let guest = Admission {
            account: "alice".into(),
            subject: "alice".into(),
            token_id: TokenId([1; 16]),
            expires_at: None,
            kind: Kind::Native,
            anonymous: false,
            class: 0,
            peer: "127.0.0.1:9".parse().unwrap(),
            listener: 0,
            revoked: self.revoke.subscribe(),
        };
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
            let slot = gateway.shared.hub.cards()[0].slot;
            gateway.ask_root(format!("link delete rv{slot}"));
            let (code, reason) = client.close_frame().await;
            assert_eq!((code, reason.as_str()), (1011, "the tunnel device is gone"));
        },
        |words| {
            lab.gw.ip(words);
        },
    );
}
