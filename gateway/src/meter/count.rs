//! What is counted.

/// Reasons there is room for; [`DropReason`] may grow up to it without a new version.
pub const DROPS: usize = 24;

const _: () = assert!(DropReason::ALL.len() <= DROPS);

/// Why a packet went no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum DropReason {
    /// Not an IP packet, or lengths that contradict each other.
    Malformed = 0,
    /// A source the client does not hold.
    Spoofed = 1,
    /// A destination or source that has no business in the tunnel.
    Address = 2,
    /// A transport protocol that is not carried.
    Protocol = 3,
    /// IP options or extension headers that are not carried.
    Options = 4,
    /// A wrong checksum.
    Checksum = 5,
    /// Larger than the tunnel takes.
    TooBig = 6,
    /// Hop limit used up.
    HopLimit = 7,
    /// Offload fields that contradict the packet.
    Offload = 8,
    /// A fragment that cannot be carried.
    Fragment = 9,
    /// The queue's byte limit.
    Overload = 10,
    /// The queue's delay target.
    Delay = 11,
    /// The kernel refused it.
    Kernel = 12,
    /// The interface was down.
    Down = 13,
    /// The process's memory budget for queues.
    Budget = 14,
    /// It came before the session was ready and there was no more room to wait.
    Early = 15,
    /// Chatter of the kernel's own that is not the client's traffic.
    Chatter = 16,
    /// An error about a packet that is not the client's.
    Quoted = 17,
    /// TCP flags that no connection produces.
    TcpFlags = 18,
}

impl DropReason {
    /// All, in the order of their numbers.
    pub const ALL: [DropReason; 19] = [
        DropReason::Malformed,
        DropReason::Spoofed,
        DropReason::Address,
        DropReason::Protocol,
        DropReason::Options,
        DropReason::Checksum,
        DropReason::TooBig,
        DropReason::HopLimit,
        DropReason::Offload,
        DropReason::Fragment,
        DropReason::Overload,
        DropReason::Delay,
        DropReason::Kernel,
        DropReason::Down,
        DropReason::Budget,
        DropReason::Early,
        DropReason::Chatter,
        DropReason::Quoted,
        DropReason::TcpFlags,
    ];

    /// Its name in the API and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            DropReason::Malformed => "malformed",
            DropReason::Spoofed => "spoofed",
            DropReason::Address => "address",
            DropReason::Protocol => "protocol",
            DropReason::Options => "options",
            DropReason::Checksum => "checksum",
            DropReason::TooBig => "too-big",
            DropReason::HopLimit => "hop-limit",
            DropReason::Offload => "offload",
            DropReason::Fragment => "fragment",
            DropReason::Overload => "overload",
            DropReason::Delay => "delay",
            DropReason::Kernel => "kernel",
            DropReason::Down => "down",
            DropReason::Budget => "budget",
            DropReason::Early => "early",
            DropReason::Chatter => "chatter",
            DropReason::Quoted => "quoted",
            DropReason::TcpFlags => "tcp-flags",
        }
    }
}

/// Totals of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Side {
    /// Bytes of the inner IP packets that were passed on, as the packets the
    /// client's programs see: a super-packet counts as its segments.
    pub payload: u64,
    /// Those packets.
    pub packets: u64,
    /// Bytes on the socket, everything included.
    pub wire: u64,
    /// Packets not passed on, by [`DropReason`].
    pub drops: [u64; DROPS],
}

impl Side {
    /// Counts a packet, or the segments of one, that was passed on.
    pub fn pass(&mut self, packets: u64, bytes: u64) {
        self.packets += packets;
        self.payload += bytes;
    }

    /// Counts packets that were not. Of a super-packet each segment counts, as
    /// if it had passed, unless it was refused as a whole for what it claimed to be.
    pub fn drop(&mut self, reason: DropReason, packets: u64) {
        self.drops[reason as usize] += packets;
    }

    /// The reasons that occurred, with their numbers.
    pub fn dropped(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL
            .into_iter()
            .map(|d| (d, self.drops[d as usize]))
            .filter(|(_, n)| *n > 0)
    }
}

/// Totals of a session, kept by its task and published by `Row::publish`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Client to Internet.
    pub outbound: Side,
    /// Internet to client.
    pub inbound: Side,
}

impl Totals {
    /// All packets not passed on.
    pub fn drops(&self) -> u64 {
        let sides = [&self.outbound, &self.inbound];
        sides.iter().flat_map(|s| s.drops).sum()
    }
}
