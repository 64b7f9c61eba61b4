//! What the messages say.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::prefix::Prefix;

/// A control message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Message {
    /// The client's first message.
    Hello(Hello),
    /// The gateway's answer to it.
    Welcome(Box<Welcome>),
    /// A newer resume ticket; the ones before are worth nothing.
    Ticket(Ticket),
    /// Counts asked for, or told.
    Stats(Stats),
    /// What is left of the account's quota.
    Quota(Quota),
    /// A name to look up where the packets leave.
    Resolve(Resolve),
    /// What it resolved to.
    Resolved(Resolved),
    /// The sender closes next, and why.
    Goodbye(Goodbye),
    /// A message could not be used; the connection goes on.
    Error(ErrorNotice),
}

/// Who a client is and what it can do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Protocol versions it speaks, best first.
    pub versions: Vec<u16>,
    /// Program and version, for people.
    pub name: String,
    /// Names this installation of the client for good: one lease for each.
    pub instance: String,
    /// What it can do beside the minimum, such as [`super::OFFLOAD`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capabilities: Vec<String>,
    /// The tunnel MTU it would like.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// How often it would like to ping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keepalive_s: Option<u16>,
    /// The ticket of the session before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ticket: Option<String>,
}

impl Hello {
    /// Whether the client says it can do this.
    pub fn can(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|c| c == capability)
    }
}

/// Two ends of the tunnel as the client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair<A> {
    /// The client's own.
    pub address: A,
    /// The gateway's.
    pub peer: A,
}

/// All that a client needs to set up its tunnel. It must not be trusted before
/// [`Welcome::validate`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version that is spoken from now on, one of the client's.
    pub version: u16,
    /// Program and version, for people.
    pub name: String,
    /// Names the session in logs and lists at both ends.
    pub session: String,
    /// Whether the lease is the one of before, so that open connections go on.
    #[serde(default)]
    pub resumed: bool,
    /// The client's capabilities that the gateway shares.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capabilities: Vec<String>,
    /// IPv4 inside the tunnel.
    pub v4: Pair<Ipv4Addr>,
    /// IPv6 inside the tunnel, if there is any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6: Option<Pair<Ipv6Addr>>,
    /// Largest packet without segmentation.
    pub mtu: u32,
    /// Resolvers to use while the tunnel is up.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<IpAddr>,
    /// Destinations that the gateway suggests to route through the tunnel.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Prefix>,
    /// For the next `hello`, if the lease lingers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ticket: Option<Ticket>,
    /// How often the client must ping.
    pub keepalive_s: u16,
    /// What the gateway accepts.
    pub limits: Limits,
}

/// What the gateway accepts of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of a binary message.
    pub max_message: u32,
    /// Bytes of a text message.
    pub max_control: u32,
    /// Bytes a second from client to Internet, if limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outbound_rate: Option<u64>,
    /// Bytes a second from Internet to client, if limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inbound_rate: Option<u64>,
    /// Connections at the same time, if limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows: Option<u32>,
}

/// Leads back to the lease. The login is needed all the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// Opaque to the client.
    pub ticket: String,
    /// Seconds from now until it is worth nothing.
    pub valid_s: u64,
}

/// Without counters a question, with them the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// From client to Internet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outbound: Option<Counters>,
    /// From Internet to client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inbound: Option<Counters>,
}

/// What the gateway has counted in one direction since the session began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Packets, segments counted singly.
    pub packets: u64,
    /// Their bytes, from the IP header on.
    pub payload: u64,
    /// Bytes on the socket, everything included.
    pub wire: u64,
    /// Packets dropped, for whatever reason.
    pub dropped: u64,
}

/// What is left of a period's traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quota {
    /// Bytes used in this period.
    pub used: u64,
    /// Bytes the period has.
    pub limit: u64,
    /// Seconds until the next period begins.
    pub resets_in_s: u64,
    /// The limit is reached and the account is slowed down.
    #[serde(default)]
    pub throttled: bool,
}

/// A question for the gateway's resolver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolve {
    /// Chosen by the client, comes back in the answer.
    pub id: u32,
    /// The host name.
    pub name: String,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// The question's.
    pub id: u32,
    /// What was found, best first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// Why nothing was, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Said before a close frame, which has no room for all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goodbye {
    /// The code that the close frame will have, see [`super::close`].
    pub code: u16,
    /// Why, for people.
    #[serde(default)]
    pub text: String,
    /// When coming back makes sense; absent, it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

/// What could not be done with a message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorNotice {
    /// For programs: `unknown-kind`, `malformed`, `not-now` or a later one.
    pub code: String,
    /// For people.
    #[serde(default)]
    pub text: String,
}
