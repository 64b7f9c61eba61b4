//! The second thread: proves slots clean and makes new ones, with sockets of its own.
//!
//! An acquire never waits for it. What it does is reported through a channel
//! and an eventfd the serving loop polls.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use rvpn_ipc::Slot;

use crate::apply;
use crate::config::Config;
use crate::kernel::tun::Tun;
use crate::kernel::{Kernel, conntrack, link, ruleset};
use crate::plan::{self, Live, Tag};
use crate::pool::LET_GO;

const PROBE: Duration = Duration::from_millis(5);
/// Flows in flight while the lease ends may be added between two flushes.
const FLUSHES: u32 = 5;

pub(crate) enum Job {
    /// Slot, its device's index, its generation and former lease.
    Clean(Slot, u32, Tag),
    /// Make the slots from the first to before the second.
    Grow(Slot, Slot),
}

pub(crate) enum Done {
    /// The slot is on the device of this index, or stays out of use until it is tried again.
    Cleaned(Slot, io::Result<u32>),
    /// Indexes of the devices made, and why it did not go on.
    Grown(Vec<u32>, io::Result<()>),
}

pub(crate) struct Cleaner {
    jobs: Sender<Job>,
    pub(crate) done: Receiver<Done>,
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
        let (jobs, work) = channel();
        let (report, done) = channel();
        let signal = Arc::clone(&wake);
        // A starting thread makes system calls it never makes again: they must be over before the filter.
        let started = Arc::new(Barrier::new(2));
        let here = Arc::clone(&started);
        let run = move || {
            here.wait();
            for job in work {
                let result = match job {
                    Job::Clean(slot, index, former) => {
                        Done::Cleaned(slot, clean(&mut kernel, slot, index, former))
                    }
                    Job::Grow(from, to) => grow(&mut kernel, from, to),
                };
                if report.send(result).is_err() || signal.write(1).is_err() {
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

    pub(crate) fn submit(&self, job: Job) -> io::Result<()> {
        let sent = self.jobs.send(job);
        sent.map_err(|_| io::Error::other("the cleaning thread is gone"))
    }
}

fn grow(k: &mut Kernel, from: Slot, to: Slot) -> Done {
    let mut made = Vec::new();
    let result = (from..to).try_for_each(|slot| {
        made.extend(apply::create(k, &[(slot, Tag::NEW)])?.iter().map(|m| m.1));
        Ok(())
    });
    Done::Grown(made, result)
}

/// Closes the slot's way out, proves that nobody holds its device, and forgets
/// its flows. Returns the device's index, a new one if there was any doubt.
fn clean(k: &mut Kernel, slot: Slot, index: u32, former: Tag) -> io::Result<u32> {
    if let Some(lease) = former.lease {
        ruleset::remove_lease(k, Live::new(slot, index, lease))?;
    }
    let tag = Tag::new(former.generation, None);
    // While we hold it nobody can send through it, so no flow can begin again.
    let held = hold(k, slot, index);
    let index = if held.is_some() {
        link::set_alias(k, index, tag)?;
        link::drop_host6(k, slot, index);
        index
    } else {
        apply::recreate(k, slot, index, tag)?
    };
    forget(k, slot)?;
    drop(held);
    Ok(index)
}

/// Attaches once every former descriptor is closed; `None` when there is any doubt about the device.
fn hold(k: &mut Kernel, slot: Slot, index: u32) -> Option<Tun> {
    if index == 0 {
        return None;
    }
    let deadline = Instant::now() + LET_GO;
    let tun = loop {
        match apply::attach(k, slot, index) {
            Ok((tun, _)) => break tun,
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                thread::sleep(PROBE)
            }
            Err(_) => return None,
        }
    };
    let l = link::get(k, index).ok()?;
    let whole = apply::is_sound(&k.config, &l) && apply::addressed(k, slot, index, false).ok()?;
    whole.then_some(tun)
}

fn forget(k: &mut Kernel, slot: Slot) -> io::Result<()> {
    let mark = plan::mark(slot, 0);
    for _ in 0..FLUSHES {
        conntrack::flush(k, mark, plan::MARK_SLOT_MASK)?;
        if conntrack::count(k, mark, plan::MARK_SLOT_MASK)? == 0 {
            return Ok(());
        }
    }
    let name = plan::device_name(slot);
    let why = format!("flows of {name} remain after {FLUSHES} flushes");
    Err(io::Error::other(why))
}
