//! Two clients on the real helper, and everything that could see a stray packet of theirs.

use rvpn_ipc::Client;

use crate::capture::contains;
use crate::helper::{Helper, Tunnel};
use crate::packet;
use crate::probe::{Canary, Observers};
use crate::read_back::counter;
use crate::topology::Lab;

/// A probe: what it is known by, and its packet.
pub type Probe = (Canary, Vec<u8>);

/// The lab with clients A and B connected.
pub struct Stage {
    pub lab: Lab,
    pub helper: Helper,
    pub gateway: Client,
    pub a: Tunnel,
    pub b: Tunnel,
    pub watch: Observers,
}

impl Default for Stage {
    fn default() -> Stage {
        Stage::new()
    }
}

impl Stage {
    pub fn new() -> Stage {
        Stage::with("")
    }

    /// With further lines of the helper's configuration.
    pub fn with(config: &str) -> Stage {
        let lab = Lab::new();
        let helper = Helper::serving(&lab, config);
        let mut gateway = helper.connect();
        let a = Tunnel::acquire(&mut gateway, 1);
        let b = Tunnel::acquire(&mut gateway, 2);
        let watch = Observers::new(&lab);
        Stage {
            lab,
            helper,
            gateway,
            a,
            b,
            watch,
        }
    }

    /// Sends probes from A. None may be seen anywhere, and these counters together move by their number.
    #[track_caller]
    pub fn all_dropped(&mut self, probes: &[Probe], reasons: &[&str]) {
        let count = |lab: &Lab| reasons.iter().map(|r| counter(&lab.gw, r)).sum::<u64>();
        let before = count(&self.lab);
        for (_, p) in probes {
            self.a.send(p);
        }
        self.watch.fence(&self.a);
        self.nothing_seen(probes);
        assert_eq!(
            count(&self.lab) - before,
            probes.len() as u64,
            "counted as {reasons:?}"
        );
    }

    /// The same for packets the kernel itself refuses before it asks any rule.
    #[track_caller]
    pub fn all_gone(&mut self, probes: &[Probe]) {
        for (_, p) in probes {
            self.a.send(p);
        }
        self.watch.fence(&self.a);
        self.nothing_seen(probes);
    }

    /// None of the probes is, or was, anywhere.
    #[track_caller]
    pub fn nothing_seen(&mut self, probes: &[Probe]) {
        let (at_a, at_b) = (self.a.drain(), self.b.drain());
        for (i, (canary, _)) in probes.iter().enumerate() {
            assert_eq!(self.watch.seen(*canary), 0, "probe {i} left the gateway");
            for (name, got) in [("A", &at_a), ("B", &at_b)] {
                assert!(
                    !got.iter().any(|p| contains(p, &canary.0)),
                    "probe {i} reached {name}"
                );
            }
        }
        assert_eq!(at_b.len(), 0, "B received something");
        assert_eq!(
            self.watch.private_frames(),
            0,
            "a private source on the wire"
        );
    }
}

/// A packet around a new canary.
pub fn probe(f: impl FnOnce(&[u8]) -> Vec<u8>) -> Probe {
    let c = Canary::new();
    (c, f(&c.0))
}

/// One datagram, one segment, one echo from this source to an address that may be reached.
pub fn three_kinds(src: &str, dst: &str) -> Vec<Probe> {
    vec![
        probe(|c| packet::udp(src, 4000, dst, 4001, c)),
        probe(|c| packet::tcp((src, 4000), (dst, 4001), "S", 1, 0, c)),
        probe(|c| packet::echo(src, dst, 1, 1, c)),
    ]
}
