//! The second thread: proves slots clean and makes new ones, with sockets of its own.
//!
//! An acquire never waits for it. What it does is reported through a channel
//! and an eventfd the serving loop polls.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use rvpn_ipc::{Generation, Slot};

use crate::apply;
use crate::config::Config;
use crate::kernel::ruleset::{self, Element};
use crate::kernel::{Kernel, conntrack, link};
use crate::plan::{self, LeaseTag, Tag};
use crate::pool::LET_GO;

const PROBE: Duration = Duration::from_millis(5);
/// Flows in flight while the lease ends may be added between two flushes.
const FLUSHES: u32 = 5;

pub(crate) enum Job {
    Clean {
        slot: Slot,
        index: u32,
        generation: Generation,
        lease: Option<LeaseTag>,
    },
    /// Make the slots from the first to before the second.
    Grow(Slot, Slot),
}

pub(crate) enum Done {
    Cleaned {
        slot: Slot,
        index: u32,
    },
    /// Made so far; an error when it could not go on.
    Grown {
        made: Vec<(Slot, u32)>,
        error: Option<io::Error>,
    },
    /// The slot stays out of use until it is tried again.
    NotCleaned {
        slot: Slot,
        error: io::Error,
    },
}

pub(crate) struct Cleaner {
    jobs: Sender<Job>,
    pub(crate) done: Receiver<Done>,
    wake: Arc<EventFd>,
    /// The netfilter port of its changes.
    pub(crate) port: u32,
}

impl Cleaner {
    pub(crate) fn start(config: Arc<Config>) -> io::Result<Cleaner> {
        let mut kernel = Kernel::open()?;
        let port = kernel.filter.port;
        let wake = Arc::new(EventFd::from_value_and_flags(
            0,
            EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC,
        )?);
        let (jobs, work) = channel::<Job>();
        let (report, done) = channel();
        let signal = Arc::clone(&wake);
        // A starting thread makes system calls it never makes again: they must be over before the filter.
        let started = Arc::new(Barrier::new(2));
        let here = Arc::clone(&started);
        thread::Builder::new()
            .name("cleaner".to_owned())
            .stack_size(256 * 1024)
            .spawn(move || {
                here.wait();
                for job in work {
                    let result = match job {
                        Job::Clean {
                            slot,
                            index,
                            generation,
                            lease,
                        } => match clean(&mut kernel, &config, slot, index, generation, lease) {
                            Ok(index) => Done::Cleaned { slot, index },
                            Err(error) => Done::NotCleaned { slot, error },
                        },
                        Job::Grow(from, to) => grow(&mut kernel, &config, from, to),
                    };
                    if report.send(result).is_err() || signal.write(1).is_err() {
                        return;
                    }
                }
            })?;
        started.wait();
        Ok(Cleaner {
            jobs,
            done,
            wake,
            port,
        })
    }

    pub(crate) fn submit(&self, job: Job) -> io::Result<()> {
        self.jobs
            .send(job)
            .map_err(|_| io::Error::other("the cleaning thread is gone"))
    }

    /// Readable when something is done.
    pub(crate) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(crate) fn woken(&self) {
        let _ = self.wake.read();
    }
}

fn grow(k: &mut Kernel, config: &Config, from: Slot, to: Slot) -> Done {
    let mut made = Vec::new();
    for slot in from..to {
        match apply::create(k, config, slot..slot + 1) {
            Ok(one) => made.extend(one),
            Err(error) => {
                return Done::Grown {
                    made,
                    error: Some(error),
                };
            }
        }
    }
    Done::Grown { made, error: None }
}

/// Closes the slot's way out, proves that nobody holds its device, and forgets
/// its flows. Returns the device's index, a new one if there was any doubt.
fn clean(
    k: &mut Kernel,
    config: &Config,
    slot: Slot,
    index: u32,
    generation: Generation,
    lease: Option<LeaseTag>,
) -> io::Result<u32> {
    if let Some(l) = lease {
        let element = Element {
            slot,
            index,
            class: l.class,
            streams: l.kind.has_streams(),
        };
        ruleset::remove_lease(k, config, element)?;
    }
    let tag = Tag {
        generation,
        lease: None,
    };
    // While we hold it nobody can send through it, so no flow can begin again.
    let (held, index) = match hold(k, config, slot, index) {
        Some(tun) => {
            link::set_alias(&mut k.route, index, &tag.to_alias())?;
            link::drop_host6(&mut k.route, index, plan::hosts(config, slot).1);
            (Some(tun), index)
        }
        None => (None, apply::recreate(k, config, slot, index, tag)?),
    };
    forget(k, slot)?;
    drop(held);
    Ok(index)
}

/// Attaches once every former descriptor is closed; `None` when there is any doubt about the device.
fn hold(
    k: &mut Kernel,
    config: &Config,
    slot: Slot,
    index: u32,
) -> Option<crate::kernel::tun::Tun> {
    if index == 0 {
        return None;
    }
    let deadline = Instant::now() + LET_GO;
    let tun = loop {
        match apply::attach(k, config, slot, index) {
            Ok((tun, _)) => break tun,
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                thread::sleep(PROBE)
            }
            Err(_) => return None,
        }
    };
    let l = link::get(&mut k.route, index).ok()?;
    let whole =
        apply::is_sound(config, &l) && apply::addressed(k, config, slot, index, false).ok()?;
    whole.then_some(tun)
}

fn forget(k: &mut Kernel, slot: Slot) -> io::Result<()> {
    let mark = plan::mark(slot, 0);
    for _ in 0..FLUSHES {
        conntrack::flush(&mut k.filter, mark, plan::MARK_SLOT_MASK)?;
        if conntrack::count(&mut k.filter, mark, plan::MARK_SLOT_MASK)? == 0 {
            return Ok(());
        }
    }
    Err(io::Error::other(format!(
        "flows of {} remain after {FLUSHES} flushes",
        plan::device_name(slot)
    )))
}
