//! How much is written to a device before what it has caused is looked for.
//!
//! What goes into a device often makes something come out of it at once: an
//! acknowledgement lets its sender send more, and what a program receives is
//! acknowledged. Whoever writes a whole message first makes the other end wait
//! for all of it, and then waits himself; with a few dozen packets on their way, as
//! TCP leaves them on a road that loses some, both ends work in turns. So the
//! device is looked at after a few packets, and what came out goes on its way.
//!
//! As long as nothing comes, as with datagrams that nobody answers, it is
//! looked at less and less often.

/// Packets before the first look.
const FIRST: u32 = 4;
/// Packets before a look where nothing has come for long.
const MOST: u32 = 64;

/// Counts what is written to one device.
#[derive(Clone, Debug)]
pub struct Stride {
    length: u32,
    left: u32,
}

impl Default for Stride {
    fn default() -> Self {
        Self {
            length: FIRST,
            left: FIRST,
        }
    }
}

impl Stride {
    /// One packet more was written.
    pub fn wrote(&mut self) {
        self.left = self.left.saturating_sub(1);
    }

    /// Whether it is time to look.
    pub fn is_due(&self) -> bool {
        self.left == 0
    }

    /// It was looked, and something had come or not.
    pub fn looked(&mut self, found: bool) {
        self.length = if found {
            FIRST
        } else {
            (self.length * 2).min(MOST)
        };
        self.left = self.length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Packets written until it is time to look.
    fn stride(stride: &mut Stride) -> u32 {
        let mut n = 0;
        while !stride.is_due() {
            stride.wrote();
            n += 1;
        }
        n
    }

    #[test]
    fn looks_are_often_where_something_comes_and_seldom_where_nothing_does() {
        let mut one = Stride::default();
        for _ in 0..3 {
            assert_eq!(stride(&mut one), FIRST);
            one.looked(true);
        }
        for length in [FIRST, 8, 16, 32, MOST, MOST] {
            assert_eq!(stride(&mut one), length);
            one.looked(false);
        }
        stride(&mut one);
        one.looked(true);
        assert_eq!(stride(&mut one), FIRST);
    }

    #[test]
    fn a_look_that_is_due_stays_due() {
        let mut one = Stride::default();
        for _ in 0..3 * FIRST {
            one.wrote();
        }
        assert!(one.is_due());
    }
}
