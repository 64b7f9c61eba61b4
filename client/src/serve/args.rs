//! The command line of `serve`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::cli::Choice;

const EXAMPLES: &str = "\
Examples:
  rvpn serve 3000                                  a web server on port 3000, under a name of yours
  rvpn serve http://127.0.0.1:3000 --name app      the same under app.YOUR-NAME
  rvpn serve tls://:8443 --name shop.example.org   TLS untouched: the certificate stays here
  rvpn serve ssh                                   the SSH server of this machine
  rvpn serve tcp:5432 --port 15432                 anything, on a port of the gateway
  rvpn serve 3000 tls://:8443 --name app --name shop   several at once
  rvpn serve 3000 --auth basic                     asks visitors for a password first
  rvpn serve 3000 --bg; rvpn serve status; rvpn serve stop

Exit status: 1 wrong usage, 69 the gateway cannot be reached, 76 it is too old or not
one, 77 the login or the name is not allowed, 78 no gateway is configured.";

/// See [`crate::cli::Command::Serve`].
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Serve {
    #[command(flatten)]
    pub(crate) choice: Choice,
    /// PORT, http://HOST:PORT, tls://HOST:PORT, ssh or tcp:PORT; or 'status' or 'stop'
    #[arg(required_unless_present = "locals")]
    pub(crate) targets: Vec<String>,
    /// Under this name: whole, or a part before what the login may serve (for each target in turn)
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Vec<String>,
    /// On this port of the gateway (for each tcp target in turn)
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) port: Vec<u16>,
    /// Ask visitors of http targets for a user and password before anything reaches the server
    #[arg(long, value_enum, value_name = "KIND")]
    pub(crate) auth: Option<AuthKind>,
    /// File with USER:PASSWORD lines (mode 0600) for --auth; otherwise RVPN_SERVE_AUTH, or asked for
    #[arg(long, value_name = "FILE", requires = "auth")]
    pub(crate) auth_file: Option<PathBuf>,
    /// Tell the local server the visitor's address by PROXY protocol, version 2
    #[arg(long)]
    pub(crate) proxy_protocol: bool,
    /// Connections to the gateway, each with a thread here and a core there: for many busy visitors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(crate) connections: u8,
    /// One JSON object a line
    #[arg(long)]
    pub(crate) json: bool,
    /// Return once it is served, and go on in the background
    #[arg(long)]
    pub(crate) bg: bool,
    /// As older clients have it: http:NAME:3000,https:NAME:8443
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        conflicts_with = "targets",
        requires = "stunneld",
        hide_short_help = true
    )]
    pub(crate) locals: Vec<String>,
    /// As older clients have it: wss://HOST:PORT/
    #[arg(long, value_name = "URL", requires = "locals", hide_short_help = true)]
    pub(crate) stunneld: Option<String>,
    /// SHA-256 of the certificate of --stunneld, to believe that one only
    #[arg(
        long,
        value_name = "HEX",
        requires = "stunneld",
        hide_short_help = true
    )]
    pub(crate) pin: Option<String>,
    /// As older clients have it: what signs the names of --locals; '-' reads it from standard input
    #[arg(
        long,
        value_name = "SECRET",
        env = "RVPN_SERVE_SECRET",
        hide_env_values = true,
        conflicts_with = "token",
        hide_short_help = true
    )]
    pub(crate) secret: Option<String>,
    /// As older clients have it: a token that is signed already; '-' reads it from standard input
    #[arg(
        long,
        value_name = "TOKEN",
        env = "RVPN_SERVE_TOKEN",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub(crate) token: Option<String>,
}

/// How visitors are asked who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AuthKind {
    /// HTTP Basic.
    Basic,
}
