//! Sessions with everything around them but the kernel.

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rvpn_gateway::admit::{Admission, Kind, Sessions as _, TokenId};
use rvpn_gateway::cores::Cores;
use rvpn_gateway::helper::{Helper, HelperConfig};
use rvpn_gateway::meter::{DropReason, Meter, Totals};
use rvpn_gateway::session::begin::Arrival;
use rvpn_gateway::session::drive::Patience;
use rvpn_gateway::session::{Sessions, Settings, Shared};
use rvpn_gateway::ticket::TicketKey;
use rvpn_gateway::tun::VIRTIO_LEN;
use rvpn_ipc::Key;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::timeout;

use super::fake_helper::{FakeHelper, PATIENCE};
use super::plain::{LONG, Plain};
use super::wire::{Client, connect, connect_io};

/// A gateway's sessions with a helper of the test's own.
pub(crate) struct Lab {
    pub(crate) fake: FakeHelper,
    pub(crate) shared: Arc<Shared>,
    pub(crate) revoke: watch::Sender<bool>,
    pub(crate) dir: TempDir,
}

impl Lab {
    pub(crate) async fn new(slots: usize) -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let fake = FakeHelper::start(dir.path(), slots);
        let helper = Helper::start(HelperConfig {
            socket: fake.socket.clone(),
            uid: nix::unistd::getuid().as_raw(),
            successor: false,
        });
        timeout(PATIENCE, helper.ready()).await.unwrap().unwrap();
        let meter = Arc::new(Meter::create(dir.path(), 64).unwrap());
        let tickets = TicketKey::load_or_create(&dir.path().join("ticket.key")).unwrap();
        let settings = Settings {
            ticket_life: Duration::from_secs(3600),
            dns: Vec::new(),
            routes: Vec::new(),
        };
        let shared = Shared::new(
            Cores::start(2, false).unwrap(),
            helper,
            meter,
            tickets,
            settings,
        );
        Lab {
            fake,
            shared,
            revoke: watch::channel(false).0,
            dir,
        }
    }
}

impl Lab {
    pub(crate) fn guest(&self) -> Admission {
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

    /// A client at the gateway's door, admitted as it is after its upgrade.
    pub(crate) async fn admit(&self, guest: Admission) -> Client {
        let (client, io) = connect_io().await;
        Sessions(Arc::clone(&self.shared)).admit(guest, io, Bytes::new());
        client
    }

    pub(crate) async fn arrive(&self, key: Key) -> Client {
        self.arrive_as(key, self.guest(), LONG).await
    }

    pub(crate) async fn arrive_as(&self, key: Key, guest: Admission, patience: Patience) -> Client {
        let (client, socket) = connect().await;
        let arrival = Arrival {
            socket,
            protocol: Plain {
                patience,
                lingers: true,
            },
            admission: guest,
            key,
            epoch: 0,
            seat: self.shared.cores.least_loaded(),
        };
        arrival.settle(Arc::clone(&self.shared));
        client
    }

    pub(crate) fn device(&self, slot: u32) -> Device {
        let socket = self.fake.device(slot);
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Device(socket)
    }

    pub(crate) async fn ended(&self, id: u128) -> Totals {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let rows = self.shared.meter.usage();
            let row = rows.into_iter().find(|(_, u)| u.session == id).unwrap().1;
            if row.ended_ms.is_some() {
                return row.totals;
            }
            assert!(Instant::now() < deadline, "the session does not end");
            tokio::task::yield_now().await;
        }
    }

    /// Waits until some session has published these payload totals, which it
    /// does at the end of a turn.
    pub(crate) async fn counted(&self, outbound: u64, inbound: u64) {
        let deadline = Instant::now() + PATIENCE;
        let wanted = (outbound, inbound);
        let payload = |t: &Totals| (t.outbound.payload, t.inbound.payload);
        while !self
            .shared
            .list()
            .iter()
            .any(|v| payload(&v.totals) == wanted)
        {
            assert!(Instant::now() < deadline, "{:?}", self.shared.list());
            tokio::task::yield_now().await;
        }
    }

    /// Waits until the session on this slot has dropped so many for this
    /// reason on the way out.
    pub(crate) async fn dropped(&self, slot: u32, reason: DropReason, count: u64) {
        self.until(slot, |t| t.outbound.drops[reason as usize] == count)
            .await;
    }

    /// The same on the way in.
    pub(crate) async fn inbound_dropped(&self, slot: u32, reason: DropReason, count: u64) {
        self.until(slot, |t| t.inbound.drops[reason as usize] == count)
            .await;
    }

    async fn until(&self, slot: u32, done: impl Fn(&Totals) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let list = self.shared.list();
            let view = list.iter().find(|v| v.card.slot == Some(slot)).unwrap();
            if done(&view.totals) {
                return;
            }
            assert!(Instant::now() < deadline, "{:?}", view.totals);
            tokio::task::yield_now().await;
        }
    }

    pub(crate) fn only_session(&self) -> u128 {
        let cards = self.shared.hub.cards();
        assert_eq!(cards.len(), 1);
        cards[0].id
    }
}

/// The far end of a device.
pub(crate) struct Device(pub(crate) Arc<UnixDatagram>);

impl Device {
    /// With the virtio header.
    pub(crate) fn read_whole(&self) -> Vec<u8> {
        let mut buf = vec![0; 70_000];
        let n = self.0.recv(&mut buf).unwrap();
        buf.truncate(n);
        buf
    }

    /// With this virtio header.
    pub(crate) fn write_whole(&self, virtio: [u8; VIRTIO_LEN], packet: &[u8]) {
        let mut whole = virtio.to_vec();
        whole.extend_from_slice(packet);
        self.0.send(&whole).unwrap();
    }

    pub(crate) fn read(&self) -> Vec<u8> {
        let mut buf = vec![0; 70_000];
        let n = self.0.recv(&mut buf).unwrap();
        assert_eq!(buf[..VIRTIO_LEN], [0; VIRTIO_LEN]);
        buf[VIRTIO_LEN..n].to_vec()
    }

    pub(crate) fn write(&self, packet: &[u8]) {
        let mut whole = vec![0; VIRTIO_LEN];
        whole.extend_from_slice(packet);
        self.0.send(&whole).unwrap();
    }
}
