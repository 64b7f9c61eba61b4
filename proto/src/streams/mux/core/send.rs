//! What is sent, every stream in its turn.

use std::task::{Context, Poll};

use super::super::WAITING;
use super::super::frame::{Header, Kind, LEN, flag};
use super::super::slot::Slot;
use super::{Core, FRAME, keep};

impl Core {
    pub(super) fn say(&mut self, header: Header) {
        self.control.push_back(header);
        self.driver_due = true;
    }

    pub(super) fn make_ready(&mut self, id: u32) {
        if let Some(slot) = self.slots.get_mut(&id)
            && !slot.queued
            && slot.is_due()
        {
            slot.queued = true;
            self.ready.push_back(id);
            self.driver_due = true;
        }
    }

    pub(in crate::streams::mux) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        out: &mut Vec<u8>,
        limit: usize,
    ) -> Poll<()> {
        let before = out.len();
        while out.len() + LEN < limit {
            if let Some(header) = self.control.pop_front() {
                if header.kind == Kind::Ping {
                    self.pongs = self.pongs.saturating_sub(1);
                }
                out.extend_from_slice(&header.to_bytes());
            } else if let Some(id) = self.ready.pop_front() {
                self.send_stream(id, out, limit);
            } else {
                break;
            }
        }
        if out.len() > before {
            return Poll::Ready(());
        }
        keep(&mut self.driver, cx, &mut self.due);
        Poll::Pending
    }

    /// One turn of one stream.
    fn send_stream(&mut self, id: u32, out: &mut Vec<u8>, limit: usize) {
        let Some(slot) = self.slots.get_mut(&id) else {
            return;
        };
        slot.queued = false;
        if !slot.is_due() {
            return;
        }
        let has_data = !slot.waiting.is_empty() || (slot.finished && !slot.fin_sent);
        if slot.grant > 0 || ((slot.ack || slot.syn) && !has_data) {
            let grant = std::mem::take(&mut slot.grant);
            slot.granted += grant;
            let header = Header {
                kind: Kind::Window,
                flags: first_flags(slot),
                stream: id,
                length: grant,
            };
            out.extend_from_slice(&header.to_bytes());
        }
        let room = limit.saturating_sub(out.len() + LEN);
        let n = slot
            .waiting
            .len()
            .min(slot.credit as usize)
            .min(FRAME)
            .min(room);
        let end = slot.finished && !slot.fin_sent && n == slot.waiting.len();
        let fits = out.len() + LEN <= limit;
        if fits && (n > 0 || end) {
            let header = Header {
                kind: Kind::Data,
                flags: first_flags(slot) | if end { flag::FIN } else { 0 },
                stream: id,
                length: n as u32,
            };
            out.extend_from_slice(&header.to_bytes());
            slot.send(n, out);
            slot.credit -= n as u32;
            slot.fin_sent |= end;
            if slot.waiting.len() <= WAITING / 2 {
                self.due.extend(slot.writer.take());
            }
        }
        self.make_ready(id);
        self.settle(id);
    }
}

/// What the first frame of a stream says of it.
fn first_flags(slot: &mut Slot) -> u16 {
    let syn = if std::mem::take(&mut slot.syn) {
        flag::SYN
    } else {
        0
    };
    let ack = if std::mem::take(&mut slot.ack) {
        flag::ACK
    } else {
        0
    };
    syn | ack
}
