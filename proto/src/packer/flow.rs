//! How much of what a client sends may wait for a slow visitor.

/// What may wait for one visitor.
pub const CAPACITY: usize = 1024 * 1024;
/// What may wait for all visitors of a client beyond that: what was on its way
/// when the client heard that it is to pause.
pub const ON_ITS_WAY: usize = 4 * 1024 * 1024;
/// Above this the client is told to pause: what is on its way when it hears of
/// it must still find room.
pub const PAUSE_ABOVE: usize = 128 * 1024;
/// Below this it is told to go on, before the visitor has nothing left to read.
pub const RESUME_BELOW: usize = 32 * 1024;

/// What to tell the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// To pause, with the bytes read so far.
    Pause(u64),
    /// To go on.
    Resume(u64),
}

/// The level of what waits for one visitor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gauge {
    read: u64,
    waiting: usize,
    paused: bool,
}

impl Gauge {
    /// Bytes that wait.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Bytes that came so far.
    pub fn read(&self) -> u64 {
        self.read
    }

    /// How many more there is room for.
    pub fn room(&self) -> usize {
        CAPACITY.saturating_sub(self.waiting)
    }

    /// Whether the client was told to pause, and not yet to go on.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Takes in what came.
    pub fn fill(&mut self, bytes: usize) {
        self.read = self.read.saturating_add(bytes as u64);
        self.waiting = self.waiting.saturating_add(bytes);
    }

    /// Gives out what the visitor took.
    pub fn drain(&mut self, bytes: usize) {
        self.waiting = self.waiting.saturating_sub(bytes);
    }

    /// Whether the client is paused and should not be any longer.
    pub fn wants_more(&self) -> bool {
        self.paused && self.waiting < RESUME_BELOW
    }

    /// Whether the client has to be told something. Says it once.
    pub fn turn(&mut self) -> Option<Turn> {
        match self.paused {
            false if self.waiting > PAUSE_ABOVE => {
                self.paused = true;
                Some(Turn::Pause(self.read))
            }
            true if self.waiting < RESUME_BELOW => {
                self.paused = false;
                Some(Turn::Resume(self.read))
            }
            _ => None,
        }
    }
}
