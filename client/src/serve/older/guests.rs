//! All visitors of one connection of the older protocol.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rvpn_proto::packer::{Decoder, Frame, Piece, Profile, Word};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;

use super::super::visit::News;
use super::visitor::{self, Guest, Local, Speaks};

/// Visitors at once.
const VISITORS: usize = 1024;
/// Visitors that are over and remembered until the gateway says so too.
const REMEMBERED: usize = 4096;
/// How long a visitor's server may hold up the others.
const PATIENT: Duration = Duration::from_secs(1);

/// Visitors of one connection.
pub(super) struct Guests {
    pub(super) out: mpsc::Sender<Message>,
    pub(super) locals: Arc<[Local]>,
    pub(super) news: mpsc::Sender<News>,
    pub(super) by_id: HashMap<String, Guest>,
    /// Those that are over here, and for whom something may still come.
    pub(super) over: HashSet<String>,
    /// Who has more than it should, and since when.
    pub(super) full: Option<(String, Instant)>,
}

impl Guests {
    /// Takes a message's bytes.
    pub(super) fn take(&mut self, decoder: &mut Decoder, mut data: &[u8]) -> Result<(), String> {
        while let Some(piece) = decoder.next(&mut data).map_err(|f| f.to_string())? {
            match piece {
                Piece::Data { head, bytes, .. } => self.data(head.id, head.word, bytes),
                Piece::Word { head, body } => match head.word {
                    Word::Control => self.control(body),
                    Word::End => {
                        self.over.remove(head.id);
                        if let Some(guest) = self.by_id.get_mut(head.id) {
                            guest.end();
                        }
                    }
                    Word::Error => {
                        self.over.remove(head.id);
                        self.by_id.remove(head.id);
                    }
                    Word::Pause => self.hold(head.id, true),
                    Word::Resume => self.hold(head.id, false),
                    // Servers that speak first are not for these clients.
                    Word::Connection | Word::Data(_) => {}
                },
            }
        }
        Ok(())
    }

    /// Forgets those that are over.
    fn tidy(&mut self) {
        let over = &mut self.over;
        self.by_id.retain(|id, guest| {
            if guest.is_over() && !guest.ended && over.len() < REMEMBERED {
                over.insert(id.clone());
            }
            !guest.is_over()
        });
    }

    /// Goes on if the one that was full is not any more, or has been for too long.
    pub(super) fn relieve(&mut self) {
        let Some((id, since)) = &self.full else {
            return;
        };
        let guest = self.by_id.get(id);
        if let Some(guest) = guest.filter(|g| g.is_full()) {
            if since.elapsed() < PATIENT {
                return;
            }
            guest.cut_off();
        }
        self.full = None;
    }

    fn hold(&self, id: &str, on: bool) {
        if let Some(guest) = self.by_id.get(id) {
            guest.hold(on);
        }
    }

    /// Answers what is asked; what is told is of no use here.
    fn control(&self, body: &[u8]) {
        let Ok(Value::Array(said)) = serde_json::from_slice(body) else {
            return;
        };
        let Some(id @ 1..) = said.first().and_then(Value::as_i64) else {
            return;
        };
        let answer = json!([-id, null]).to_string();
        let mut frame = Vec::new();
        if Frame::control(answer.as_bytes())
            .encode(Profile::Node2017, &mut frame)
            .is_ok()
        {
            let _full = self.out.try_send(Message::binary(frame));
        }
    }

    fn data(&mut self, id: &str, word: Word<'_>, bytes: &[u8]) {
        if let Some(guest) = self.by_id.get(id).filter(|g| !g.is_over()) {
            if !guest.give(bytes) {
                self.full = Some((id.to_owned(), Instant::now()));
            }
            return;
        }
        self.tidy();
        if bytes.is_empty() || self.over.contains(id) {
            return;
        }
        let speaks = match word {
            Word::Data("http") => Some(Speaks::Http),
            Word::Data("https") => Some(Speaks::Https),
            _ => None,
        };
        let local = speaks.and_then(|speaks| visitor::choose(&self.locals, speaks, bytes));
        let Some((number, local)) = local.filter(|_| self.by_id.len() < VISITORS) else {
            visitor::turn_away(&self.out, id, word.as_str());
            return;
        };
        let guest = Guest::begin(
            id,
            number,
            local,
            word.as_str(),
            self.out.clone(),
            self.news.clone(),
            peer(id),
        );
        guest.give(bytes);
        self.by_id.insert(id.to_owned(), guest);
    }
}

/// Where a visitor comes from, by its id.
pub(super) fn peer(id: &str) -> SocketAddr {
    let mut parts = id.splitn(3, ',').skip(1);
    let ip = parts.next().and_then(|t| t.trim().parse().ok());
    let port = parts.next().and_then(|t| t.trim().parse().ok());
    let nowhere = std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
    SocketAddr::new(ip.unwrap_or(nowhere), port.unwrap_or(0))
}
