//! How much a padded connection hides of its lengths and silences.

use std::time::Duration;

/// Random numbers, passed in like time, so that tests repeat. They hide
/// patterns, they protect no secret.
pub trait Entropy {
    /// Sixty-four random bits.
    fn bits(&mut self) -> u64;

    /// A number of the range, both ends included.
    fn between(&mut self, (low, high): (u32, u32)) -> u32 {
        let span = u64::from(high.saturating_sub(low)) + 1;
        // Multiplying the high half down is even enough for lengths and delays.
        let step = ((self.bits() >> 32) * span) >> 32;
        low.saturating_add(u32::try_from(step).unwrap_or(0))
    }
}

impl<F: FnMut() -> u64> Entropy for F {
    fn bits(&mut self) -> u64 {
        self()
    }
}

/// What is added to messages, and between them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Padding {
    /// Zero bytes behind each packet, least and most.
    pub bytes: (u16, u16),
    /// Messages that mean nothing.
    pub noise: Option<Noise>,
}

/// Messages that mean nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noise {
    /// Their length, least and most.
    pub bytes: (u16, u16),
    /// Milliseconds between two of them, least and most.
    pub every_ms: (u32, u32),
}

impl Padding {
    /// Nothing added. The gateway's default: it then keeps the connection
    /// alive with WebSocket pings.
    pub const NONE: Self = Self {
        bytes: (0, 0),
        noise: None,
    };

    /// As the first gateways and command line clients really did.
    pub const SLIGHT: Self = Self {
        bytes: (0, 1),
        noise: Some(Noise {
            bytes: (0, 1),
            every_ms: (100, 1000),
        }),
    };

    /// As the telephone client does: lengths and silences say little.
    pub const BROAD: Self = Self {
        bytes: (1, 1500),
        noise: Some(Noise {
            bytes: (1, 1500),
            every_ms: (50, 500),
        }),
    };

    pub(super) fn length(&self, entropy: &mut impl Entropy) -> usize {
        draw(self.bytes, entropy)
    }

    /// Puts one message of noise behind what `out` holds, which may be no byte
    /// at all, and tells when the next is due. None if there is no noise.
    pub fn noise(&self, entropy: &mut impl Entropy, out: &mut Vec<u8>) -> Option<Duration> {
        let noise = self.noise?;
        out.resize(out.len() + draw(noise.bytes, entropy), super::NOISE);
        self.pause(entropy)
    }

    /// How long until a message of noise is due.
    pub fn pause(&self, entropy: &mut impl Entropy) -> Option<Duration> {
        let every = self.noise?.every_ms;
        Some(Duration::from_millis(entropy.between(every).into()))
    }
}

fn draw((low, high): (u16, u16), entropy: &mut impl Entropy) -> usize {
    if low >= high {
        return low.into();
    }
    let drawn = entropy.between((low.into(), high.into()));
    usize::try_from(drawn).unwrap_or(usize::from(high))
}
