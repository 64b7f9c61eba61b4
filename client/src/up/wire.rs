//! What the two halves of `up` tell each other.
//!
//! One half has rights and reads no strangers' bytes; the other reads them and
//! has none. Between them is a socket that carries small JSON messages, each
//! with at most one descriptor, and whatever comes from the half without
//! rights is checked again by the other.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use rvpn_proto::control::Welcome;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::fd::{owned, watch};
use crate::fail::Kind;
use crate::profile::{Hidden, Trust};

/// Longest message.
const LIMIT: usize = 64 * 1024;

/// From the half with rights.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "order")]
pub(crate) enum Order {
    /// What to do, once.
    Begin {
        /// Where the gateway is.
        address: String,
        /// Whose certificate is believed.
        trust: Trust,
        /// Authorities, as text: the other half may not read the file.
        authorities: Option<String>,
        /// Of this installation.
        instance: String,
        /// Super-packets.
        offload: bool,
        /// Largest packet.
        mtu: Option<u16>,
        /// One before you was let in already.
        welcomed: bool,
    },
    /// A connection on its way, as the descriptor, and a token for it.
    Dialled {
        /// The token.
        token: Hidden,
    },
    /// There is none.
    NotDialled {
        /// Why.
        why: String,
        /// Coming back will not help.
        last: bool,
    },
    /// The device, as the descriptor; what was welcomed is accepted.
    Device {
        /// It takes several datagrams as one packet.
        datagrams: bool,
    },
    /// Go on with the device you have.
    Resume,
    /// What was welcomed is not accepted; the gateway is to know.
    Refuse {
        /// Why.
        why: String,
    },
    /// The network has changed: what was reachable may not be, or again.
    Changed,
    /// Say goodbye and end.
    Stop,
}

/// From the half without.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "report")]
pub(crate) enum Report {
    /// A connection to the gateway is needed.
    Dial,
    /// The gateway let us in.
    Welcomed {
        /// With this.
        welcome: Box<Welcome>,
    },
    /// The session goes on elsewhere or later.
    Lost {
        /// Why.
        why: String,
        /// When it will be tried again, in milliseconds.
        retry_ms: u64,
    },
    /// It will not be tried again.
    Failed {
        /// Why.
        why: String,
        /// Which kind of failure.
        grounds: Grounds,
    },
    /// How much there was, since the beginning.
    Counted {
        /// From here to the gateway.
        outbound: Way,
        /// From the gateway to here.
        inbound: Way,
        /// Round trip of the last ping of the connection, in milliseconds.
        rtt_ms: Option<f64>,
    },
    /// The goodbye was said.
    Left,
}

/// Why something will not be tried again.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Grounds {
    /// The gateway does not want us.
    Refused,
    /// A file of ours.
    Config,
    /// Words of ours.
    Usage,
    /// Something of this system.
    Internal,
    /// The gateway is not what it should be.
    Protocol,
}

impl From<Kind> for Grounds {
    fn from(kind: Kind) -> Grounds {
        match kind {
            Kind::Refused => Grounds::Refused,
            Kind::Config => Grounds::Config,
            Kind::Usage => Grounds::Usage,
            Kind::Internal => Grounds::Internal,
            Kind::Protocol | Kind::Unavailable => Grounds::Protocol,
        }
    }
}

impl From<Grounds> for Kind {
    fn from(grounds: Grounds) -> Kind {
        match grounds {
            Grounds::Refused => Kind::Refused,
            Grounds::Config => Kind::Config,
            Grounds::Usage => Kind::Usage,
            Grounds::Internal => Kind::Internal,
            Grounds::Protocol => Kind::Protocol,
        }
    }
}

/// What went one way.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Way {
    /// Packets, the segments of a super-packet singly.
    pub(crate) packets: u64,
    /// Their bytes.
    pub(crate) payload: u64,
    /// Packets that were not passed on.
    pub(crate) dropped: u64,
}

/// One end.
#[derive(Debug)]
pub(crate) struct Wire {
    fd: AsyncFd<File>,
}

/// Both ends, as descriptors that a child does not inherit by itself.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        flags,
    )?)
}

impl Wire {
    /// Takes an end.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Wire> {
        Ok(Wire {
            fd: watch(fd, Interest::READABLE | Interest::WRITABLE)?,
        })
    }

    /// Sends a message, and a descriptor with it.
    pub(crate) async fn send<T: Serialize>(
        &self,
        message: &T,
        fd: Option<RawFd>,
    ) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        let fds = fd.map(|fd| [fd]);
        let attached: Vec<ControlMessage<'_>> = fds
            .iter()
            .map(|fds| ControlMessage::ScmRights(fds))
            .collect();
        let send = |socket: &File| {
            let data = [IoSlice::new(&text)];
            let flags = MsgFlags::MSG_NOSIGNAL;
            sendmsg::<()>(socket.as_raw_fd(), &data, &attached, flags, None)?;
            Ok(())
        };
        self.fd.async_io(Interest::WRITABLE, send).await
    }

    /// The next message; nothing if the other end is gone.
    pub(crate) async fn receive<T: DeserializeOwned>(
        &self,
    ) -> io::Result<Option<(T, Option<OwnedFd>)>> {
        let receive = |socket: &File| {
            let mut buffer = vec![0; LIMIT];
            let mut space = nix::cmsg_space!([RawFd; 1]);
            let (length, fd) = {
                let mut data = [IoSliceMut::new(&mut buffer)];
                let flags = MsgFlags::MSG_CMSG_CLOEXEC;
                let got = recvmsg::<()>(socket.as_raw_fd(), &mut data, Some(&mut space), flags)?;
                let mut fd = None;
                for attached in got.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(fds) = attached {
                        // There is room for one, so no more arrive.
                        fd = fds.first().copied().map(owned);
                    }
                }
                (got.bytes, fd)
            };
            buffer.truncate(length);
            Ok((buffer, fd))
        };
        let (buffer, fd) = match self.fd.async_io(Interest::READABLE, receive).await {
            // It ended before it had read what we sent.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            done => done?,
        };
        if buffer.is_empty() {
            return Ok(None);
        }
        Ok(Some((serde_json::from_slice(&buffer)?, fd)))
    }
}
