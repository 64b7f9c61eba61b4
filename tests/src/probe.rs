//! Probes with a canary, and the verdict: exact trace or nothing.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::capture::{Capture, contains, drain_udp};
use crate::helper::Tunnel;
use crate::packet;
use crate::topology::{Lab, UP4, UP6};
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
    fences: [UdpSocket; 2],
}

/// The port the fence arrives at; probes never use it.
const FENCE_PORT: u16 = 40_009;

impl Observers {
    /// Watches the neighbour and the internet's end of the wire.
    pub fn new(lab: &Lab) -> Observers {
        Observers {
            wire: vec![Capture::on(&lab.up), Capture::on(&lab.nb)],
            fences: [
                lab.up.udp(&format!("{UP4}:{FENCE_PORT}")),
                lab.up.udp(&format!("[{UP6}]:{FENCE_PORT}")),
            ],
        }
    }

    /// Sends packets that may pass on the same way, and waits until they have arrived:
    /// what was sent before has by then arrived too, or never will. A packet waits for
    /// others in two places, the processor that took it from the device and the next
    /// hop's neighbour entry, so there is a fence for every processor and family.
    #[track_caller]
    pub fn fence(&mut self, through: &Tunnel) {
        let mut missing = Vec::new();
        for cpu in allowed_processors() {
            let marks = [Canary::new(), Canary::new()];
            let packets = [
                packet::udp(&through.v4(2), 9, UP4, FENCE_PORT, &marks[0].0),
                packet::udp(&through.v6(1), 9, UP6, FENCE_PORT, &marks[1].0),
            ];
            std::thread::scope(|s| {
                s.spawn(|| {
                    pin_to(cpu);
                    packets.iter().for_each(|p| through.send(p));
                });
            });
            missing.extend(marks);
        }
        wait_until("every fence arrives", || {
            for s in &self.fences {
                for d in drain_udp(s) {
                    missing.retain(|m| !contains(&d, &m.0));
                }
            }
            missing.is_empty()
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

const THIS_THREAD: Pid = Pid::from_raw(0);

fn allowed_processors() -> Vec<usize> {
    let set = sched_getaffinity(THIS_THREAD).expect("affinity");
    (0..CpuSet::count())
        .filter(|&c| set.is_set(c).unwrap_or(false))
        .collect()
}

fn pin_to(cpu: usize) {
    let mut one = CpuSet::new();
    one.set(cpu).expect("a processor's number");
    sched_setaffinity(THIS_THREAD, &one).expect("affinity");
}
