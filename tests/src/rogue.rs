//! A client with a valid login and bad intentions.
//!
//! It speaks as others, to others, and to the internet, in packets of the
//! grammar that are right, nearly right or nonsense. Every packet with room
//! for it says whose it is and whether anybody may ever see it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use rvpn_proto::packet::grammar::{Client, ROOM, Rng, packet, spoil};
use rvpn_proto::packet::{Icmp, Side, Transport, parse};
use rvpn_proto::record::Offload;

use crate::capture::{Capture, readable};
use crate::ns::Ns;
use crate::packet::fix_header;
use crate::sums;

const MARK: &[u8; 10] = b"rvpn-rogue";

/// What became of a canary's packet, or may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sighting {
    /// Whose packet it was.
    pub client: u8,
    /// Its own address speaks to the internet: it may be seen there, and errors
    /// that quote it come back to its sender. All others may not be seen at all.
    pub lawful: bool,
}

/// The canary in these bytes, if there is one.
pub fn sighted(bytes: &[u8]) -> Option<Sighting> {
    let at = bytes.windows(MARK.len()).position(|w| w == MARK)?;
    Some(Sighting {
        client: *bytes.get(at + 10)?,
        lawful: *bytes.get(at + 11)? == 1,
    })
}

/// A packet on its way, and what the gateway has to make of it.
pub struct Shot {
    pub packet: Vec<u8>,
    pub offload: Offload,
    /// It has somebody else's source and is otherwise right.
    pub foreign: bool,
    /// It has been spoiled: nobody knows what it is now.
    pub spoiled: bool,
    /// What it counts as when it passes.
    pub segments: u64,
}

/// One of several rogues; the same seed makes the same packets.
pub struct Rogue {
    index: u8,
    rng: Rng,
    own: Client,
    /// What the others are known as, to each other and to the kernel.
    others: Vec<Client>,
    supers: bool,
    buffer: Box<[u8; ROOM]>,
    made: u32,
}

impl Rogue {
    /// `own` is what this client may speak as, `all` the lease of each by index.
    pub fn new(seed: u64, index: u8, own: Client, all: &[Client], supers: bool) -> Rogue {
        let mut others = all.to_vec();
        others.remove(index.into());
        Rogue {
            index,
            rng: Rng::new(seed),
            own,
            others,
            supers,
            buffer: Box::new([0; ROOM]),
            made: 0,
        }
    }

    /// The next of its packets.
    pub fn shoot(&mut self) -> Shot {
        let rng = &mut self.rng;
        let victim = self.others[rng.below(self.others.len())];
        let second = self.others[rng.below(self.others.len())];
        let (source, to) = match rng.below(4) {
            0 => (self.own, None),
            1 => (self.own, Some(victim)),
            2 => (victim, None),
            _ => (victim, Some(second)),
        };
        let foreign = source != self.own;
        let lawful = !foreign && to.is_none();
        let made = loop {
            let made = packet(rng, &source, Side::Source, &mut self.buffer);
            if self.supers || made.offload == Offload::NONE {
                break made;
            }
        };
        let mut whole = self.buffer[..made.len].to_vec();
        if let Some(to) = to {
            send_to(&mut whole, to);
        }
        self.made += 1;
        let canary = mark(&mut whole, self.index, lawful, self.made);
        let rest = parse(&whole).map_or(0, |p| p.payload_len());
        let segments = match made.offload.gso_size {
            0 => 1,
            size => rest.div_ceil(size.into()) as u64,
        };
        sums::repair(&mut whole, made.offload.partial);
        let spoiled = made.offload == Offload::NONE && rng.one_in(3);
        if spoiled {
            whole = self.spoiled(&whole, lawful, canary);
        }
        Shot {
            packet: whole,
            offload: made.offload,
            foreign,
            spoiled,
            segments,
        }
    }

    fn spoiled(&mut self, whole: &[u8], lawful: bool, canary: Range<usize>) -> Vec<u8> {
        self.buffer[..whole.len()].copy_from_slice(whole);
        let len = spoil(&mut self.rng, &mut self.buffer, whole.len()).max(1);
        let mut bad = self.buffer[..len].to_vec();
        let mut restore = |range: Range<usize>| {
            let range = range.start.min(len)..range.end.min(len);
            bad[range.clone()].copy_from_slice(&whole[range]);
        };
        // A canary that says something else would be believed.
        restore(canary);
        if !lawful {
            // Or a changed address would make it somebody's right.
            restore(if whole[0] >> 4 == 4 { 12..20 } else { 8..40 });
        }
        bad
    }
}

fn send_to(p: &mut [u8], to: Client) {
    if p[0] >> 4 == 4 {
        p[16..20].copy_from_slice(&to.v4.octets());
        fix_header(p);
    } else {
        p[24..40].copy_from_slice(&to.v6.octets());
    }
}

/// Signs the end of the payload where there is one. Returns where.
fn mark(p: &mut [u8], client: u8, lawful: bool, n: u32) -> Range<usize> {
    let Ok(parsed) = parse(p) else { return 0..0 };
    // An error is about a packet whose headers should stay what they are.
    let least = match parsed.transport() {
        Transport::Icmp(Icmp { error: true, .. }) => 96,
        _ => 16,
    };
    if parsed.payload_len() < least {
        return 0..0;
    }
    let end = parsed.len();
    p[end - 16..end - 6].copy_from_slice(MARK);
    p[end - 6] = client;
    p[end - 5] = u8::from(lawful);
    p[end - 4..end].copy_from_slice(&n.to_be_bytes());
    end - 16..end
}

/// The two addresses of a row of the API.
pub fn lease(row: &serde_json::Value) -> Client {
    let address = |n: usize| row["addresses"][n].as_str()?.parse().ok();
    match (address(0), address(1)) {
        (Some(IpAddr::V4(v4)), Some(IpAddr::V6(v6))) => Client { v4, v6 },
        other => panic!("{row}: {other:?}"),
    }
}

/// Watches a machine for what rogues sent, as long as it lives.
pub struct Lookout {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What was seen on a wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Frames of any kind.
    pub frames: u64,
    /// Those with a canary that may be there.
    pub lawful: u64,
    /// Those with one that may not.
    pub stray: u64,
    /// Those from an address that is not the internet's.
    pub private: u64,
}

impl Lookout {
    pub fn on(ns: &Ns) -> Lookout {
        let tap = Capture::on(ns).into_fd();
        let seen = Arc::<Mutex<Seen>>::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = std::thread::spawn(move || look(&tap, &shared, &stopped));
        Lookout {
            seen,
            stop,
            thread: Some(thread),
        }
    }

    pub fn seen(&self) -> Seen {
        *self.seen.lock().expect("the lookout goes on")
    }
}

fn look(tap: &OwnedFd, seen: &Mutex<Seen>, stop: &AtomicBool) {
    let mut buf = vec![0; 70_000];
    while !stop.load(Ordering::Relaxed) {
        if !readable(tap, Duration::from_millis(20)) {
            continue;
        }
        while let Ok(n) = recv(tap.as_raw_fd(), &mut buf, MsgFlags::MSG_DONTWAIT) {
            let frame = &buf[..n];
            let sighting = sighted(frame);
            let mut seen = seen.lock().expect("the scenario goes on");
            seen.frames += 1;
            seen.lawful += u64::from(sighting.is_some_and(|s| s.lawful));
            seen.stray += u64::from(sighting.is_some_and(|s| !s.lawful));
            seen.private += u64::from(is_private(frame.get(14..).unwrap_or_default()));
        }
    }
}

fn is_private(ip: &[u8]) -> bool {
    match ip.first().map(|b| b >> 4) {
        Some(4) if ip.len() >= 20 => Ipv4Addr::new(ip[12], ip[13], ip[14], ip[15]).is_private(),
        Some(6) if ip.len() >= 40 => {
            let source: [u8; 16] = ip[8..24].try_into().expect("sixteen");
            Ipv6Addr::from(source).is_unique_local()
        }
        _ => false,
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
