//! The second thread: proves slots clean, and makes new ones, with sockets of its own.
//!
//! An acquire never waits for it. What it does is reported through a channel
//! and an eventfd the serving loop polls.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::apply;
use crate::config::Config;
use crate::kernel::tun::Tun;
use crate::kernel::{Kernel, conntrack, link, ruleset};
use crate::plan::{Device, MARK_SLOT_MASK};
use crate::pool::LET_GO;

const PROBE: Duration = Duration::from_millis(5);
/// Flows in flight while the lease ends may be added between two flushes.
const FLUSHES: u32 = 5;

pub(crate) struct Cleaner {
    /// Devices to be cleaned, with the lease they had.
    pub(crate) jobs: Sender<Device>,
    /// Each such device, and what is in its place now: it stays out of use until that is one.
    pub(crate) done: Receiver<(Device, io::Result<Device>)>,
    /// Readable when something is done.
    pub(crate) wake: Arc<EventFd>,
    /// The netfilter port of its changes.
    pub(crate) port: u32,
}

impl Cleaner {
    pub(crate) fn start(config: &Arc<Config>) -> io::Result<Cleaner> {
        let mut kernel = Kernel::open(config)?;
        let port = kernel.filter.port;
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake = Arc::new(EventFd::from_value_and_flags(0, flags)?);
        // A starting thread makes system calls it never makes again: they must be over before the filter.
        let started = Arc::new(Barrier::new(2));
        let (signal, here) = (Arc::clone(&wake), Arc::clone(&started));
        let ((jobs, work), (report, done)) = (channel(), channel());
        let run = move || {
            here.wait();
            for device in work {
                let result = clean(&mut kernel, device);
                if report.send((device, result)).is_err() || signal.write(1).is_err() {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("cleaner".to_owned());
        thread.stack_size(256 * 1024).spawn(run)?;
        started.wait();
        Ok(Cleaner {
            jobs,
            done,
            wake,
            port,
        })
    }
}

/// Closes the slot's way out, proves that nobody holds its device, and forgets
/// its flows. Returns the device, a new one if there was none or any doubt.
fn clean(k: &mut Kernel, former: Device) -> io::Result<Device> {
    if former.lease.is_some() {
        ruleset::remove_lease(k, former)?;
    }
    let lease = None;
    let mut device = Device { lease, ..former };
    // While we hold it nobody can send through it, so no flow can begin again.
    let held = (device.index != 0).then(|| hold(k, &device)).flatten();
    if held.is_some() {
        link::set_alias(k, &device)?;
        link::unroute(k, &[device], false);
    } else {
        device = apply::recreate(k, device)?;
    }
    // A slot nobody ever had has nothing to forget.
    if device.generation > 0 {
        forget(k, &device)?;
    }
    drop(held);
    Ok(device)
}

/// Attaches once every former descriptor is closed; `None` when there is any doubt about the device.
fn hold(k: &mut Kernel, d: &Device) -> Option<Tun> {
    let deadline = Instant::now() + LET_GO;
    let tun = loop {
        match apply::attach(k, d) {
            Ok((tun, _)) => break tun,
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                thread::sleep(PROBE);
            }
            Err(_) => return None,
        }
    };
    let found = apply::survey(k, Some(d.index)).ok()?.ours;
    matches!(found[..], [(_, true)]).then_some(tun)
}

fn forget(k: &mut Kernel, d: &Device) -> io::Result<()> {
    for _ in 0..FLUSHES {
        conntrack::flush(k, d.mark(), MARK_SLOT_MASK)?;
        if conntrack::count(k, d.mark(), MARK_SLOT_MASK)? == 0 {
            return Ok(());
        }
    }
    let why = format!("flows of {} remain after {FLUSHES} flushes", d.name());
    Err(io::Error::other(why))
}
