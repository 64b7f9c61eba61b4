//! A session's two directions, which may be used at the same time.

use std::collections::VecDeque;

use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use rvpn_proto::record::{MESSAGE_LIMIT, Offload, Reader, append};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::{self, Bytes, Message};

use super::{Closed, Socket, Speech};
use crate::PATIENCE;

/// The client's way out.
pub struct Sender {
    pub(super) speech: Speech,
    pub(super) sink: SplitSink<Socket, Message>,
}

impl Sender {
    /// A packet in a message of its own.
    pub async fn send(&mut self, packet: &[u8]) {
        self.feed(packet, Offload::NONE).await;
        self.flush().await;
    }

    /// The same without waiting for it to leave.
    pub async fn feed(&mut self, packet: &[u8], offload: Offload) {
        let message = self.wrap(packet, offload);
        self.sink.feed(message).await.expect("send");
    }

    pub async fn flush(&mut self) {
        self.sink.flush().await.expect("send");
    }

    /// Several packets, in as few messages as this client may.
    pub async fn feed_all(&mut self, packets: &[Vec<u8>]) {
        if !matches!(self.speech, Speech::Native { .. }) {
            for packet in packets {
                self.feed(packet, Offload::NONE).await;
            }
            return;
        }
        let mut message = Vec::new();
        for packet in packets {
            if message.len() + 8 + packet.len() > MESSAGE_LIMIT {
                let full = Message::binary(std::mem::take(&mut message));
                self.sink.feed(full).await.expect("send");
            }
            append(&mut message, packet, Offload::NONE).expect("a packet");
        }
        self.sink
            .feed(Message::binary(message))
            .await
            .expect("send");
    }

    /// Any message at all.
    pub async fn message(&mut self, message: Message) {
        self.sink.send(message).await.expect("send");
    }

    /// The same, of a connection that may be gone.
    pub async fn try_message(&mut self, message: Message) -> Result<(), tungstenite::Error> {
        self.sink.send(message).await
    }

    /// What goes around a packet.
    pub fn wrap(&self, packet: &[u8], offload: Offload) -> Message {
        match self.speech {
            Speech::Native { .. } => {
                let mut message = Vec::with_capacity(packet.len() + 8);
                append(&mut message, packet, offload).expect("a packet");
                Message::binary(message)
            }
            Speech::Raw | Speech::Text4 | Speech::Text46 => Message::binary(packet.to_vec()),
            Speech::Padded => {
                let length = u16::try_from(packet.len()).expect("a short packet");
                assert!(length < 0x8000, "a short packet");
                let mut message = (0x8000 | length).to_be_bytes().to_vec();
                message.extend(packet);
                // A padding that differs from packet to packet.
                message.resize(message.len() + usize::from(length % 3), 0);
                Message::binary(message)
            }
        }
    }
}

/// The client's way in.
pub struct Receiver {
    pub(super) speech: Speech,
    pub(super) stream: SplitStream<Socket>,
    pub(super) waiting: VecDeque<(Bytes, Offload)>,
    pub(super) padding: Vec<usize>,
    pub(super) noise: Vec<usize>,
}

/// What came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Packet(Bytes, Offload),
    Text(String),
    Noise,
    /// A WebSocket ping; it is answered.
    Ping,
    Closed(Closed),
}

impl Receiver {
    /// Whatever comes next.
    pub async fn event(&mut self) -> Event {
        match timeout(PATIENCE, self.wait()).await {
            Ok(event) => event,
            Err(_) => panic!("{:?}: nothing came within {PATIENCE:?}", self.speech),
        }
    }

    /// The same without an end.
    pub async fn wait(&mut self) -> Event {
        loop {
            if let Some((packet, offload)) = self.waiting.pop_front() {
                return Event::Packet(packet, offload);
            }
            match self.stream.next().await {
                None => return broken("the end of the connection"),
                Some(Err(e)) => return broken(&e.to_string()),
                Some(Ok(Message::Text(text))) => return Event::Text(text.to_string()),
                Some(Ok(Message::Ping(_))) => return Event::Ping,
                Some(Ok(Message::Pong(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Close(frame))) => {
                    let (code, reason) = frame.map_or((1005, String::new()), |frame| {
                        (frame.code.into(), frame.reason.to_string())
                    });
                    return Event::Closed(Closed { code, reason });
                }
                Some(Ok(Message::Binary(data))) => {
                    if let Some(event) = self.unwrap(data) {
                        return event;
                    }
                }
            }
        }
    }

    fn unwrap(&mut self, data: Bytes) -> Option<Event> {
        match self.speech {
            Speech::Native { .. } => {
                for record in Reader::new(&data) {
                    let record = record.unwrap_or_else(|e| panic!("{e}"));
                    let packet = data.slice_ref(record.packet);
                    self.waiting.push_back((packet, record.offload));
                }
                None
            }
            Speech::Raw | Speech::Text4 | Speech::Text46 => {
                Some(Event::Packet(data, Offload::NONE))
            }
            Speech::Padded => {
                if data.first().is_none_or(|first| *first == 0) {
                    self.noise.push(data.len());
                    return Some(Event::Noise);
                }
                let prefix = u16::from_be_bytes([data[0], data[1]]);
                assert!(prefix & 0x8000 != 0, "a length: {data:02x?}");
                let end = 2 + usize::from(prefix & 0x7fff);
                assert!(data[end..].iter().all(|b| *b == 0), "padding: {data:02x?}");
                self.padding.push(data.len() - end);
                Some(Event::Packet(data.slice(2..end), Offload::NONE))
            }
        }
    }

    /// Padding bytes of every message of the padded dialect so far.
    pub fn padding(&self) -> &[usize] {
        &self.padding
    }

    /// Bytes of every message of noise so far.
    pub fn noise(&self) -> &[usize] {
        &self.noise
    }

    /// The next packet, past noise and control messages.
    pub async fn packet(&mut self) -> Bytes {
        self.packet_with().await.0
    }

    /// The same, and what is left to do for it.
    pub async fn packet_with(&mut self) -> (Bytes, Offload) {
        loop {
            match self.event().await {
                Event::Packet(packet, offload) => return (packet, offload),
                Event::Text(_) | Event::Noise | Event::Ping => {}
                Event::Closed(closed) => panic!("{:?}: {closed:?}", self.speech),
            }
        }
    }

    /// How it ends, past everything else.
    pub async fn closed(&mut self) -> Closed {
        loop {
            if let Event::Closed(closed) = self.event().await {
                return closed;
            }
        }
    }
}

fn broken(how: &str) -> Event {
    Event::Closed(Closed {
        code: 1006,
        reason: how.to_owned(),
    })
}
