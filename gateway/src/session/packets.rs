//! Packets of the native protocol: records in messages.

use std::net::{Ipv4Addr, Ipv6Addr};

use bytes::{Bytes, BytesMut};
use rvpn_proto::record::{HEADER_LEN, Reader, header};
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;

use super::control::Desk;
use super::drive::{Carriage, End};
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

    fn inbound(&mut self, read: &mut [u8], totals: &mut Totals, now: Instant) {
        self.pump.inbound(read, totals, now);
    }

    fn message(
        &mut self,
        buffer: &mut BytesMut,
        most: usize,
        totals: &mut Totals,
        now: Instant,
    ) -> bool {
        let mut used = 0;
        while let Some(waiting) = self.pump.next_len(now) {
            let body = used + HEADER_LEN;
            if used > 0 && body + waiting.remaining > most {
                break;
            }
            // The buffer keeps its length between messages, so this seldom fills it.
            if buffer.len() < body + waiting.whole {
                buffer.resize(body + waiting.whole, 0);
            }
            let taken = self.pump.take(&mut buffer[body..], most, totals);
            let Some((len, offload)) = taken else {
                continue;
            };
            let Ok(header) = header(len, offload) else {
                continue;
            };
            buffer[used..body].copy_from_slice(&header);
            used = body + len;
        }
        if used == 0 {
            // Not cut, see above.
            return false;
        }
        buffer.truncate(used);
        true
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
