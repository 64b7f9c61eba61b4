//! A protocol that adds nothing, to see what is around it.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use rvpn_gateway::meter::{DropReason, Totals};
use rvpn_gateway::pump::Out;
use rvpn_gateway::session::begin::{Greeting, Place, Protocol};
use rvpn_gateway::session::carriage::{Carriage, End};
use rvpn_gateway::session::drive::Patience;
use rvpn_gateway::tun::VIRTIO_LEN;
use rvpn_proto::queue::Buffer;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;

/// Longer than any test.
pub(crate) const LONG: Patience = Patience {
    silence: Duration::from_secs(60),
    ping_every: None,
};

/// A message is a packet.
pub(crate) struct Plain {
    pub(crate) patience: Patience,
    pub(crate) lingers: bool,
}

/// Four packets may wait.
pub(crate) struct PlainCarriage {
    queue: VecDeque<Vec<u8>>,
}

impl Carriage for PlainCarriage {
    fn outbound(&mut self, message: &Bytes, _from: usize, out: &mut Out<'_>) -> Result<usize, End> {
        let parts = [IoSlice::new(&[0; VIRTIO_LEN]), IoSlice::new(message)];
        let side = &mut out.totals.outbound;
        match out.tun.write(&parts) {
            Ok(()) => side.pass(1, message.len() as u64),
            Err(_) => side.drop(DropReason::Kernel, 1),
        }
        out.stride.wrote();
        Ok(message.len())
    }

    fn inbound(&mut self, read: &mut Buffer, len: usize, totals: &mut Totals, _now: Instant) {
        if self.queue.len() == 4 {
            totals.inbound.drop(DropReason::Overload, 1);
            return;
        }
        let packet = &read.packet()[..len - VIRTIO_LEN];
        self.queue.push_back(packet.to_vec());
    }

    fn message(
        &mut self,
        buffer: &mut Buffer,
        _most: usize,
        totals: &mut Totals,
        _now: Instant,
    ) -> Option<Range<usize>> {
        let packet = self.queue.pop_front()?;
        totals.inbound.pass(1, packet.len() as u64);
        buffer.bytes_mut()[..packet.len()].copy_from_slice(&packet);
        Some(0..packet.len())
    }

    fn due(&self) -> Option<Instant> {
        None
    }

    fn text(&mut self, text: &str, _totals: &mut Totals) -> Result<Option<Message>, End> {
        match text {
            "goodbye" => Err(End::Goodbye),
            other => Ok(Some(Message::text(other.to_uppercase()))),
        }
    }
}

impl Protocol for Plain {
    type Carriage = PlainCarriage;

    fn service(&self) -> &'static str {
        "packets"
    }

    fn patience(&self) -> Patience {
        self.patience
    }

    fn welcome(&mut self, place: &Place) -> io::Result<(Vec<Greeting>, PlainCarriage)> {
        let (v4, v6) = place.inner_pair();
        let hello = format!("{v4} {v6} {}", place.ticket.clone().unwrap_or_default());
        let queue = VecDeque::new();
        Ok((vec![Message::text(hello).into()], PlainCarriage { queue }))
    }

    fn farewell(&self, code: u16, _: &str, retry_after: Option<Duration>) -> Option<Message> {
        Some(Message::text(format!("{code} {retry_after:?}")))
    }

    fn lingers(&self) -> bool {
        self.lingers
    }
}
