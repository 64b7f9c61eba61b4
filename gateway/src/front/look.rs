//! Reading as much of a connection as it takes to tell what it is.
//!
//! What was read is kept and read again by whoever is next. The kernel is asked
//! for new bytes only, never for the same ones twice.

use std::io;
use std::time::Duration;

use rvpn_proto::sniff::alert::Alert;
use rvpn_proto::sniff::{Class, ClientHello, HelloReader, RECORDS_LIMIT, Reading, classify};
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use crate::admit::{Counted, Prefixed, Raw};
use crate::config::Mode;

/// How long a visitor says nothing who waits to be spoken to.
pub(super) const SILENCE: Duration = Duration::from_secs(1);
/// What is read at first: most greetings and requests fit.
const FIRST_BYTES: usize = 2048;

/// What a connection is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// TLS, and what its greeting says.
    Tls(ClientHello),
    /// TLS that cannot be answered with anything but this.
    BadTls(Alert),
    /// HTTP/1, or whatever comes where nothing else is expected.
    Http,
    /// HTTP/2 without TLS.
    Http2,
    /// SSH.
    Ssh,
    /// Something else.
    Other,
    /// Nothing yet: the server is expected to speak first.
    Silent,
}

/// What a connection is, and the bytes that say so.
pub(super) struct Seen {
    pub(super) what: What,
    bytes: Vec<u8>,
}

/// Longest head of a request in which its host is looked for.
const HEAD: usize = 8 * 1024;

impl Seen {
    /// Whether what seems to be a request says for which host it is. Reads on
    /// until its head is there, but not for longer than this.
    pub(super) async fn names_a_host(&mut self, counted: &mut Counted, patience: Duration) -> bool {
        let reading = async {
            while !ends(&self.bytes) && self.bytes.len() < HEAD {
                if more(counted, &mut self.bytes).await.is_err() {
                    return;
                }
            }
        };
        // What came by then is what counts.
        drop(timeout(patience, reading).await);
        let lines = self.bytes.split(|b| *b == b'\n').skip(1);
        let head = lines.take_while(|l| !l.trim_ascii().is_empty());
        let mut names = head.filter_map(|l| l.split(|b| *b == b':').next());
        names.any(|name| name.eq_ignore_ascii_case(b"host"))
    }

    /// The connection as if nothing had been read.
    pub(super) fn replayed(self, counted: Counted) -> Raw {
        Prefixed::new(self.bytes.into(), counted)
    }
}

/// Looks until it is clear. An end before that is an error; a deadline is the
/// caller's matter.
pub(super) async fn look(
    counted: &mut Counted,
    mode: Mode,
    silence: Option<Duration>,
) -> io::Result<Seen> {
    let bytes = Vec::new();
    if mode == Mode::Plain {
        let what = What::Http;
        return Ok(Seen { what, bytes });
    }
    // Whoever says nothing costs no buffer.
    let first = counted.read_first(FIRST_BYTES);
    let mut bytes = match silence.filter(|_| mode == Mode::Auto) {
        None => first.await?,
        Some(patience) => match timeout(patience, first).await {
            Ok(first) => first?,
            Err(_) => {
                let what = What::Silent;
                return Ok(Seen { what, bytes });
            }
        },
    };
    if bytes.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut reader = HelloReader::new();
    let what = loop {
        match classify(&bytes) {
            None => {}
            Some(Class::Tls) => match reader.read(&bytes) {
                Reading::More => {}
                Reading::Hello(hello) => break What::Tls(hello),
                Reading::Bad(alert) => break What::BadTls(alert),
            },
            Some(Class::Ssl2) => break What::BadTls(Alert::ProtocolVersion),
            Some(Class::Http) => break What::Http,
            Some(Class::Http2) => break What::Http2,
            Some(Class::Ssh) => break What::Ssh,
            Some(Class::Other) => break What::Other,
        }
        more(counted, &mut bytes).await?;
    };
    Ok(Seen { what, bytes })
}

fn ends(head: &[u8]) -> bool {
    head.windows(4).any(|w| w == b"\r\n\r\n")
}

/// Reads once. The buffer grows in steps and never beyond what a greeting may take.
async fn more(counted: &mut Counted, bytes: &mut Vec<u8>) -> io::Result<()> {
    if bytes.len() == bytes.capacity() {
        // One byte more than it may take, so that too much is seen as such.
        let most = RECORDS_LIMIT + 1;
        let wanted = (bytes.capacity() * 2).clamp(FIRST_BYTES, most);
        bytes.reserve_exact(wanted.saturating_sub(bytes.len()).max(1));
    }
    match counted.read_buf(bytes).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}
