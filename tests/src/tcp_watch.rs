//! What a capture of a client's TCP connections shows as their payload.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};

use crate::capture::{Capture, readable};
use crate::ns::Ns;

/// Of one direction: where it begins and how far it has come.
#[derive(Clone, Copy, Debug, Default)]
struct Way {
    first: Option<u32>,
    end: u32,
}

impl Way {
    /// Sent again counts once: it is how far the stream has come that is told.
    fn see(&mut self, seq: u32, syn: bool, payload: usize) {
        if syn {
            self.first = Some(seq.wrapping_add(1));
            return;
        }
        let Some(first) = self.first else { return };
        let end = u32::try_from(payload).map_or(0, |n| seq.wrapping_sub(first).wrapping_add(n));
        // What is before the beginning is a probe of the other side's life.
        if end.wrapping_sub(self.end) < 1 << 31 {
            self.end = end;
        }
    }
}

type Flows = Arc<Mutex<BTreeMap<u16, [Way; 2]>>>;

/// Counts the payload of every connection between a client's machine and a port.
pub struct TcpWatch {
    flows: Flows,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl TcpWatch {
    /// From now on, for connections over IPv4 that begin later.
    pub fn on(ns: &Ns, port: u16) -> TcpWatch {
        let tap = Capture::on(ns).into_fd();
        let flows = Flows::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (Arc::clone(&flows), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            // Headers are enough: lengths are in them.
            let mut buf = [0; 96];
            while !stopped.load(Ordering::Relaxed) {
                if !readable(&tap, Duration::from_millis(20)) {
                    continue;
                }
                while let Ok(n) = recv(tap.as_raw_fd(), &mut buf, MsgFlags::MSG_DONTWAIT) {
                    see(&buf[..n], port, &shared);
                }
            }
        });
        TcpWatch {
            flows,
            stop,
            thread: Some(thread),
        }
    }

    /// Payload from the client and to it, of the connection from this port of its.
    pub fn payload(&self, local: u16) -> [u64; 2] {
        let flows = self.flows.lock().expect("the watch goes on");
        let ways = flows.get(&local).copied().unwrap_or_default();
        ways.map(|way| way.end.into())
    }
}

fn see(frame: &[u8], port: u16, flows: &Flows) {
    let Some(ip) = frame.get(14..).filter(|_| frame[12..14] == [8, 0]) else {
        return;
    };
    let word = |at: usize| u16::from_be_bytes([ip[at], ip[at + 1]]);
    if ip.len() < 40 || ip[9] != 6 {
        return;
    }
    let l4 = usize::from(ip[0] & 15) * 4;
    let headers = l4 + usize::from(ip[l4 + 12] >> 4) * 4;
    let payload = usize::from(word(2)) - headers;
    let (from, to) = (word(l4), word(l4 + 2));
    let (local, way) = match (from == port, to == port) {
        (false, true) => (from, 0),
        (true, false) => (to, 1),
        _ => return,
    };
    let seq = u32::from_be_bytes([ip[l4 + 4], ip[l4 + 5], ip[l4 + 6], ip[l4 + 7]]);
    let syn = ip[l4 + 13] & 2 != 0;
    let mut flows = flows.lock().expect("the watch goes on");
    flows.entry(local).or_default()[way].see(seq, syn, payload);
}

impl Drop for TcpWatch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
