//! The device, and what waits to leave from it: all that outlives a connection.

use std::fs::File;
use std::io::{self, IoSlice, Read as _, Write as _};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::task::{Context, Poll, ready};
use std::thread::available_parallelism;
use std::time::Duration;

use rvpn_acks::{Aside, Writer};
use rvpn_proto::gso::{VIRTIO_LEN, rebuild, shorten, size, trim};
use rvpn_proto::packet::{Parsed, parse};
use rvpn_proto::queue::{Buffer, Next, Queue, Settings};
use rvpn_proto::record::{HEADER_LEN, Offload, header};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::End;
use crate::up::fd::watch;
use crate::up::wire::Way;

const MAX_READ: usize = VIRTIO_LEN + 65_535;

/// The device, as the other half passed it.
pub(crate) struct Device {
    fd: AsyncFd<File>,
    /// For acknowledgements, while there is much to do.
    pub(super) aside: Aside,
    /// Who writes them, once that was tried: nobody on a single processor.
    writer: Option<Option<Writer>>,
}

impl Device {
    /// Takes the descriptor.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Device> {
        let interest = Interest::READABLE | Interest::ERROR;
        Ok(Device {
            fd: watch(fd, interest)?,
            aside: Aside::default(),
            writer: None,
        })
    }

    /// Has acknowledgements written by another thread while there is much to do,
    /// as there is now, if there is a processor for it.
    pub(super) fn open_aside(&mut self) {
        let writer = self.writer.get_or_insert_with(|| {
            let spare = available_parallelism().is_ok_and(|n| n.get() > 1);
            spare.then(|| Writer::start("rvpn-acks").ok()).flatten()
        });
        if let Some(writer) = writer {
            let fd = &self.fd;
            self.aside.open(writer, || fd.get_ref().try_clone());
        }
    }

    /// Brings what that thread has done into the count.
    pub(super) fn count_aside(&mut self, count: &mut Way) {
        let written = self.aside.written();
        count.packets += written.packets;
        count.payload += written.bytes;
        count.dropped += written.refused + written.down;
    }

    pub(super) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(cx))?;
            match guard.try_io(|fd| fd.get_ref().read(buffer)) {
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    /// What may have come since the device was last found empty, which the
    /// runtime would tell only later.
    pub(super) fn read_now(&self, buffer: &mut [u8]) -> Result<Option<usize>, End> {
        match self.fd.get_ref().read(buffer) {
            Ok(n) => Ok(Some(n)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(End::Device(error)),
        }
    }

    /// One packet to the device, in two parts, of which the first is changed.
    pub(super) fn write(
        &self,
        head: &mut [u8],
        rest: &[u8],
        parsed: &Parsed,
        offload: Offload,
        count: &mut Way,
    ) -> Result<(), End> {
        let (packets, bytes) = size(parsed, offload);
        let Ok(virtio) = rebuild(head, parsed, offload) else {
            count.dropped += packets;
            return Ok(());
        };
        let virtio = virtio.to_bytes();
        // Counted when it is written.
        if parsed.is_bare_ack(head) && self.aside.give(&virtio, head) {
            return Ok(());
        }
        let parts = [
            IoSlice::new(&virtio),
            IoSlice::new(head),
            IoSlice::new(rest),
        ];
        match self.fd.get_ref().write_vectored(&parts) {
            Ok(_) => {
                count.packets += packets;
                count.payload += bytes;
            }
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => {
                return Err(End::Device(error));
            }
            // This packet only: the device is down, or the kernel short of memory.
            Err(_) => count.dropped += packets,
        }
        Ok(())
    }
}

/// What lives longer than a connection.
pub(crate) struct Carrier {
    pub(super) device: Device,
    pub(super) queue: Queue,
    begun: Instant,
    pub(super) read: Buffer,
    pub(super) message: Buffer,
    /// Takes several datagrams as one packet.
    pub(crate) datagrams: bool,
    /// What is being joined.
    pub(super) packet: Box<[u8]>,
    /// What was carried so far.
    pub(crate) outbound: Way,
    /// And the other way.
    pub(crate) inbound: Way,
    /// Round trip of the last ping.
    pub(crate) rtt: Option<Duration>,
}

impl Carrier {
    /// For a device.
    pub(crate) fn new(device: Device, datagrams: bool, key: [u64; 2]) -> Carrier {
        Carrier {
            device,
            queue: Queue::new(Settings::default(), key),
            begun: Instant::now(),
            read: Buffer::new(),
            message: Buffer::new(),
            datagrams,
            packet: vec![0; MAX_READ].into(),
            outbound: Way::default(),
            inbound: Way::default(),
            rtt: None,
        }
    }

    pub(super) fn micros(&self, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.begun).as_micros();
        u64::try_from(passed).unwrap_or(u64::MAX)
    }

    /// Makes the next message of what waits, and says where it lies.
    pub(super) fn build(&mut self, most: usize, now: Instant) -> Option<Range<usize>> {
        let micros = self.micros(now);
        let (queue, buffer) = (&mut self.queue, &mut self.message);
        // The first packet has its place, and its record's header fits before it.
        let begin = Buffer::ROOM - HEADER_LEN;
        let mut end = begin;
        while let Some(next) = queue.next(micros) {
            let body = end + HEADER_LEN;
            let taken = if end == begin {
                queue.take_buffer(buffer, most)
            } else if body - begin + next.remaining() > most {
                break;
            } else {
                // None if there is no room.
                let room = buffer.bytes_mut().get_mut(body..body + next.len);
                room.and_then(|room| queue.take_part(room, most))
            };
            let Some(next) = taken else {
                break;
            };
            let packet = &mut buffer.bytes_mut()[body..body + next.len];
            let Some((length, offload)) = part(packet, &next) else {
                self.outbound.dropped += 1;
                continue;
            };
            let Ok(head) = header(length, offload) else {
                self.outbound.dropped += 1;
                continue;
            };
            if let Ok(parsed) = parse(&packet[..length]) {
                let (packets, bytes) = size(&parsed, offload);
                self.outbound.packets += packets;
                self.outbound.payload += bytes;
            }
            buffer.bytes_mut()[end..body].copy_from_slice(&head);
            end = body + length;
        }
        (end > begin).then_some(begin..end)
    }
}

/// Cuts the segments off that waited too long and those that go later. Its
/// length and what is left to do.
fn part(packet: &mut [u8], next: &Next) -> Option<(usize, Offload)> {
    if next.cut == 0 && next.rest == 0 {
        return Some((packet.len(), next.meta.offload));
    }
    let mut left = (parse(packet).ok()?, next.meta.offload);
    if next.rest > 0 {
        left = shorten(packet, &left.0, left.1, next.rest).ok()?;
    }
    if next.cut > 0 {
        left = trim(packet, &left.0, left.1, next.cut).ok()?;
    }
    Some((left.0.len(), left.1))
}
