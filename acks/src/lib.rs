//! Bare acknowledgements, written to TUN devices on a thread of their own.
//!
//! What a write to a TUN costs is what it sets off. An acknowledgement lets
//! the kernel send the next stretch of a stream, through its tables and as far
//! as the next queue, all of it before the call returns: tens of microseconds
//! in which whoever wrote it could have encrypted what came before. Given away,
//! that happens beside it.
//!
//! Only what acknowledges, carries nothing and leaves the other end room to send
//! goes this way. One that something else has overtaken then says less than was
//! known already; of one that closes a window that would not be so. What
//! the thread has no room for is written by whoever wanted to give it away. The
//! channel takes a lock only to wake the thread from its sleep.

use std::fs::File;
use std::io::{self, Write as _};
use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

/// The longest packet that is taken, with what the device wants before it:
/// virtio header, IPv6 and TCP with all the options there is room for.
pub const ROOM: usize = 110;
/// So many wait at most. At the rate of one busy core they are gone within
/// milliseconds.
const SLOTS: usize = 256;
/// And so many of one device, so that there is room for others.
const SHARE: usize = SLOTS / 2;

/// How often [`Aside::look`] is to be called.
pub const LOOK: Duration = Duration::from_millis(50);

/// The thread. It ends with the last of its lanes, after what was given to them.
#[derive(Clone, Debug)]
pub struct Writer {
    to: SyncSender<Ack>,
}

/// The way of one device's acknowledgements.
#[derive(Debug)]
pub struct Lane {
    to: SyncSender<Ack>,
    device: Arc<Device>,
    told: Written,
}

/// A device whose acknowledgements go aside while there is much to do.
#[derive(Debug, Default)]
pub struct Aside {
    lane: Option<Lane>,
    /// Not while it is being closed, else there would always be something under way.
    gives: bool,
    /// There was much to do since the last look.
    busy: bool,
    /// What lanes that are closed did last.
    rest: Written,
}

/// What became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Written.
    pub packets: u64,
    /// Their bytes, without what the device wants before each.
    pub bytes: u64,
    /// Not liked by the kernel.
    pub refused: u64,
    /// Lost because the interface was down, or gone.
    pub down: u64,
}

#[derive(Debug)]
struct Device {
    file: File,
    packets: AtomicU64,
    bytes: AtomicU64,
    refused: AtomicU64,
    down: AtomicU64,
}

#[derive(Debug)]
struct Ack {
    device: Arc<Device>,
    /// Of what is written, and of the packet in it.
    lengths: (u8, u8),
    bytes: [u8; ROOM],
}

impl Writer {
    /// Starts a thread of this name. It sleeps while there is nothing to write.
    pub fn start(name: &str) -> io::Result<Writer> {
        let (to, from) = sync_channel(SLOTS);
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || write_all(&from))?;
        Ok(Writer { to })
    }

    /// A lane to a device that does not block.
    pub fn lane(&self, device: File) -> Lane {
        Lane {
            to: self.to.clone(),
            device: Arc::new(Device {
                file: device,
                packets: AtomicU64::new(0),
                bytes: AtomicU64::new(0),
                refused: AtomicU64::new(0),
                down: AtomicU64::new(0),
            }),
            told: Written::default(),
        }
    }
}

impl Lane {
    /// Gives one away: what the device wants before the packet, and the packet.
    /// If not, it is still to be written.
    #[must_use]
    pub fn give(&self, before: &[u8], packet: &[u8]) -> bool {
        let length = before.len() + packet.len();
        // Each that waits refers to the device.
        if length > ROOM || Arc::strong_count(&self.device) > SHARE {
            return false;
        }
        let mut bytes = [0; ROOM];
        bytes[..before.len()].copy_from_slice(before);
        bytes[before.len()..length].copy_from_slice(packet);
        let ack = Ack {
            device: Arc::clone(&self.device),
            // Neither is above ROOM.
            lengths: (length as u8, packet.len() as u8),
            bytes,
        };
        self.to.try_send(ack).is_ok()
    }

    /// Whether all that was given is written, and the device nobody else's any more.
    pub fn is_idle(&mut self) -> bool {
        // Unlike the number of references this also shows what was counted last.
        Arc::get_mut(&mut self.device).is_some()
    }

    /// What was written since it was asked last.
    pub fn written(&mut self) -> Written {
        let device = &self.device;
        let now = Written {
            packets: device.packets.load(Relaxed),
            bytes: device.bytes.load(Relaxed),
            refused: device.refused.load(Relaxed),
            down: device.down.load(Relaxed),
        };
        let told = std::mem::replace(&mut self.told, now);
        Written {
            packets: now.packets - told.packets,
            bytes: now.bytes - told.bytes,
            refused: now.refused - told.refused,
            down: now.down - told.down,
        }
    }
}

impl Aside {
    /// There is much to do: from now on, until a look finds that there was not.
    pub fn open(&mut self, writer: &Writer, device: impl FnOnce() -> io::Result<File>) {
        if self.lane.is_none() {
            // Without it they are written by whoever has them.
            self.lane = device().ok().map(|device| writer.lane(device));
        }
        self.gives = true;
        self.busy = true;
    }

    /// Whether it is to be looked after.
    pub fn is_open(&self) -> bool {
        self.lane.is_some()
    }

    /// As [`Lane::give`].
    #[must_use]
    pub fn give(&self, before: &[u8], packet: &[u8]) -> bool {
        let lane = self.lane.as_ref().filter(|_| self.gives);
        lane.is_some_and(|lane| lane.give(before, packet))
    }

    /// Ends it if there was not much to do since the last look.
    pub fn look(&mut self) {
        if !std::mem::take(&mut self.busy) {
            self.close();
        }
    }

    /// Takes no more, and lets go of the device if nothing is under way.
    pub fn close(&mut self) {
        self.gives = false;
        if self.lane.as_mut().is_some_and(Lane::is_idle) {
            self.drop_lane();
        }
    }

    /// Lets go of the device although something may be under way, which is then
    /// not counted. Whether something was.
    pub fn abandon(&mut self) -> bool {
        self.close();
        let abandoned = self.is_open();
        self.drop_lane();
        abandoned
    }

    fn drop_lane(&mut self) {
        if let Some(mut lane) = self.lane.take() {
            self.rest += lane.written();
        }
    }

    /// What was written since it was asked last.
    pub fn written(&mut self) -> Written {
        let mut written = std::mem::take(&mut self.rest);
        if let Some(lane) = &mut self.lane {
            written += lane.written();
        }
        written
    }
}

impl AddAssign for Written {
    fn add_assign(&mut self, more: Written) {
        self.packets += more.packets;
        self.bytes += more.bytes;
        self.refused += more.refused;
        self.down += more.down;
    }
}

fn write_all(from: &Receiver<Ack>) {
    for ack in from {
        ack.write();
    }
}

impl Ack {
    fn write(&self) {
        let Ack {
            device,
            lengths: (length, packet),
            bytes,
        } = self;
        let written = loop {
            match (&device.file).write(&bytes[..usize::from(*length)]) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                written => break written,
            }
        };
        let count = match written.map_err(|e| e.raw_os_error()) {
            Ok(_) => {
                add(&device.bytes, (*packet).into());
                &device.packets
            }
            Err(Some(libc::EIO | libc::EBADFD)) => &device.down,
            Err(_) => &device.refused,
        };
        add(count, 1);
    }
}

/// Only the writing thread does that.
fn add(count: &AtomicU64, more: u64) {
    count.store(count.load(Relaxed) + more, Relaxed);
}
