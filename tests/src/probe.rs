//! Probes with a canary, and the verdict: exact trace or nothing.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::capture::{Capture, contains, drain_udp};
use crate::helper::Tunnel;
use crate::packet;
use crate::topology::{Lab, UP4};
use crate::wait_until;

/// Sixteen bytes that occur nowhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Canary(pub [u8; 16]);

static NEXT: AtomicU64 = AtomicU64::new(1);

impl Canary {
    pub fn new() -> Canary {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut bytes = *b"rvpn-canary\0\0\0\0\0";
        // Never a run of zeros that a header could hold.
        bytes[8..].copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
        Canary(bytes)
    }
}

impl Default for Canary {
    fn default() -> Canary {
        Canary::new()
    }
}

/// Everywhere a packet of a client could turn up.
pub struct Observers {
    wire: Vec<Capture>,
    fence: UdpSocket,
}

/// The port the fence arrives at; probes never use it.
const FENCE_PORT: u16 = 40_009;

impl Observers {
    /// Watches the neighbour and the internet's end of the wire.
    pub fn new(lab: &Lab) -> Observers {
        Observers {
            wire: vec![Capture::on(&lab.up), Capture::on(&lab.nb)],
            fence: lab.up.udp(&format!("{UP4}:{FENCE_PORT}")),
        }
    }

    /// Sends a packet that may pass on the same way, and waits until it has arrived:
    /// what was sent before it has by then arrived too, or never will.
    #[track_caller]
    pub fn fence(&mut self, through: &Tunnel) {
        let mark = Canary::new();
        through.send(&packet::udp(&through.v4(2), 9, UP4, FENCE_PORT, &mark.0));
        wait_until("the fence arrives", || {
            drain_udp(&self.fence).iter().any(|d| contains(d, &mark.0))
        });
    }

    /// How often the canary was seen on the wire outside the gateway.
    pub fn seen(&mut self, canary: Canary) -> usize {
        self.wire.iter_mut().map(|c| c.count(&canary.0)).sum()
    }

    /// Frames on the wire that come from or go to an address of the pools.
    pub fn private_frames(&mut self) -> usize {
        let mut n = 0;
        for c in &mut self.wire {
            for f in c.frames() {
                let inner = f.get(14..).unwrap_or_default();
                let leaked = match inner.first().map(|b| b >> 4) {
                    Some(4) if f[12..14] == [8, 0] && inner.len() >= 20 => {
                        let a = |at: usize| inner[at] == 10 && (64..128).contains(&inner[at + 1]);
                        a(12)
                    }
                    Some(6) if f[12..14] == [0x86, 0xdd] && inner.len() >= 40 => inner[8] == 0xfd,
                    _ => false,
                };
                n += usize::from(leaked);
            }
        }
        n
    }

    pub fn clear(&mut self) {
        self.wire.iter_mut().for_each(Capture::clear);
    }
}
