//! Why a packet did not pass.

use std::fmt;

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// Why a packet was dropped. The meter keeps a counter for each.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl DropReason {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();

            /// Its name in metrics and in the API.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }
    };
}

reasons! {
    /// No bytes at all.
    Empty = "empty",
    /// Fewer bytes than an IP header has.
    Truncated = "truncated",
    /// Neither IPv4 nor IPv6.
    Version = "version",
    /// An IPv4 header length that cannot be.
    HeaderLength = "header-length",
    /// A total length that cannot be, or more than there is.
    TotalLength = "total-length",
    /// A wrong IPv4 header checksum.
    HeaderChecksum = "header-checksum",
    /// A wrong transport checksum, or none where one is required.
    TransportChecksum = "transport-checksum",
    /// IPv4 options.
    Options = "options",
    /// IPv6 extension headers other than a fragment's.
    Extension = "extension-header",
    /// It should not have lived that long.
    HopLimit = "hop-limit",
    /// Neither TCP nor UDP nor the ICMP of its IP.
    Protocol = "protocol",
    /// A transport header that is not all there or contradicts the packet's length.
    TransportHeader = "transport-header",
    /// TCP flags that no connection produces.
    TcpFlags = "tcp-flags",
    /// An ICMP message that has no business in a tunnel.
    IcmpType = "icmp-type",
    /// A fragment that cannot be put together with others, or hides a header.
    Fragment = "fragment",
    /// Too many datagrams of which parts are missing.
    FragmentBudget = "fragment-budget",
    /// Longer than the tunnel's MTU, and not a super-packet.
    TooBig = "too-big",
    /// What is claimed to be left to do does not fit the packet.
    Offload = "offload",
    /// IPv6 from a client that has none, or IPv4 from one without.
    Family = "family",
    /// The source is not the client's.
    Spoofed = "spoofed",
    /// An address that cannot be spoken with, as a multicast group.
    Destination = "destination",
    /// The client speaks to itself through the tunnel.
    Hairpin = "hairpin",
    /// Not for this client.
    Recipient = "recipient",
    /// An error about a packet that this client neither sent nor received.
    Quoted = "quoted",
    /// More source addresses than a client of the first dialect may use.
    Sources = "sources",
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::error::Error for DropReason {}
