//! What a session wants of its protocol, and why it ends.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use rvpn_proto::queue::Buffer;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;

use super::hub::Handed;
use super::transport::Broken;
use crate::meter::Totals;
use crate::pump::Out;
use crate::pump::budget::Depth;

/// Control messages a client may send at once, and then per second.
const CONTROL_BURST: u32 = 200;
const CONTROL_PER_SECOND: u32 = 20;

/// What a protocol makes of messages and packets.
pub trait Carriage {
    /// Takes the packets of a data message from this byte on and writes them to
    /// the device, or keeps them until [`Carriage::flush`]. Says where it
    /// stopped: at the end, or where it is time to look at the device.
    fn outbound(&mut self, message: &Bytes, from: usize, out: &mut Out<'_>) -> Result<usize, End>;

    /// Writes what was kept. Called after every batch of messages.
    fn flush(&mut self, _out: &mut Out<'_>) {}

    /// Takes what one read of the device gave into the queue: so many bytes with
    /// the virtio header, which lies before the packet's place. The buffer may be
    /// another one afterwards.
    fn inbound(&mut self, read: &mut Buffer, len: usize, totals: &mut Totals, now: Instant);

    /// Makes the next data message, if anything is due, of no more than `most`
    /// bytes as far as its packets can be cut, and says where it lies in `buffer`.
    /// What that held before is of no interest, and it may be another one
    /// afterwards. Counts what it takes.
    fn message(
        &mut self,
        buffer: &mut Buffer,
        most: usize,
        totals: &mut Totals,
        now: Instant,
    ) -> Option<Range<usize>>;

    /// Brings what was dropped unseen into the totals, once a turn.
    fn tally(&mut self, _totals: &mut Totals) {}

    /// What waits for the client.
    fn depth(&self) -> Depth {
        Depth::default()
    }

    /// Gives back memory that only traffic needs. Called now and then.
    fn relax(&mut self) {}

    /// When [`Carriage::message`] has something although nothing new arrived.
    fn due(&self) -> Option<Instant>;

    /// Takes a text message. An answer is sent before waiting data.
    fn text(&mut self, text: &str, totals: &mut Totals) -> Result<Option<Message>, End>;
}

/// Why a session ends.
#[derive(Debug)]
pub enum End {
    /// The connection is gone, or so bad that nothing can be said on it.
    Lost(&'static str),
    /// The peer said that it is done.
    Goodbye,
    /// The peer did what it may not.
    Misbehaved {
        /// WebSocket close code.
        code: u16,
        /// Told to the peer.
        reason: &'static str,
    },
    /// Somebody here decided so.
    Told {
        /// WebSocket close code.
        code: u16,
        /// Told to the peer.
        reason: &'static str,
        /// When coming back makes sense.
        retry_after: Option<Duration>,
    },
    /// The client's next connection takes over.
    Replaced(oneshot::Sender<Handed>),
    /// The device is gone.
    DeviceLost,
}

impl From<Broken> for End {
    fn from(broken: Broken) -> End {
        match broken {
            Broken::Lost => End::Lost("the connection ended"),
            Broken::Protocol => End::Misbehaved {
                code: 1002,
                reason: "WebSocket protocol error",
            },
            Broken::TooBig => End::Misbehaved {
                code: 1009,
                reason: "message too big",
            },
        }
    }
}

/// Bounds what is not data: a client has little to say beside it.
#[derive(Debug)]
pub(crate) struct Bucket {
    left: u32,
    since: Instant,
}

impl Bucket {
    pub(crate) fn full(now: Instant) -> Bucket {
        Bucket {
            left: CONTROL_BURST,
            since: now,
        }
    }

    pub(crate) fn take(&mut self, now: Instant) -> Result<(), End> {
        let gained = now.saturating_duration_since(self.since).as_millis()
            * u128::from(CONTROL_PER_SECOND)
            / 1000;
        if gained > 0 {
            let gained = u32::try_from(gained).unwrap_or(CONTROL_BURST);
            self.left = self.left.saturating_add(gained).min(CONTROL_BURST);
            self.since = now;
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(End::Misbehaved {
                code: 1008,
                reason: "too many control messages",
            }),
        }
    }
}
