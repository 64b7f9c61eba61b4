//! What makes a road long: on the way between a client and the gateways every
//! packet takes its time. This kernel has no netem, so two devices with a queue
//! of this program between them stand in for the long part.
//!
//! ```text
//!   client ── slow0 ══ delay ══ slow0 ── hill 1.1.1.90 ── bridge ── gw, nb
//! ```
//!
//! Packets of 64 KiB pass uncut, as they do on the wires.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rvpn_lab::Ns;
use rvpn_lab::topology::{FAR4, GW4, NB4};

use crate::device::{LARGEST, tun};
use crate::measure::Outcome;
use crate::road::{Kind, Road};
use crate::stage::Stage;

const NUMBER: u8 = 90;
const ADDRESS: &str = "1.1.1.90";
/// Packets on the way at most, in one direction.
const ON_THE_WAY: usize = 16_384;
/// A device's queue: the long road itself is never what drops.
const QUEUE: u32 = 10_000;
/// How soon the end is noticed.
const TICK: Duration = Duration::from_millis(20);

/// The host at the near end of the bridge.
pub(crate) struct Hill {
    pub(crate) ns: Ns,
}

impl Hill {
    pub(crate) fn new(stage: &Stage) -> Hill {
        let ns = stage.lab.client("hill", NUMBER);
        ns.sysctl("net/ipv4/ip_forward", "1");
        for device in ["all", "default", "wan0"] {
            ns.sysctl(&format!("net/ipv4/conf/{device}/send_redirects"), "0");
        }
        // What goes around every tunnel goes through the other gateway.
        ns.ip(&format!("route add {FAR4}/32 via {NB4}"));
        Hill { ns }
    }
}

/// A client's road is long until this is dropped.
pub(crate) struct Long<'a> {
    client: &'a Ns,
    gateways: [&'a Ns; 2],
    address: String,
    plain: bool,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl<'a> Long<'a> {
    /// Every packet takes so long, each way.
    pub(crate) fn new(
        stage: &'a Stage,
        hill: &Hill,
        road: &'a Road,
        delay: Duration,
    ) -> Outcome<Long<'a>> {
        let client = road.client();
        let address = format!("1.1.1.{}", road.number);
        let near = tun(client, "slow0", true, QUEUE)?;
        let far = tun(&hill.ns, "slow0", true, QUEUE)?;
        let mut long = Long {
            client,
            gateways: [&stage.lab.gw, &stage.lab.nb],
            address,
            plain: road.kind == Kind::Plain,
            stop: Arc::default(),
            threads: Vec::new(),
        };
        for (from, to) in [(near.try_clone()?, far.try_clone()?), (far, near)] {
            let (sender, receiver) = sync_channel(ON_THE_WAY);
            let stop = Arc::clone(&long.stop);
            let read = std::thread::spawn(move || take(from, delay, &sender, &stop));
            let stop = Arc::clone(&long.stop);
            let write = std::thread::spawn(move || give(to, &receiver, &stop));
            long.threads.extend([read, write]);
        }
        let cubic = if stage.outer.is_some() {
            "congctl cubic"
        } else {
            ""
        };
        let address = &long.address;
        for gateway in [GW4, NB4] {
            client.ip(&format!(
                "route add {gateway}/32 dev slow0 src {address} {cubic}"
            ));
        }
        if long.plain {
            client.ip(&format!("route replace {FAR4}/32 dev slow0 src {address}"));
        }
        hill.ns.ip(&format!("route add {address}/32 dev slow0"));
        for gateway in long.gateways {
            gateway.ip(&format!("route add {address}/32 via {ADDRESS} {cubic}"));
        }
        Ok(long)
    }
}

impl Drop for Long<'_> {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            // The devices end with the last of them, and their routes.
            let _ = thread.join();
        }
        for gateway in self.gateways {
            let mut command = std::process::Command::new("ip");
            command.args(["route", "del", &format!("{}/32", self.address)]);
            // What is left would only spoil later figures, which show it.
            let _done = gateway.output(&mut command);
        }
        if self.plain {
            let mut command = std::process::Command::new("ip");
            command.args(["route", "replace", &format!("{FAR4}/32"), "via", NB4]);
            let _done = self.client.output(&mut command);
        }
    }
}

type Packet = (Instant, Vec<u8>);

/// Takes packets off a device, each to arrive so much later.
fn take(mut from: File, delay: Duration, to: &SyncSender<Packet>, stop: &AtomicBool) {
    let mut packet = vec![0; LARGEST];
    let tick = PollTimeout::try_from(TICK).unwrap_or(PollTimeout::ZERO);
    while !stop.load(Relaxed) {
        let mut watched = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut watched, tick), Ok(1..)) {
            continue;
        }
        while let Ok(n) = from.read(&mut packet) {
            // A road that is full loses it, as roads do.
            let _ = to.try_send((Instant::now() + delay, packet[..n].to_vec()));
        }
    }
}

fn give(mut to: File, from: &Receiver<Packet>, stop: &AtomicBool) {
    while !stop.load(Relaxed) {
        match from.recv_timeout(TICK) {
            Ok((due, packet)) => {
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                // What the kernel refuses it refuses on other roads as well.
                let _ = to.write(&packet);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
