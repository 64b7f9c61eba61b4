//! The state of one end, and what changes it.

use std::collections::{HashMap, VecDeque};
use std::task::{Context, Poll, Waker};

use super::frame::{Header, INITIAL_WINDOW, Kind, LEN, flag};
use super::handle::Broken;
use super::slot::Slot;
use super::{Fault, Limits, NotOpened, Side, WAITING};

/// Bytes of one frame, so that streams take turns.
const FRAME: usize = 16 * 1024;
/// Streams that are over and still remembered, for what is on its way to them.
const GRAVES: usize = 4096;
/// Pings that may wait for their answer.
const PONGS: usize = 16;
/// What a stream may be allowed to send in total; more is a mistake.
const CREDIT_MOST: u32 = 1 << 30;

pub(super) struct Core {
    limits: Limits,
    /// The parity of our streams, and the id of the next.
    parity: u32,
    next: u32,
    /// Of the last stream that the other side opened.
    peer_last: u32,
    slots: HashMap<u32, Slot>,
    opened: usize,
    accepted: usize,
    /// Streams that are over, and what may still arrive for them.
    graves: HashMap<u32, u32>,
    buried: VecDeque<u32>,
    arrivals: VecDeque<u32>,
    acceptor: Option<Waker>,
    /// Frames without a stream, and resets.
    control: VecDeque<Header>,
    pongs: usize,
    ready: VecDeque<u32>,
    unread: usize,
    /// Bytes by which windows have grown.
    grown: usize,
    /// What is being read.
    reading: Reading,
    driver: Option<Waker>,
    driver_due: bool,
    due: Vec<Waker>,
    /// No further streams.
    going: bool,
    /// Nothing at all.
    over: bool,
}

enum Reading {
    Head { bytes: [u8; LEN], have: usize },
    Body { stream: u32, left: usize, end: bool },
}

const START: Reading = Reading::Head {
    bytes: [0; LEN],
    have: 0,
};

impl Core {
    pub(super) fn new(side: Side, limits: Limits) -> Core {
        let parity = match side {
            Side::Client => 1,
            Side::Gateway => 0,
        };
        Core {
            limits,
            parity,
            next: 2 - parity,
            peer_last: 0,
            slots: HashMap::new(),
            opened: 0,
            accepted: 0,
            graves: HashMap::new(),
            buried: VecDeque::new(),
            arrivals: VecDeque::new(),
            acceptor: None,
            control: VecDeque::new(),
            pongs: 0,
            ready: VecDeque::new(),
            unread: 0,
            grown: 0,
            reading: START,
            driver: None,
            driver_due: false,
            due: Vec::new(),
            going: false,
            over: false,
        }
    }

    pub(super) fn streams(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn unread(&self) -> usize {
        self.unread
    }

    /// The driver, if there is something for it.
    pub(super) fn driver_due(&mut self) -> Option<Waker> {
        std::mem::take(&mut self.driver_due)
            .then(|| self.driver.take())
            .flatten()
    }

    pub(super) fn wakers_due(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.due)
    }

    fn ours(&self, id: u32) -> bool {
        id % 2 == self.parity
    }

    /// Whether there ever was a stream of this id.
    fn was_opened(&self, id: u32) -> bool {
        id != 0
            && match self.ours(id) {
                true => id < self.next,
                false => id <= self.peer_last,
            }
    }

    // What streams do.

    pub(super) fn open(&mut self) -> Result<u32, NotOpened> {
        if self.over || self.going {
            return Err(NotOpened::Gone);
        }
        if self.opened >= self.limits.opened {
            return Err(NotOpened::Full);
        }
        let id = self.next;
        self.next = id.checked_add(2).ok_or(NotOpened::Gone)?;
        self.opened += 1;
        self.slots.insert(id, Slot::new(true));
        // Its turn comes before that of any later one: ids arrive in order.
        self.make_ready(id);
        Ok(id)
    }

    pub(super) fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Option<u32>> {
        match self.arrivals.pop_front() {
            Some(id) => Poll::Ready(Some(id)),
            None if self.over => Poll::Ready(None),
            None => {
                keep(&mut self.acceptor, cx, &mut self.due);
                Poll::Pending
            }
        }
    }

    pub(super) fn poll_read(
        &mut self,
        id: u32,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<Result<usize, Broken>> {
        let over = self.over;
        let Some(slot) = self.slots.get_mut(&id) else {
            return Poll::Ready(Err(Broken::Lost));
        };
        // What the other side has finished is whole, whatever came behind it.
        let whole = slot.peer_finished;
        if slot.reset && !whole {
            return Poll::Ready(Err(Broken::Reset));
        }
        if into.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let n = slot.take(into);
        if n > 0 {
            self.unread -= n;
            self.consumed(id, n);
            return Poll::Ready(Ok(n));
        }
        if whole {
            return Poll::Ready(Ok(0));
        }
        if over {
            return Poll::Ready(Err(Broken::Lost));
        }
        keep(&mut slot.reader, cx, &mut self.due);
        Poll::Pending
    }

    /// Grants the other side what was read, once it is worth a frame. Whoever
    /// reads everything at once may have more on its way.
    fn consumed(&mut self, id: u32, n: usize) {
        let budget = self.limits.unread / 2;
        let Some(slot) = self.slots.get_mut(&id) else {
            return;
        };
        if slot.peer_finished || slot.reset {
            return;
        }
        slot.consumed += n as u32;
        if slot.consumed < slot.window / 2 {
            return;
        }
        let mut grant = std::mem::take(&mut slot.consumed);
        let more = slot
            .window
            .min(self.limits.window.saturating_sub(slot.window));
        if slot.unread.is_empty() && more > 0 && self.grown + more as usize <= budget {
            self.grown += more as usize;
            slot.window += more;
            grant += more;
        }
        slot.grant += grant;
        self.make_ready(id);
    }

    pub(super) fn poll_write(
        &mut self,
        id: u32,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, Broken>> {
        let over = self.over;
        let Some(slot) = self.slots.get_mut(&id).filter(|_| !over) else {
            return Poll::Ready(Err(Broken::Lost));
        };
        if slot.reset {
            return Poll::Ready(Err(Broken::Reset));
        }
        if slot.finished {
            return Poll::Ready(Err(Broken::Finished));
        }
        let n = bytes.len().min(slot.room());
        if n == 0 && !bytes.is_empty() {
            keep(&mut slot.writer, cx, &mut self.due);
            return Poll::Pending;
        }
        slot.waiting.extend(&bytes[..n]);
        self.make_ready(id);
        Poll::Ready(Ok(n))
    }

    pub(super) fn finish(&mut self, id: u32) -> Result<(), Broken> {
        if self.over {
            return Err(Broken::Lost);
        }
        let Some(slot) = self.slots.get_mut(&id) else {
            return Err(Broken::Lost);
        };
        if slot.reset {
            return Err(Broken::Reset);
        }
        slot.finished = true;
        self.make_ready(id);
        Ok(())
    }

    /// Nobody holds the stream any more.
    pub(super) fn leave(&mut self, id: u32) {
        let Some(slot) = self.slots.get_mut(&id) else {
            return;
        };
        slot.left = true;
        slot.reader = None;
        slot.writer = None;
        // Nobody reads it; a sender that was not done is told so in the end.
        self.unread -= slot.unread.len();
        slot.unread = VecDeque::new();
        if slot.reset || self.over {
            self.bury(id);
        } else if slot.finished {
            self.settle(id);
        } else {
            self.cut(id);
            self.bury(id);
        }
    }

    /// Ends a stream that was left and finished, when all of it was said.
    fn settle(&mut self, id: u32) {
        let Some(slot) = self.slots.get(&id) else {
            return;
        };
        if !(slot.left && slot.fin_sent) {
            return;
        }
        if !slot.peer_finished {
            self.cut(id);
        }
        self.bury(id);
    }

    /// Cuts a stream off, and tells the other side if it knows of it.
    fn cut(&mut self, id: u32) {
        let Some(slot) = self.slots.get_mut(&id) else {
            return;
        };
        if slot.reset {
            return;
        }
        slot.reset = true;
        let known = !slot.syn;
        self.unread -= slot.discard();
        slot.wake_both(&mut self.due);
        if known {
            self.say(Header {
                kind: Kind::Data,
                flags: flag::RST,
                stream: id,
                length: 0,
            });
        }
    }

    fn bury(&mut self, id: u32) {
        let Some(mut slot) = self.slots.remove(&id) else {
            return;
        };
        self.unread -= slot.discard();
        self.grown -= (slot.window - INITIAL_WINDOW) as usize;
        match self.ours(id) {
            true => self.opened -= 1,
            false => self.accepted -= 1,
        }
        let on_its_way = match slot.peer_finished {
            true => 0,
            false => slot.granted,
        };
        self.remember(id, on_its_way);
        slot.wake_both(&mut self.due);
    }

    fn remember(&mut self, id: u32, on_its_way: u32) {
        self.graves.insert(id, on_its_way);
        self.buried.push_back(id);
        if self.buried.len() > GRAVES
            && let Some(oldest) = self.buried.pop_front()
        {
            self.graves.remove(&oldest);
        }
    }

    // What arrives.

    pub(super) fn receive(&mut self, mut bytes: &[u8]) -> Result<(), Fault> {
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

    // What is sent.

    fn say(&mut self, header: Header) {
        self.control.push_back(header);
        self.driver_due = true;
    }

    fn make_ready(&mut self, id: u32) {
        if let Some(slot) = self.slots.get_mut(&id)
            && !slot.queued
            && slot.is_due()
        {
            slot.queued = true;
            self.ready.push_back(id);
            self.driver_due = true;
        }
    }

    pub(super) fn poll_send(
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

    pub(super) fn go_away(&mut self) {
        if !std::mem::replace(&mut self.going, true) {
            self.say(Header {
                kind: Kind::GoAway,
                flags: 0,
                stream: 0,
                length: 0,
            });
        }
    }

    pub(super) fn end(&mut self) {
        self.over = true;
        self.driver_due = true;
        self.control.clear();
        self.ready.clear();
        for slot in self.slots.values_mut() {
            slot.wake_both(&mut self.due);
            slot.waiting = VecDeque::new();
        }
        self.due.extend(self.acceptor.take());
        let left: Vec<u32> = self
            .slots
            .iter()
            .filter_map(|(id, slot)| slot.left.then_some(*id))
            .collect();
        for id in left {
            self.bury(id);
        }
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

/// Keeps whom to wake. One that is replaced is woken, not dropped: dropping may
/// run code that comes back here.
fn keep(place: &mut Option<Waker>, cx: &Context<'_>, due: &mut Vec<Waker>) {
    match place {
        Some(waker) if waker.will_wake(cx.waker()) => {}
        _ => due.extend(place.replace(cx.waker().clone())),
    }
}
