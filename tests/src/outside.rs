//! What leaves a client's machine past its tunnel: frames with its own hardware
//! address that hold a canary. What went through the tunnel is encrypted, and
//! comes out of the gateway with the gateway's.

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::Pid;

use crate::capture::{Capture, contains};
use crate::ns::Ns;
use crate::probe::Canary;
use crate::read_back::ip_json;
use crate::topology::{Lab, UP4, UP6, at};
use crate::wait_until;

/// The mark of the client's own connections, which go past the tunnel.
const MARK: u32 = 0x7276;
/// Where nobody listens.
pub const PORT: u16 = 40_010;

/// Watches the whole wire for one machine.
pub struct Outside {
    captures: Vec<Capture>,
    mac: Vec<u8>,
}

impl Outside {
    /// From now on.
    pub fn of(lab: &Lab, machine: &Ns) -> Outside {
        let links = ip_json(machine, "link show wan0");
        let mac = links[0]["address"].as_str().expect("an address");
        let bytes = mac.split(':').map(|b| u8::from_str_radix(b, 16));
        Outside {
            captures: [&lab.up, &lab.nb, &lab.gw].map(Capture::on).into(),
            mac: bytes.collect::<Result<_, _>>().expect("an address"),
        }
    }

    /// How often this left the machine in clear so far.
    pub fn leaked(&mut self, canary: Canary) -> usize {
        self.holding(&canary.0)
    }

    /// The same of any bytes.
    pub fn holding(&mut self, needle: &[u8]) -> usize {
        let mac = self.mac.clone();
        let seen = self.captures.iter_mut().map(|c| {
            let frames = c.frames().iter();
            let ours = frames.filter(|f| f.get(6..12) == Some(&mac));
            ours.filter(|f| contains(f, needle)).count()
        });
        seen.sum()
    }

    /// Forgets what was seen.
    pub fn forget(&mut self) {
        self.captures.iter_mut().for_each(Capture::clear);
    }

    /// Waits until everything that left the machine before has been seen: what
    /// leaves now on purpose, on every processor and in both families, is.
    #[track_caller]
    pub fn fence(&mut self, machine: &Ns) {
        self.fence_over(machine, &[UP4, UP6]);
    }

    /// The same by way of these hosts only.
    #[track_caller]
    pub fn fence_over(&mut self, machine: &Ns, hosts: &[&str]) {
        let mut missing = Vec::new();
        for cpu in processors() {
            for to in hosts {
                let mark = Canary::new();
                machine.run(|| {
                    pin_to(cpu);
                    let socket = UdpSocket::bind(at(any(to), 0)).expect("socket");
                    setsockopt(&socket.as_fd(), sockopt::Mark, &MARK).expect("mark");
                    socket.send_to(&mark.0, at(to, PORT)).expect("fence");
                });
                missing.push(mark);
            }
        }
        wait_until("every fence is seen outside", || {
            missing.retain(|m| self.leaked(*m) == 0);
            missing.is_empty()
        });
    }

    /// Sends a canary by what routes there are, and says how often it is seen in clear.
    #[track_caller]
    pub fn probe(&mut self, machine: &Ns, to: &[&str]) -> usize {
        self.probe_over(machine, to, &[UP4, UP6])
    }

    /// The same with the fence by way of these hosts only.
    #[track_caller]
    pub fn probe_over(&mut self, machine: &Ns, to: &[&str], fence: &[&str]) -> usize {
        let canaries: Vec<Canary> = to.iter().map(|to| try_send(machine, to)).collect();
        self.fence_over(machine, fence);
        canaries.into_iter().map(|c| self.leaked(c)).sum()
    }
}

fn any(of: &str) -> &'static str {
    if of.contains(':') { "::" } else { "0.0.0.0" }
}

/// Sends a new canary there as any program would; that it may not is fine.
pub fn try_send(machine: &Ns, to: &str) -> Canary {
    let canary = Canary::new();
    send(machine, to, &canary.0);
    canary
}

fn send(machine: &Ns, to: &str, payload: &[u8]) {
    machine.run(|| {
        let socket = UdpSocket::bind(at(any(to), 0)).expect("socket");
        for _ in 0..3 {
            let _unreachable = socket.send_to(payload, at(to, PORT));
        }
    });
}

fn processors() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).expect("affinity");
    (0..CpuSet::count())
        .filter(|&c| set.is_set(c).unwrap_or(false))
        .collect()
}

fn pin_to(cpu: usize) {
    let mut one = CpuSet::new();
    one.set(cpu).expect("a processor's number");
    sched_setaffinity(Pid::from_raw(0), &one).expect("affinity");
}

/// A datagram every millisecond in each family, until it is dropped.
pub struct Chatter {
    canary: Arc<Mutex<Canary>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Chatter {
    /// To these places.
    pub fn start(machine: &Ns, to: &[&str]) -> Chatter {
        let canary = Arc::new(Mutex::new(Canary::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let targets: Vec<(UdpSocket, String)> = machine.run(|| {
            let bound = |to: &&str| UdpSocket::bind(at(any(to), 0)).expect("socket");
            to.iter().map(|to| (bound(to), at(to, PORT))).collect()
        });
        let (says, ends) = (canary.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                let now = says.lock().expect("lock");
                for (socket, to) in &targets {
                    let _unreachable = socket.send_to(&now.0, to);
                }
                drop(now);
                std::thread::park_timeout(Duration::from_millis(1));
            }
        });
        Chatter {
            canary,
            stop,
            thread: Some(thread),
        }
    }

    /// Says something else from now on; what it said before is not said again.
    pub fn change(&self) -> Canary {
        let fresh = Canary::new();
        *self.canary.lock().expect("lock") = fresh;
        fresh
    }
}

impl Drop for Chatter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

/// Everything of a machine's network that a client may change, as text.
pub fn network(ns: &Ns) -> String {
    let mut all = String::new();
    for words in [
        "-4 rule",
        "-6 rule",
        "-4 route show table all",
        "-6 route show table all",
        "-br link",
    ] {
        all += &format!("## {words}\n{}", ns.ip(words));
    }
    let sysctls = ns.output(Command::new("sh").args([
        "-c",
        "grep -H . /proc/sys/net/ipv4/conf/*/rp_filter /proc/sys/net/ipv4/ip_nonlocal_bind",
    ]));
    all + &String::from_utf8_lossy(&sysctls.stdout)
}
