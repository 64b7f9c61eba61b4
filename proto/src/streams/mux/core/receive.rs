//! What arrives, and what of it is no offence.

use std::collections::VecDeque;

use super::super::Fault;
use super::super::frame::{Header, INITIAL_WINDOW, Kind, LEN, flag};
use super::super::slot::Slot;
use super::{CREDIT_MOST, Core, PONGS, Reading, START};

impl Core {
    pub(in crate::streams::mux) fn receive(&mut self, mut bytes: &[u8]) -> Result<(), Fault> {
        while !bytes.is_empty() {
            if self.over {
                return Ok(());
            }
            match &mut self.reading {
                Reading::Head { bytes: head, have } => {
                    let n = bytes.len().min(LEN - *have);
                    head[*have..*have + n].copy_from_slice(&bytes[..n]);
                    *have += n;
                    bytes = &bytes[n..];
                    if *have == LEN {
                        let header = Header::read(*head).ok_or(Fault::Header)?;
                        self.reading = START;
                        self.frame(header)?;
                    }
                }
                Reading::Body { stream, left, end } => {
                    let n = bytes.len().min(*left);
                    let (id, end) = (*stream, *end);
                    *left -= n;
                    let done = *left == 0;
                    if done {
                        self.reading = START;
                    }
                    self.data(id, &bytes[..n]);
                    if done && end {
                        self.finished(id);
                    }
                    bytes = &bytes[n..];
                }
            }
        }
        Ok(())
    }

    fn frame(&mut self, header: Header) -> Result<(), Fault> {
        let id = header.stream;
        match header.kind {
            Kind::Ping => return self.ping(header),
            Kind::GoAway => {
                self.going = true;
                return Ok(());
            }
            Kind::Data | Kind::Window => {}
        }
        if header.has(flag::RST) {
            return self.peer_reset(header);
        }
        if header.has(flag::SYN) {
            self.peer_opens(id)?;
        }
        if !self.was_opened(id) {
            return Err(Fault::Stream(id));
        }
        match header.kind {
            Kind::Data => self.begin_data(header),
            _ => self.granted(header),
        }
    }

    fn ping(&mut self, header: Header) -> Result<(), Fault> {
        if header.stream != 0 {
            return Err(Fault::Stream(header.stream));
        }
        if header.has(flag::SYN) {
            self.pongs += 1;
            if self.pongs > PONGS {
                return Err(Fault::Flood);
            }
            self.say(Header {
                flags: flag::ACK,
                ..header
            });
        }
        Ok(())
    }

    fn peer_reset(&mut self, header: Header) -> Result<(), Fault> {
        let id = header.stream;
        if !self.was_opened(id) {
            return Err(Fault::Stream(id));
        }
        if header.kind == Kind::Data && header.length > 0 {
            return Err(Fault::AfterEnd(id));
        }
        if let Some(left) = self.graves.get_mut(&id) {
            // It will send nothing more.
            *left = 0;
        }
        let Some(slot) = self.slots.get_mut(&id) else {
            return Ok(());
        };
        slot.reset = true;
        slot.granted = 0;
        slot.waiting = VecDeque::new();
        if !slot.peer_finished {
            self.unread -= slot.unread.len();
            slot.unread = VecDeque::new();
        }
        slot.wake_both(&mut self.due);
        if slot.left {
            self.bury(id);
        }
        Ok(())
    }

    fn peer_opens(&mut self, id: u32) -> Result<(), Fault> {
        let refused = self.limits.accepted == 0 || id == 0;
        if refused || self.ours(id) || id <= self.peer_last {
            return Err(Fault::Opening(id));
        }
        self.peer_last = id;
        if self.going || self.accepted >= self.limits.accepted {
            self.remember(id, INITIAL_WINDOW);
            self.say(Header {
                kind: Kind::Data,
                flags: flag::RST,
                stream: id,
                length: 0,
            });
            return Ok(());
        }
        self.accepted += 1;
        self.slots.insert(id, Slot::new(false));
        self.arrivals.push_back(id);
        self.due.extend(self.acceptor.take());
        self.make_ready(id);
        Ok(())
    }

    fn begin_data(&mut self, header: Header) -> Result<(), Fault> {
        let (id, length) = (header.stream, header.length);
        match self.slots.get_mut(&id) {
            // Cut off here, and the other side may not know yet.
            Some(slot) => {
                let ended = slot.peer_finished || (slot.reset && slot.granted == 0);
                if ended && length > 0 {
                    return Err(Fault::AfterEnd(id));
                }
                slot.granted = slot.granted.checked_sub(length).ok_or(Fault::Window(id))?;
            }
            None => match self.graves.get_mut(&id) {
                Some(left) if *left >= length => *left -= length,
                None if length == 0 => {}
                _ => return Err(Fault::Stream(id)),
            },
        }
        let end = header.has(flag::FIN);
        match length {
            0 if end => self.finished(id),
            0 => {}
            _ => {
                self.reading = Reading::Body {
                    stream: id,
                    left: length as usize,
                    end,
                };
            }
        }
        Ok(())
    }

    fn data(&mut self, id: u32, bytes: &[u8]) {
        let crowded = self.unread + bytes.len() > self.limits.unread;
        let Some(slot) = self.slots.get_mut(&id) else {
            return;
        };
        if slot.reset || slot.left {
            return;
        }
        if crowded && slot.unread.len() + bytes.len() > self.limits.share {
            // Somebody has to give way, and this one is among the slowest.
            self.cut(id);
            return;
        }
        slot.keep(bytes);
        self.unread += bytes.len();
        self.due.extend(slot.reader.take());
    }

    /// The other side has no more to say on a stream.
    fn finished(&mut self, id: u32) {
        match self.slots.get_mut(&id) {
            Some(slot) => {
                slot.peer_finished = true;
                self.due.extend(slot.reader.take());
                self.settle(id);
            }
            None => {
                if let Some(left) = self.graves.get_mut(&id) {
                    *left = 0;
                }
            }
        }
    }

    fn granted(&mut self, header: Header) -> Result<(), Fault> {
        let id = header.stream;
        let Some(slot) = self.slots.get_mut(&id) else {
            return Ok(());
        };
        let credit = slot.credit.checked_add(header.length);
        slot.credit = credit
            .filter(|c| *c <= CREDIT_MOST)
            .ok_or(Fault::Window(id))?;
        self.make_ready(id);
        if header.has(flag::FIN) {
            self.finished(id);
        }
        Ok(())
    }
}
