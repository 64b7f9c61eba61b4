//! The ways from a client to the far side that are compared.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rvpn_lab::Ns;
use rvpn_lab::machine::{Machine, Up};
use rvpn_lab::ns::Daemon;
use rvpn_lab::topology::{FAR4, GW4, NB4};

use crate::cpu::Who;
use crate::naive::{self, End, Naive};
use crate::peers::{Ocserv, OpenVpn, STUNNEL, Stunnel, WireGuard, find, version};
use crate::rtt;
use crate::stage::{FAR, Stage, address, client, far_tcp};
use crate::tls;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// For a tunnel to carry its first packet.
const PATIENCE: Duration = Duration::from_secs(15);
const RAW_TLS: u16 = 4433;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Plain,
    RawTls,
    Ours {
        offload: bool,
    },
    /// One of two small tunnels of our own, see there.
    Naive {
        long: bool,
    },
    OpenVpn {
        tcp: bool,
    },
    Ocserv {
        dtls: bool,
    },
    WireGuard,
    BoringTun,
    Stunnel,
}

/// All of them, in the order of the tables.
pub(crate) const ALL: [Kind; 13] = [
    Kind::Plain,
    Kind::RawTls,
    Kind::Ours { offload: true },
    Kind::Ours { offload: false },
    Kind::Naive { long: true },
    Kind::Naive { long: false },
    Kind::OpenVpn { tcp: true },
    Kind::OpenVpn { tcp: false },
    Kind::Ocserv { dtls: false },
    Kind::Ocserv { dtls: true },
    Kind::WireGuard,
    Kind::BoringTun,
    Kind::Stunnel,
];

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Plain => "no tunnel",
            Kind::RawTls => "raw TLS",
            Kind::Ours { offload: true } => "rvpn",
            Kind::Ours { offload: false } => "rvpn --no-offload",
            Kind::Naive { long: true } => "long queue",
            Kind::Naive { long: false } => "naive",
            Kind::OpenVpn { tcp: true } => "OpenVPN TCP",
            Kind::OpenVpn { tcp: false } => "OpenVPN UDP",
            Kind::Ocserv { dtls: false } => "ocserv TLS",
            Kind::Ocserv { dtls: true } => "ocserv DTLS",
            Kind::WireGuard => "wireguard-go",
            Kind::BoringTun => "boringtun",
            Kind::Stunnel => "stunnel",
        }
    }

    /// Its name as one word of a command line.
    pub(crate) fn word(self) -> String {
        self.name()
            .to_lowercase()
            .replace(" --", "-")
            .replace(' ', "-")
    }

    /// What a reader of the tables should know of it.
    pub(crate) fn what(self) -> &'static str {
        match self {
            Kind::Plain => "routed through a host with masquerade",
            Kind::RawTls => {
                "one tokio-rustls connection a stream, library defaults, ends at the gateway's host"
            }
            Kind::Ours { offload: true } => "`rvpn up`",
            Kind::Ours { offload: false } => "a client that takes and gives plain packets only",
            Kind::Naive { long: true } => {
                "no tunnel for use: a small program of the bench with our libraries and super-packets; all that waits is one \
                 message, and the device, with its queue of 500 packets that nobody manages, is not read while the socket is full"
            }
            Kind::Naive { long: false } => {
                "the same with plain packets: each is read, is a message and is flushed"
            }
            Kind::OpenVpn { tcp: true } => "AES-256-GCM, no DCO, MTU 1500, mssfix 0, tcp-nodelay",
            Kind::OpenVpn { tcp: false } => "AES-256-GCM, no DCO, MTU 1420, mssfix 0, fast-io",
            Kind::Ocserv { dtls: false } => "openconnect --no-dtls, MTU 1500, no compression",
            Kind::Ocserv { dtls: true } => "openconnect, DTLS data channel, MTU 1420",
            Kind::WireGuard => "userspace, MTU 1420",
            Kind::BoringTun => "userspace, as many threads as it starts by itself, MTU 1420",
            Kind::Stunnel => "a TCP port forward, not a VPN: one TLS connection a stream",
        }
    }

    /// What `--peers` calls it; nothing for what is always there.
    pub(crate) fn peer(self) -> Option<&'static str> {
        match self {
            Kind::Plain | Kind::RawTls | Kind::Ours { .. } | Kind::Naive { .. } => None,
            Kind::OpenVpn { .. } => Some("openvpn"),
            Kind::Ocserv { .. } => Some("ocserv"),
            Kind::WireGuard => Some("wireguard-go"),
            Kind::BoringTun => Some("boringtun"),
            Kind::Stunnel => Some("stunnel"),
        }
    }

    fn programs(self) -> &'static [&'static str] {
        match self {
            Kind::Plain | Kind::RawTls | Kind::Ours { .. } | Kind::Naive { .. } => &[],
            Kind::OpenVpn { .. } => &["openvpn"],
            Kind::Ocserv { .. } => &["ocserv", "ocpasswd", "openconnect"],
            Kind::WireGuard => &["wireguard-go", "wg"],
            Kind::BoringTun => &["boringtun-cli", "wg"],
            Kind::Stunnel => &["stunnel4"],
        }
    }

    /// The first program of it that is not installed.
    pub(crate) fn missing(self) -> Option<&'static str> {
        let mut programs = self.programs().iter().copied();
        programs.find(|program| find(program).is_none())
    }

    pub(crate) fn version(self) -> String {
        match self {
            Kind::Plain => String::new(),
            Kind::RawTls => "rustls 0.23 with aws-lc".to_owned(),
            Kind::Ours { .. } | Kind::Naive { .. } => env!("CARGO_PKG_VERSION").to_owned(),
            Kind::OpenVpn { .. } => version("openvpn", "--version"),
            Kind::Ocserv { .. } => format!(
                "{}, {}",
                version("ocserv", "--version"),
                version("openconnect", "--version")
            ),
            Kind::WireGuard => version("wireguard-go", "--version"),
            Kind::BoringTun => version("boringtun-cli", "--version"),
            Kind::Stunnel => version("stunnel4", "-version"),
        }
    }

    /// Whether datagrams and echo requests go through it.
    pub(crate) fn carries_packets(self) -> bool {
        !matches!(self, Kind::RawTls | Kind::Stunnel)
    }

    /// Whether there is something to connect.
    pub(crate) fn connects(self) -> bool {
        !matches!(self, Kind::Plain | Kind::RawTls | Kind::Stunnel)
    }
}

enum Peer {
    None,
    OpenVpn(OpenVpn),
    Ocserv(Ocserv),
    WireGuard(WireGuard),
    Stunnel(Stunnel),
    Naive(Naive),
}

/// One way with its gateway running and its client's machine ready.
pub(crate) struct Road {
    pub(crate) kind: Kind,
    /// The last byte of its client's address.
    pub(crate) number: u8,
    machine: Machine,
    peer: Peer,
    _server: Option<Daemon>,
    _end: Option<End>,
    pub(crate) who: Who,
    /// Where a client's streams go to, and where they come out.
    pub(crate) to: SocketAddr,
    raw: Option<std::net::TcpListener>,
}

/// A client that is connected.
pub(crate) enum Open<'a> {
    Nothing,
    Ours(Box<Up<'a>>),
    Theirs(Daemon),
    Naive(End),
}

impl Road {
    pub(crate) fn new(stage: &Stage, kind: Kind, name: &'static str, n: u8) -> Outcome<Road> {
        let machine = client(&stage.lab, name, n);
        let nb = &stage.lab.nb;
        let dir = stage.lab.dir.join(format!("peer-{name}"));
        fs::create_dir_all(&dir)?;
        let mut to = far_tcp();
        let mut raw = None;
        let (mut server, mut end) = (None, None);
        let mut who = Who::Nobody;
        let peer = match kind {
            Kind::Plain => {
                machine.ns.ip(&format!("route add {FAR4}/32 via {NB4}"));
                Peer::None
            }
            Kind::RawTls => {
                who = Who::Threads(tls::SERVER);
                to = format!("{NB4}:{RAW_TLS}").parse()?;
                raw = Some(nb.tcp(&to.to_string()));
                Peer::None
            }
            Kind::Ours { .. } => {
                machine.join(&stage.lab, &stage.gateway, name, GW4);
                who = Who::Program(stage.gateway.pid());
                Peer::None
            }
            Kind::OpenVpn { tcp } => {
                let peer = OpenVpn::new(&dir, tcp)?;
                server = Some(peer.serve(nb)?);
                Peer::OpenVpn(peer)
            }
            Kind::Ocserv { dtls } => {
                let peer = Ocserv::new(&dir, dtls)?;
                server = Some(peer.serve(nb)?);
                Peer::Ocserv(peer)
            }
            Kind::Naive { long } => {
                let peer = Naive::new(long)?;
                end = Some(peer.serve(nb)?);
                who = Who::Threads(if long {
                    naive::LONG_SERVER
                } else {
                    naive::SERVER
                });
                Peer::Naive(peer)
            }
            Kind::WireGuard | Kind::BoringTun => {
                let peer = WireGuard::new(&dir, nb, address(n), kind == Kind::BoringTun)?;
                server = Some(peer.serve(nb)?);
                Peer::WireGuard(peer)
            }
            Kind::Stunnel => {
                to = format!("127.0.0.1:{STUNNEL}").parse()?;
                let peer = Stunnel::new(&dir)?;
                server = Some(peer.serve(nb)?);
                Peer::Stunnel(peer)
            }
        };
        if let Some(server) = &server {
            who = Who::Program(server.child.id());
        }
        Ok(Road {
            kind,
            number: n,
            machine,
            peer,
            _server: server,
            _end: end,
            who,
            to,
            raw,
        })
    }

    pub(crate) fn client(&self) -> &Ns {
        &self.machine.ns
    }

    /// Where its streams come out.
    pub(crate) fn listener<'a>(&'a self, stage: &'a Stage) -> &'a std::net::TcpListener {
        self.raw.as_ref().unwrap_or(&stage.listener)
    }

    /// Connects the client, and how long it took from its start to the first
    /// answer from the far side.
    pub(crate) fn open(&self) -> Outcome<(Open<'_>, Option<Duration>)> {
        let ns = self.client();
        let since = Instant::now();
        let open = match &self.peer {
            Peer::None => match self.kind {
                Kind::Ours { offload: true } => Open::Ours(Box::new(self.machine.begin(&[]))),
                Kind::Ours { offload: false } => {
                    Open::Ours(Box::new(self.machine.begin(&["--no-offload"])))
                }
                _ => Open::Nothing,
            },
            Peer::OpenVpn(peer) => Open::Theirs(peer.connect(ns)?),
            Peer::Ocserv(peer) => Open::Theirs(peer.connect(ns)?),
            Peer::WireGuard(peer) => Open::Theirs(peer.connect(ns)?),
            Peer::Stunnel(peer) => Open::Theirs(peer.connect(ns)?),
            Peer::Naive(peer) => Open::Naive(peer.connect(ns)?),
        };
        if !self.kind.carries_packets() {
            return Ok((open, None));
        }
        let first = rtt::first(ns, FAR, since, PATIENCE)
            .ok_or_else(|| format!("{}: no answer from the far side", self.kind.name()))?;
        Ok((open, self.kind.connects().then_some(first)))
    }
}

impl Open<'_> {
    /// Ends it, the way its user would where that matters.
    pub(crate) fn close(self) {
        match self {
            Open::Nothing => {}
            Open::Ours(up) => up.down(),
            Open::Theirs(daemon) => drop(daemon),
            Open::Naive(end) => drop(end),
        }
    }
}
