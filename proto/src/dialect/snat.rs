//! Source addresses of the first dialect, whose clients choose their own.

use std::net::Ipv4Addr;

/// Sources that one connection may use.
pub const MAX_SOURCES: usize = 32;
/// The last octet that the first source is given; the gateway has the one before.
const FIRST: u8 = 2;

/// Gives each source that a client uses an address of its subnet, in order of
/// appearance, and finds it again for replies. They stay for the connection's
/// life: a source that lost its address would lose its open connections.
#[derive(Clone, Debug)]
pub struct SourceMap {
    base: u32,
    sources: [Ipv4Addr; MAX_SOURCES],
    used: u8,
}

impl SourceMap {
    /// For the /24 that begins at `base`.
    pub fn new(base: Ipv4Addr) -> Self {
        Self {
            base: base.to_bits() & !0xff,
            sources: [Ipv4Addr::UNSPECIFIED; MAX_SOURCES],
            used: 0,
        }
    }

    /// The address that stands for `source` outside; none when all are taken.
    pub fn outside(&mut self, source: Ipv4Addr) -> Option<Ipv4Addr> {
        let known = self.known().iter().position(|s| *s == source);
        let index = match known {
            Some(index) => u8::try_from(index).ok()?,
            None => {
                *self.sources.get_mut(usize::from(self.used))? = source;
                self.used += 1;
                self.used - 1
            }
        };
        Some(Ipv4Addr::from_bits(self.base | u32::from(FIRST + index)))
    }

    /// The source that `destination` stands for; none if nothing was sent from it yet.
    pub fn inside(&self, destination: Ipv4Addr) -> Option<Ipv4Addr> {
        let [.., last] = destination.octets();
        if destination.to_bits() & !0xff != self.base {
            return None;
        }
        let index = usize::from(last.checked_sub(FIRST)?);
        self.known().get(index).copied()
    }

    fn known(&self) -> &[Ipv4Addr] {
        &self.sources[..usize::from(self.used)]
    }
}
