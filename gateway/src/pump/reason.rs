//! What the meter calls the reasons why a packet did not pass.
//!
//! Rows of the meter hold fewer than there are, and in an order that outlives
//! versions, so what needs the same remedy is counted together.

use rvpn_proto::validate::DropReason as Why;

use crate::meter::DropReason;

impl From<Why> for DropReason {
    fn from(why: Why) -> DropReason {
        match why {
            Why::Empty
            | Why::Truncated
            | Why::Version
            | Why::HeaderLength
            | Why::TotalLength
            | Why::TransportHeader => DropReason::Malformed,
            Why::HeaderChecksum | Why::TransportChecksum => DropReason::Checksum,
            Why::Options | Why::Extension => DropReason::Options,
            Why::HopLimit => DropReason::HopLimit,
            Why::Protocol | Why::IcmpType => DropReason::Protocol,
            Why::TcpFlags => DropReason::TcpFlags,
            Why::Fragment | Why::FragmentBudget => DropReason::Fragment,
            Why::TooBig => DropReason::TooBig,
            Why::Offload => DropReason::Offload,
            Why::Family | Why::Spoofed | Why::Sources => DropReason::Spoofed,
            Why::Destination | Why::Hairpin => DropReason::Address,
            Why::Recipient => DropReason::Chatter,
            Why::Quoted => DropReason::Quoted,
        }
    }
}
