//! Sessions of the first gateways' clients.
//!
//! One packet a message, no control messages, and no word about who the
//! client is beside the token that was needed to get here. What differs
//! between the four is in `rvpn_proto::dialect`; here is what they share.

use std::io;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use rvpn_proto::control::close::POOL_FULL;
use rvpn_proto::dialect::{
    Body, DecodeError, Decoded, Dialect, Entropy, Incoming, Lease, POOL_FULL_REASON, Padding,
};
use rvpn_proto::queue::Buffer;
use rvpn_proto::record::Offload;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;

use crate::meter::{DropReason, Totals};
use crate::pump::budget::Depth;
use crate::pump::{Agreed, Identity, Out, Pump};
use crate::session::begin::{Greeting, Place, Protocol};
use crate::session::carriage::{Carriage, End};
use crate::session::drive::Patience;
use crate::ticket::random;

/// The least time between the answer to the upgrade and a greeting: clients
/// lose one that arrives in the same segment.
const APART: Duration = Duration::from_millis(50);
/// These clients do not ping, so we do, unless noise does it.
const PING_EVERY: Duration = Duration::from_secs(20);
const SILENCE: Duration = Duration::from_secs(60);

/// What the configuration says of one path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Older {
    /// Which of the four.
    pub dialect: Dialect,
    /// What is added to the padded one.
    pub padding: Padding,
    /// Whether the client's token allows its lease to wait for it.
    pub lingers: bool,
}

impl Protocol for Older {
    type Carriage = Plainly;

    fn service(&self) -> &'static str {
        self.dialect.name()
    }

    fn patience(&self) -> Patience {
        Patience {
            silence: SILENCE,
            // Noise keeps a connection alive as well, and pings would show in it.
            ping_every: self.padding.noise.is_none().then_some(PING_EVERY),
        }
    }

    fn welcome(&mut self, place: &Place) -> io::Result<(Vec<Greeting>, Plainly)> {
        let lease = Lease::new(place.reply.v4, place.reply.v6).map_err(io::Error::other)?;
        let mut entropy = Mix::new()?;
        let hello = self.dialect.hello(&lease, &self.padding, &mut entropy);
        let greetings = hello.map(|hello| Greeting {
            after: hello.after.max(APART),
            message: match hello.body {
                Body::Text(text) => Message::text(text),
                Body::Binary(bytes) => Message::binary(bytes),
            },
        });
        let client = lease.client();
        let identity = match (self.dialect.any_source(), client.v6) {
            (true, _) => Identity::AnySource {
                base: place.reply.v4,
            },
            (false, Some(v6)) if self.dialect.carries_v6() => Identity::Own {
                v4: client.v4,
                v6: Some(v6),
            },
            (false, _) => Identity::Own {
                v4: client.v4,
                v6: None,
            },
        };
        let key = [entropy.bits(), entropy.bits()];
        let agreed = Agreed {
            mtu: place.reply.mtu,
            offload: false,
            device: place.reply.offload,
        };
        let now = Instant::now();
        let carriage = Plainly {
            noise_at: self.padding.pause(&mut entropy).map(|p| now + p),
            pump: Pump::new(&identity, agreed, key),
            dialect: self.dialect,
            padding: self.padding,
            entropy,
        };
        Ok((greetings.into_iter().collect(), carriage))
    }

    fn farewell(&self, _: u16, _: &str, _: Option<Duration>) -> Option<Message> {
        None
    }

    fn close_reason(&self, code: u16, reason: &'static str) -> &'static str {
        if code == POOL_FULL {
            POOL_FULL_REASON
        } else {
            reason
        }
    }

    fn lingers(&self) -> bool {
        self.lingers
    }
}

/// One older client's packets.
pub struct Plainly {
    pump: Pump,
    dialect: Dialect,
    padding: Padding,
    entropy: Mix,
    noise_at: Option<Instant>,
}

impl Carriage for Plainly {
    fn outbound(&mut self, message: &Bytes, _from: usize, out: &mut Out<'_>) -> Result<usize, End> {
        match self.dialect.decode(Incoming::Binary(message)) {
            Ok(Decoded::Packet(packet)) => self.pump.outbound(packet, Offload::NONE, out),
            Ok(Decoded::Noise) => {}
            // These clients were never told off for nonsense, and some send it.
            Err(
                DecodeError::Text
                | DecodeError::Empty
                | DecodeError::TooLong { .. }
                | DecodeError::Prefix { .. }
                | DecodeError::Short { .. },
            ) => out.totals.outbound.drop(DropReason::Malformed, 1),
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
        _most: usize,
        totals: &mut Totals,
        now: Instant,
    ) -> Option<Range<usize>> {
        while let Some(waiting) = self.pump.next_len(now) {
            let envelope =
                self.dialect
                    .envelope(waiting.remaining, &self.padding, &mut self.entropy);
            let Ok(envelope) = envelope else {
                self.pump.discard(totals);
                continue;
            };
            let Some((len, _)) = self.pump.take_buffer(buffer, usize::MAX, totals) else {
                continue;
            };
            let (begin, end) = (Buffer::ROOM - envelope.prefix().len(), Buffer::ROOM + len);
            let bytes = buffer.bytes_mut();
            bytes[begin..Buffer::ROOM].copy_from_slice(envelope.prefix());
            // The longest padded packet leaves room for the longest padding.
            let padded = bytes.len().min(end + envelope.padding);
            bytes[end..padded].fill(0);
            return Some(begin..padded);
        }
        self.noise(buffer, now)
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
        self.noise_at
    }

    fn text(&mut self, _: &str, totals: &mut Totals) -> Result<Option<Message>, End> {
        totals.outbound.drop(DropReason::Malformed, 1);
        Ok(None)
    }
}

impl Plainly {
    fn noise(&mut self, buffer: &mut Buffer, now: Instant) -> Option<Range<usize>> {
        if self.noise_at.is_none_or(|at| at > now) {
            return None;
        }
        // Noise is rare and small; a buffer of its own does no harm.
        let mut noise = Vec::new();
        let pause = self.padding.noise(&mut self.entropy, &mut noise);
        self.noise_at = pause.map(|pause| now + pause);
        buffer.bytes_mut()[..noise.len()].copy_from_slice(&noise);
        Some(0..noise.len())
    }
}

/// Random lengths and delays. They hide patterns and protect no secret, so a
/// quick generator (splitmix64) with a secret beginning is enough.
struct Mix(u64);

impl Mix {
    fn new() -> io::Result<Mix> {
        Ok(Mix(u64::from_le_bytes(random()?)))
    }
}

impl Entropy for Mix {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
