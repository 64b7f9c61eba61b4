//! The whole product in the laboratory: helper, gateway, and a client's machine.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};

use serde_json::Value;

use crate::gateway::Gateway;
use crate::helper::Helper;
use crate::ns::Ns;
use crate::probe::Canary;
use crate::topology::{Lab, UP4, UP6};
use crate::tunnel_client::{DIALECTS, Event, Session, Speech, Target};
use crate::wait_until;
use crate::{packet, sums};

/// Where the internet's server of the scenarios listens.
pub const PORT: u16 = 5353;

/// Everything that a scenario needs, running.
pub struct Scene {
    pub lab: Lab,
    pub helper: Helper,
    pub gateway: Gateway,
    /// A client's machine, 1.1.1.10.
    pub phone: Ns,
    pub target: Target,
}

impl Default for Scene {
    fn default() -> Scene {
        Scene::new("", DIALECTS)
    }
}

impl Scene {
    /// With these further lines of both configurations.
    pub fn new(helper: &str, gateway: &str) -> Scene {
        let lab = Lab::new();
        // One after the other, clients may come faster than slots are cleaned.
        let slots = match helper.contains("slots = ") {
            true => "",
            false => "slots = 16\n",
        };
        let helper = Helper::serving(&lab, &format!("{helper}{slots}"));
        let gateway = Gateway::start(&lab, &helper, gateway);
        let phone = lab.client("phone", 10);
        let target = Target::of(&gateway);
        Scene {
            lab,
            helper,
            gateway,
            phone,
            target,
        }
    }

    /// Logs in as an account of this name.
    pub async fn session(&self, speech: Speech, account: &str) -> Session {
        let token = self.gateway.token(account);
        Session::open(&self.target, speech, &token).await
    }

    /// The internet's server, by family.
    pub fn servers(&self) -> [UdpSocket; 2] {
        [UP4, UP6].map(|up| self.lab.up.udp(&crate::topology::at(up, PORT)))
    }

    /// The row of an account's session, as soon as it has exactly one.
    #[track_caller]
    pub fn row(&self, account: &str) -> Value {
        let mut own = Vec::new();
        wait_until("the session is listed", || {
            own = self.gateway.sessions();
            own.retain(|row| row["account"] == account);
            own.len() == 1
        });
        own.remove(0)
    }

    /// Waits until an account's session has counted so many packets from its
    /// client, passed or dropped. Returns the row.
    #[track_caller]
    pub fn counted(&self, account: &str, packets: u64) -> Value {
        let mut row = Value::Null;
        wait_until("the gateway has counted every packet", || {
            row = self.row(account);
            let out = &row["outbound"];
            let all = number(&out["packets"]) + drops(out).values().sum::<u64>();
            assert!(
                all <= packets,
                "more than the {packets} that were sent: {row}"
            );
            all == packets
        });
        row
    }

    /// Waits until no session is left.
    #[track_caller]
    pub fn deserted(&self) {
        wait_until("every session has ended", || {
            self.gateway.sessions().is_empty()
        });
    }
}

/// A number of a row.
#[track_caller]
pub fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} in place of a number"))
}

/// What was dropped in one direction of a row, by reason.
#[track_caller]
pub fn drops(direction: &Value) -> BTreeMap<String, u64> {
    let map = direction["drops"].as_object();
    let map = map.unwrap_or_else(|| panic!("{direction} in place of counters"));
    map.iter()
        .map(|(why, n)| (why.clone(), number(n)))
        .collect()
}

/// A datagram there and one back, with everything in between as it has to be.
/// Returns the IP lengths of both, and what the internet takes the client for.
pub async fn round_trip(
    session: &mut Session,
    server: &UdpSocket,
    port: u16,
) -> ([u64; 2], SocketAddr) {
    let at = server.local_addr().expect("address");
    let there = Canary::new();
    let (host, own) = (at.ip().to_string(), session.source(&at.ip().to_string()));
    let out = packet::udp(&own, port, &host, at.port(), &there.0);
    session.tx.send(&out).await;
    let from = expect_datagram(server, &there.0);
    let back = Canary::new();
    server.send_to(&back.0, from).expect("answer");
    let answer = packet::udp(&host, at.port(), &own, port, &back.0);
    let (got, offload) = session.rx.packet_with().await;
    let mut got = got.to_vec();
    assert_eq!(got.len(), answer.len(), "{got:02x?}");
    if offload.partial {
        assert!(sums::is_partial(&got), "{got:02x?}");
        sums::finish(&mut got);
    }
    assert_eq!(sums::wrong(&got), None, "{got:02x?}");
    // From the addresses on; what is before is the sending kernel's choice.
    let addresses = if at.is_ipv4() { 12 } else { 8 };
    assert_eq!(got[addresses..], answer[addresses..]);
    ([out.len() as u64, got.len() as u64], from)
}

/// The next datagram at the server must be this one.
#[track_caller]
pub fn expect_datagram(server: &UdpSocket, payload: &[u8]) -> SocketAddr {
    let mut buf = vec![0; 70_000];
    let (n, from) = server.recv_from(&mut buf).expect("a datagram");
    assert_eq!(&buf[..n], payload, "another datagram");
    from
}

/// Everything that reaches the client until its ping is answered: what was sent
/// to it before has by then arrived too, or never will.
pub async fn received(session: &mut Session) -> Vec<Vec<u8>> {
    let mark = Canary::new();
    let own = session.v4.to_string();
    session
        .tx
        .send(&packet::echo(&own, UP4, 99, 1, &mark.0))
        .await;
    let mut all = Vec::new();
    loop {
        match session.rx.event().await {
            Event::Packet(got, _) if got.ends_with(&mark.0) => return all,
            Event::Packet(got, _) => all.push(got.to_vec()),
            Event::Closed(closed) => panic!("{closed:?}"),
            Event::Text(_) | Event::Noise | Event::Ping => {}
        }
    }
}
