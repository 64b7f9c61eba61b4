//! Packets of the native protocol: records in messages.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use bytes::Bytes;
use rvpn_proto::queue::Buffer;
use rvpn_proto::record::{HEADER_LEN, Reader, header};
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;

use super::carriage::{Carriage, End};
use super::control::Desk;
use crate::meter::Totals;
use crate::pump::budget::Depth;
use crate::pump::{Agreed, Identity, Out, Pump};

/// What was agreed on with one client.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// Its addresses as it sees them.
    pub(super) inner: (Ipv4Addr, Ipv6Addr),
    /// Its addresses as the device sees them.
    pub(super) lease: (Ipv4Addr, Ipv6Addr),
    /// Largest packet without segmentation.
    pub(super) mtu: u16,
    /// Super-packets cross whole.
    pub(super) offload: bool,
    /// Which the device takes, as `TUN_F_*` bits.
    pub(super) device: u16,
}

/// One native client's packets.
pub(super) struct Packets {
    pump: Pump,
    desk: Desk,
}

impl Packets {
    pub(super) fn new(terms: Terms, desk: Desk, key: [u64; 2]) -> Packets {
        let identity = Identity::Pair {
            inner: terms.inner,
            lease: terms.lease,
        };
        let agreed = Agreed {
            mtu: terms.mtu,
            offload: terms.offload,
            device: terms.device,
        };
        Packets {
            pump: Pump::new(&identity, agreed, key),
            desk,
        }
    }
}

impl Carriage for Packets {
    fn outbound(&mut self, message: &Bytes, from: usize, out: &mut Out<'_>) -> Result<usize, End> {
        let mut reader = Reader::new(message.get(from..).unwrap_or_default());
        while let Some(record) = reader.next() {
            let Ok(record) = record else {
                return Err(End::Misbehaved {
                    code: 1008,
                    reason: "malformed record",
                });
            };
            self.pump.outbound(record.packet, record.offload, out);
            if out.stride.is_due() {
                return Ok(from + reader.position());
            }
        }
        Ok(message.len())
    }

    fn flush(&mut self, out: &mut Out<'_>) {
        self.pump.flush(out);
    }

    fn inbound(&mut self, read: &mut Buffer, len: usize, totals: &mut Totals, now: Instant) {
        self.pump.inbound(read, len, totals, now);
    }

    fn message(
        &mut self,
        buffer: &mut Buffer,
        most: usize,
        totals: &mut Totals,
        now: Instant,
    ) -> Option<Range<usize>> {
        // The first packet has its place, and its record's header fits before it.
        let begin = Buffer::ROOM - HEADER_LEN;
        let mut end = begin;
        while let Some(waiting) = self.pump.next_len(now) {
            let body = end + HEADER_LEN;
            let taken = if end == begin {
                self.pump.take_buffer(buffer, most, totals)
            } else if body - begin + waiting.remaining > most {
                break;
            } else if let Some(room) = buffer.bytes_mut().get_mut(body..body + waiting.whole) {
                self.pump.take(room, most, totals)
            } else {
                break;
            };
            let Some((len, offload)) = taken else {
                continue;
            };
            let Ok(header) = header(len, offload) else {
                continue;
            };
            buffer.bytes_mut()[end..body].copy_from_slice(&header);
            end = body + len;
        }
        (end > begin).then_some(begin..end)
    }

    fn tally(&mut self, totals: &mut Totals) {
        self.pump.settle(totals);
    }

    fn depth(&self) -> Depth {
        self.pump.depth()
    }

    fn relax(&mut self) {
        self.pump.relax();
    }

    fn due(&self) -> Option<Instant> {
        None
    }

    fn text(&mut self, text: &str, totals: &mut Totals) -> Result<Option<Message>, End> {
        self.desk.text(text, totals)
    }
}
