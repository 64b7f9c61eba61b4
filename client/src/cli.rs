//! The command line.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use rvpn_proto::control::Prefix;

pub(crate) use crate::serve::args::Serve;
use crate::text::duration;

/// Client of an RVPN gateway, and its operators' tool.
///
/// Exit status: 0 done, 1 wrong usage, 69 not available, 70 internal, 76 the
/// other side is not what it should be, 77 refused, 78 configuration. `ping`:
/// 0 answers came, 1 none came, 2 anything else.
#[derive(Debug, Parser)]
#[command(name = "rvpn", version, disable_help_subcommand = true)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Join a gateway with the link of an invite
    Join(Join),
    /// Send the traffic of this machine through a gateway (as root)
    Up(Up),
    /// End what `up` began
    Down(Down),
    /// Show what `up` is doing
    Status(Status),
    /// Serve something of this machine to the world (no root)
    Serve(Box<Serve>),
    /// Ping a host through a gateway (no root)
    Ping(Ping),
    /// Check everything between here and the other side of the gateway
    Doctor(Doctor),
    /// Sign, read and revoke tokens
    #[command(subcommand)]
    Token(Token),
    /// Invite a device (operators)
    Invite(Invite),
    /// See, open and close the gateway's ports (operators)
    #[command(subcommand)]
    Listener(Listener),
    /// See and end sessions (operators)
    #[command(subcommand)]
    Session(Session),
    /// Show who used how much (operators)
    Usage(Usage),
    /// Certificates that the gateway gets by itself (operators)
    #[command(subcommand)]
    Certificate(Certificate),
    /// One part of `up`; not for people
    #[command(name = "__carry", hide = true)]
    Carry,
    /// Another part of `up`; not for people
    #[command(name = "__mend", hide = true)]
    Mend,
}

/// Which gateway, and how to log in.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Choice {
    /// Name of a joined gateway; needed when there are several
    #[arg(short, long, value_name = "NAME", env = "RVPN_GATEWAY")]
    pub(crate) gateway: Option<String>,
    /// A gateway that was not joined, HOST or HOST:PORT
    #[arg(
        long,
        value_name = "HOST",
        env = "RVPN_SERVER",
        conflicts_with = "gateway"
    )]
    pub(crate) server: Option<String>,
    /// File with a token (mode 0600)
    #[arg(
        long,
        value_name = "FILE",
        env = "RVPN_TOKEN_FILE",
        requires = "server"
    )]
    pub(crate) token_file: Option<PathBuf>,
    /// SHA-256 of the gateway's certificate, to believe that one only
    #[arg(
        long,
        value_name = "HEX",
        env = "RVPN_FINGERPRINT",
        requires = "server"
    )]
    pub(crate) fingerprint: Option<String>,
    /// Authorities to believe instead of the system's (PEM)
    #[arg(
        long,
        value_name = "FILE",
        requires = "server",
        conflicts_with = "fingerprint"
    )]
    pub(crate) ca_file: Option<PathBuf>,
}

/// See [`Command::Join`].
#[derive(Args, Debug)]
pub(crate) struct Join {
    /// rvpn://HOST/?fp=…&code=…; '-' reads it from standard input
    pub(crate) link: String,
    /// What to call the gateway here (default: its host)
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// What to call this device there (default: its host name)
    #[arg(long)]
    pub(crate) device: Option<String>,
}

/// See [`Command::Up`].
#[derive(Args, Clone, Debug)]
pub(crate) struct Up {
    #[command(flatten)]
    pub(crate) choice: Choice,
    /// Return once connected, and go on in the background
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Only what the gateway suggests beside the default route, instead of everything
    #[arg(long)]
    pub(crate) split: bool,
    /// Only this destination through the gateway, instead of everything (repeatable)
    #[arg(long, value_name = "PREFIX")]
    pub(crate) route: Vec<Prefix>,
    /// This destination past the gateway (repeatable)
    #[arg(long, value_name = "PREFIX")]
    pub(crate) bypass: Vec<Prefix>,
    /// Private networks that this machine is attached to past the gateway
    #[arg(long)]
    pub(crate) allow_lan: bool,
    /// Let nothing out past the tunnel, also when this program dies
    #[arg(long)]
    pub(crate) kill_switch: bool,
    /// Leave the resolvers of this machine as they are
    #[arg(long)]
    pub(crate) no_dns: bool,
    /// This resolver instead of the gateway's (repeatable)
    #[arg(long, value_name = "ADDRESS", conflicts_with = "no_dns")]
    pub(crate) dns: Vec<IpAddr>,
    /// Name of the tunnel's interface
    #[arg(long, default_value = "rvpn0")]
    pub(crate) interface: String,
    /// Largest packet, 1280 to 65535 (default: the gateway's)
    #[arg(long, value_parser = clap::value_parser!(u16).range(1280..))]
    pub(crate) mtu: Option<u16>,
    /// Finished packets only between client and gateway: slower, for comparing
    #[arg(long)]
    pub(crate) no_offload: bool,
}

/// See [`Command::Down`].
#[derive(Args, Debug)]
pub(crate) struct Down {
    /// Also mend what a killed `up` left behind
    #[arg(long)]
    pub(crate) repair: bool,
}

/// See [`Command::Status`].
#[derive(Args, Debug)]
pub(crate) struct Status {
    /// For programs
    #[arg(long)]
    pub(crate) json: bool,
}

/// See [`Command::Ping`].
#[derive(Args, Debug)]
pub(crate) struct Ping {
    #[command(flatten)]
    pub(crate) choice: Choice,
    /// Address, or a name that is looked up at the gateway
    pub(crate) host: String,
    /// IPv4 only
    #[arg(short = '4', conflicts_with = "six")]
    pub(crate) four: bool,
    /// IPv6 only
    #[arg(short = '6')]
    pub(crate) six: bool,
    /// Stop after this many; 0 is without end
    #[arg(short, long, default_value_t = 4)]
    pub(crate) count: u64,
    /// Seconds between two
    #[arg(short, long, default_value_t = 1.0)]
    pub(crate) interval: f64,
    /// Bytes of payload
    #[arg(short, long, default_value_t = 56)]
    pub(crate) size: u16,
    /// Seconds to wait for an answer
    #[arg(short = 'W', long, default_value_t = 2.0)]
    pub(crate) timeout: f64,
    /// One JSON object a line
    #[arg(long)]
    pub(crate) json: bool,
    /// Only the summary
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// See [`Command::Doctor`].
#[derive(Args, Debug)]
pub(crate) struct Doctor {
    #[command(flatten)]
    pub(crate) choice: Choice,
    /// What to ping at the end
    #[arg(long, value_name = "HOST", default_value = "1.1.1.1")]
    pub(crate) host: String,
    /// For programs
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where the gateway's API is.
#[derive(Args, Clone, Debug)]
pub(crate) struct Admin {
    /// HOST:PORT on loopback, or unix:PATH
    #[arg(
        long,
        value_name = "WHERE",
        env = "RVPN_ADMIN",
        default_value = "127.0.0.1:7980"
    )]
    pub(crate) admin: String,
    /// File with the API's token; not needed for a socket file
    #[arg(
        long,
        value_name = "FILE",
        env = "RVPN_ADMIN_TOKEN_FILE",
        default_value = "/var/lib/rvpn/admin.token"
    )]
    pub(crate) admin_token_file: PathBuf,
    /// For programs
    #[arg(long)]
    pub(crate) json: bool,
}

/// See [`Command::Token`].
#[derive(Debug, Subcommand)]
pub(crate) enum Token {
    /// Make a key for signing tokens; the gateway gets its public half only
    Key {
        /// Where to keep the private key
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Name of the key, the kid of its tokens
        #[arg(long, default_value = "ops")]
        name: String,
    },
    /// Sign a token with an operator's key, on standard output
    Mint {
        /// The private key (PEM, mode 0600): Ed25519, P-256 or RSA
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// The name of the key in the gateway's configuration
        #[arg(long, value_name = "NAME")]
        kid: Option<String>,
        /// Who logs in with it
        #[arg(long, value_name = "NAME")]
        account: String,
        /// How long it is good
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
        valid: Duration,
        /// Identifier, to revoke it by (default: random)
        #[arg(long)]
        jti: Option<String>,
        /// The issuer that the gateway expects
        #[arg(long)]
        issuer: Option<String>,
        /// The audience that the gateway expects
        #[arg(long)]
        audience: Option<String>,
        /// A name that may be served with it, such as app.example.org or '*.x.example.org'
        #[arg(long = "domain", value_name = "NAME")]
        domains: Vec<String>,
        /// A TCP port of the gateway that may be had with it
        #[arg(long = "tcp-port", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
        tcp_ports: Vec<u16>,
    },
    /// Show what a token says, read from a file or standard input
    Inspect {
        /// The file; '-' is standard input
        #[arg(default_value = "-")]
        file: PathBuf,
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// Revoke tokens, and end their sessions now
    Revoke {
        #[command(flatten)]
        admin: Admin,
        /// The token of this identifier
        #[arg(long, conflicts_with_all = ["account", "file"], allow_hyphen_values = true)]
        jti: Option<String>,
        /// Everything of this account, or one device by its id
        #[arg(long, conflicts_with = "file")]
        account: Option<String>,
        /// The token in this file; '-' is standard input
        #[arg(long)]
        file: Option<PathBuf>,
        /// Why, for the record
        #[arg(long, default_value = "")]
        reason: String,
        /// Take it back instead
        #[arg(long)]
        undo: bool,
    },
    /// What is revoked
    Revoked {
        #[command(flatten)]
        admin: Admin,
    },
}

/// See [`Command::Invite`].
#[derive(Args, Debug)]
pub(crate) struct Invite {
    #[command(flatten)]
    pub(crate) admin: Admin,
    /// Who the device will belong to
    #[arg(required_unless_present_any = ["list", "remove"])]
    pub(crate) account: Option<String>,
    /// For how many devices
    #[arg(long, default_value_t = 1)]
    pub(crate) uses: u32,
    /// How long the link is good
    #[arg(long, value_name = "TIME", default_value = "1d", value_parser = duration)]
    pub(crate) valid: Duration,
    /// How long a device may log in (default: without end)
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) device_valid: Option<Duration>,
    /// The helper's policy class
    #[arg(long, default_value_t = 0)]
    pub(crate) class: u8,
    /// A name that the device may serve, such as app.example.org or '*.x.example.org'
    #[arg(long = "name", value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// A TCP port of the gateway that the device may have
    #[arg(long = "port", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) ports: Vec<u16>,
    /// What the device connects to, HOST or HOST:PORT (default: the gateway's first name)
    #[arg(long, value_name = "HOST")]
    pub(crate) address: Option<String>,
    /// Also as a picture for a phone's camera
    #[arg(long)]
    pub(crate) qr: bool,
    /// The invites that are open
    #[arg(long, conflicts_with = "account")]
    pub(crate) list: bool,
    /// Take an invite back
    #[arg(long, value_name = "ID", conflicts_with_all = ["account", "list"], allow_hyphen_values = true)]
    pub(crate) remove: Option<String>,
}

/// See [`Command::Listener`].
#[derive(Debug, Subcommand)]
pub(crate) enum Listener {
    /// All of them
    Ls {
        #[command(flatten)]
        admin: Admin,
    },
    /// Open one now
    Add(ListenerAdd),
    /// Close one; whoever came through it stays
    Rm {
        #[command(flatten)]
        admin: Admin,
        /// PORT or ADDRESS:PORT, as `ls` shows it
        at: String,
    },
}

/// See [`Listener::Add`].
#[derive(Args, Debug)]
pub(crate) struct ListenerAdd {
    #[command(flatten)]
    pub(crate) admin: Admin,
    /// PORT (on all addresses) or ADDRESS:PORT
    pub(crate) at: String,
    /// What is expected: auto (default), tls or plain
    #[arg(long, conflicts_with = "name")]
    pub(crate) mode: Option<String>,
    /// A served name that all visitors go to, whatever they speak
    #[arg(long = "for", value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// A network whose connections begin with a PROXY v2 header (may be repeated)
    #[arg(long, value_name = "NETWORK")]
    pub(crate) proxy_from: Vec<String>,
}

/// See [`Command::Session`].
#[derive(Debug, Subcommand)]
pub(crate) enum Session {
    /// All of them, with their counters as of now
    Ls {
        #[command(flatten)]
        admin: Admin,
    },
    /// End one for good
    End {
        #[command(flatten)]
        admin: Admin,
        /// As `ls` shows it; its beginning is enough when only one begins so
        id: String,
    },
}

/// See [`Command::Certificate`].
#[derive(Debug, Subcommand)]
pub(crate) enum Certificate {
    /// All of them, with what went wrong
    Ls {
        #[command(flatten)]
        admin: Admin,
    },
    /// Try again now what failed
    Retry {
        #[command(flatten)]
        admin: Admin,
        /// For which name
        name: String,
    },
}

/// See [`Command::Usage`].
#[derive(Args, Debug)]
pub(crate) struct Usage {
    #[command(flatten)]
    pub(crate) admin: Admin,
    /// Of this account only
    pub(crate) account: Option<String>,
    /// A line for each session instead of each account
    #[arg(long)]
    pub(crate) sessions: bool,
    /// What began in this time before now
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) last: Option<Duration>,
}
