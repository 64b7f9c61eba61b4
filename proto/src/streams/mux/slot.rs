//! What is known of one stream.

use std::collections::VecDeque;
use std::task::Waker;

use super::WAITING;
use super::frame::INITIAL_WINDOW;

/// Memory that an idle stream keeps for each direction.
const KEPT: usize = 4 * 1024;

#[derive(Debug)]
pub(super) struct Slot {
    /// Arrived, and not read.
    pub(super) unread: VecDeque<u8>,
    /// What the other side may still send.
    pub(super) granted: u32,
    /// What it may have on its way at once; grows while it is read quickly.
    pub(super) window: u32,
    /// Read since it was last granted something.
    pub(super) consumed: u32,
    /// To be granted next.
    pub(super) grant: u32,
    /// To be sent.
    pub(super) waiting: VecDeque<u8>,
    /// What we may still send.
    pub(super) credit: u32,
    /// The first frame has to say that the stream is new.
    pub(super) syn: bool,
    /// Or that we have heard of it.
    pub(super) ack: bool,
    /// Nothing more will be written.
    pub(super) finished: bool,
    /// And that was said.
    pub(super) fin_sent: bool,
    /// The other side has finished.
    pub(super) peer_finished: bool,
    /// The stream was cut off, by either side.
    pub(super) reset: bool,
    /// Nobody holds it any more; it only ends.
    pub(super) left: bool,
    /// It waits for its turn to send.
    pub(super) queued: bool,
    pub(super) reader: Option<Waker>,
    pub(super) writer: Option<Waker>,
}

impl Slot {
    pub(super) fn new(ours: bool) -> Slot {
        Slot {
            unread: VecDeque::new(),
            granted: INITIAL_WINDOW,
            window: INITIAL_WINDOW,
            consumed: 0,
            grant: 0,
            waiting: VecDeque::new(),
            credit: INITIAL_WINDOW,
            syn: ours,
            ack: !ours,
            finished: false,
            fin_sent: false,
            peer_finished: false,
            reset: false,
            left: false,
            queued: false,
            reader: None,
            writer: None,
        }
    }

    /// Whether it has something to send that may be sent.
    pub(super) fn is_due(&self) -> bool {
        if self.reset {
            return false;
        }
        let data = !self.waiting.is_empty() && self.credit > 0;
        let fin = self.finished && !self.fin_sent && self.waiting.is_empty();
        data || fin || self.grant > 0 || self.ack || self.syn
    }

    /// Room for bytes to be written.
    pub(super) fn room(&self) -> usize {
        WAITING.saturating_sub(self.waiting.len())
    }

    /// Keeps what arrived, in memory that never exceeds the window: doubling
    /// would go beyond it.
    pub(super) fn keep(&mut self, bytes: &[u8]) {
        let (len, capacity) = (self.unread.len(), self.unread.capacity());
        let needed = len + bytes.len();
        if needed > capacity {
            let wanted = (2 * capacity).min(self.window as usize).max(needed);
            self.unread.reserve_exact(wanted - len);
        }
        self.unread.extend(bytes);
    }

    /// Moves bytes to a reader.
    pub(super) fn take(&mut self, into: &mut [u8]) -> usize {
        let n = into.len().min(self.unread.len());
        copy_out(&self.unread, &mut into[..n]);
        self.unread.drain(..n);
        if self.unread.is_empty() && self.unread.capacity() > KEPT {
            self.unread = VecDeque::new();
        }
        n
    }

    /// Moves bytes to a message.
    pub(super) fn send(&mut self, n: usize, out: &mut Vec<u8>) {
        let at = out.len();
        out.resize(at + n, 0);
        copy_out(&self.waiting, &mut out[at..]);
        self.waiting.drain(..n);
        if self.waiting.is_empty() && self.waiting.capacity() > KEPT {
            self.waiting = VecDeque::new();
        }
    }

    /// Drops what nobody will read or send.
    pub(super) fn discard(&mut self) -> usize {
        let unread = self.unread.len();
        self.unread = VecDeque::new();
        self.waiting = VecDeque::new();
        unread
    }

    pub(super) fn wake_both(&mut self, into: &mut Vec<Waker>) {
        into.extend(self.reader.take());
        into.extend(self.writer.take());
    }
}

fn copy_out(from: &VecDeque<u8>, into: &mut [u8]) {
    let (front, back) = from.as_slices();
    let first = front.len().min(into.len());
    into[..first].copy_from_slice(&front[..first]);
    let rest = into.len() - first;
    into[first..].copy_from_slice(&back[..rest]);
}
