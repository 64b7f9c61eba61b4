//! Whom a connection's first request is for, found out without answering it.
//!
//! Only the way is chosen here. Whoever takes the connection reads the request
//! again, strictly; so a head that can be read in two ways gains nothing.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rvpn_proto::name::Name;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

use crate::config::Config;
use crate::serve::table::Table;

/// More is no head; who answers says so.
const LIMIT: usize = 16 * 1024;

/// What came first.
#[derive(Debug, PartialEq, Eq)]
pub enum First {
    /// A request, or something else, for the gateway itself.
    Ours(Bytes),
    /// A request for a name that clients serve, or could.
    Theirs(Bytes, Name),
    /// The beginning of something that did not go on in time.
    Late,
    /// Nothing.
    Nothing,
}

/// Reads the first head and tells whose it is.
pub async fn look(
    io: &mut (impl AsyncRead + Unpin),
    config: &Config,
    table: &Table,
    limit: Duration,
) -> First {
    let mut bytes = BytesMut::with_capacity(1024);
    let read = timeout(limit, read_head(io, &mut bytes)).await;
    match read {
        Err(_) | Ok(Err(_)) if bytes.is_empty() => First::Nothing,
        Err(_) => First::Late,
        // What was sent before the end is for whoever answers it.
        Ok(Ok(()) | Err(_)) => match theirs(&bytes, config, table) {
            Some(name) => First::Theirs(bytes.freeze(), name),
            None => First::Ours(bytes.freeze()),
        },
    }
}

async fn read_head(io: &mut (impl AsyncRead + Unpin), bytes: &mut BytesMut) -> std::io::Result<()> {
    let mut seen = 0;
    loop {
        if has_end(bytes, seen) || bytes.len() >= LIMIT {
            return Ok(());
        }
        seen = bytes.len();
        if io.read_buf(bytes).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Whether there is an empty line that ends no earlier than `seen`.
fn has_end(bytes: &[u8], seen: usize) -> bool {
    let new = &bytes[seen.saturating_sub(3)..];
    new.windows(2).any(|w| w == b"\n\n") || new.windows(3).any(|w| w == b"\n\r\n")
}

/// The name, if the request is not for us.
fn theirs(head: &[u8], config: &Config, table: &Table) -> Option<Name> {
    let host = header(head, "host")?;
    let (name, _) = Name::with_port(host).ok()?;
    if config.names.lists(name.as_str()) || config.is_admin_name(name.as_str()) {
        return None;
    }
    if config.names.answers_to(host_part(host)) {
        // An address, or any name at all: ours, unless somebody has a claim to
        // it. A WebSocket there is a client of the gateway.
        let upgrade = header(head, "upgrade").is_some();
        return (!upgrade && table.serves(&name)).then_some(name);
    }
    Some(name)
}

/// The host as it was written, without its port.
fn host_part(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((before, port)) if !port.contains(']') => before,
        _ => host,
    }
}

/// The value of a header that is there once.
fn header<'a>(head: &'a [u8], name: &str) -> Option<&'a str> {
    let lines = head.split(|b| *b == b'\n').skip(1);
    let mut values = lines
        .take_while(|l| !l.trim_ascii().is_empty())
        .filter_map(|line| {
            let colon = line.iter().position(|b| *b == b':')?;
            let (key, value) = line.split_at(colon);
            let fits = key.eq_ignore_ascii_case(name.as_bytes());
            fits.then(|| std::str::from_utf8(&value[1..]).unwrap_or("").trim())
        });
    match (values.next(), values.next()) {
        (Some(only), None) => Some(only),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn config() -> Config {
        let text =
            "names = [\"vpn.test\"]\nhelper.user = 7\n[[listener]]\naddress = \"[::]:443\"\n";
        Config::parse(text, Path::new("/x.toml"), |_| None).unwrap()
    }

    #[tokio::test]
    async fn pro_03_a_head_is_the_same_however_it_arrives() {
        let (config, table) = (config(), Table::default());
        for (text, name) in [
            (
                "GET / HTTP/1.1\r\nHost: A.ex:80\r\nX: y\r\n\r\nbody",
                Some("a.ex"),
            ),
            ("GET / HTTP/1.1\nhost:a.ex\n\n", Some("a.ex")),
            ("GET / HTTP/1.1\r\nHost: VPN.test\r\n\r\n", None),
            ("GET / HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n", None),
            ("GET / HTTP/1.1\r\nHost: [::1]\r\n\r\n", None),
            ("GET / HTTP/1.1\r\nHost: a.ex\r\nHost: b.ex\r\n\r\n", None),
            ("GET / HTTP/1.1\r\nHost: a.ex@b.ex\r\n\r\n", None),
            ("GET / HTTP/1.1\r\n\r\nHost: a.ex\r\n\r\n", None),
        ] {
            for step in [1, 2, 3, 7, text.len()] {
                let mut io = tokio_test_io(text.as_bytes(), step);
                let first = look(&mut io, &config, &table, Duration::from_secs(5)).await;
                let (bytes, found) = match first {
                    First::Ours(bytes) => (bytes, None),
                    First::Theirs(bytes, name) => (bytes, Some(name.to_string())),
                    other => panic!("{text}: {other:?}"),
                };
                assert_eq!(found.as_deref(), name, "{text}");
                assert!(
                    text.as_bytes().starts_with(&bytes),
                    "nothing is lost or added"
                );
            }
        }
    }

    /// Gives `step` bytes at a time, and then ends.
    fn tokio_test_io(bytes: &'static [u8], step: usize) -> impl AsyncRead + Unpin {
        let (mut write, read) = tokio::io::duplex(step);
        tokio::spawn(async move {
            for piece in bytes.chunks(step) {
                if tokio::io::AsyncWriteExt::write_all(&mut write, piece)
                    .await
                    .is_err()
                {
                    return;
                }
            }
        });
        read
    }

    #[tokio::test]
    async fn who_stops_in_the_middle_is_late_and_who_says_nothing_is_nobody() {
        let (config, table) = (config(), Table::default());
        let soon = Duration::from_millis(50);
        let (mut client, mut io) = tokio::io::duplex(100);
        assert_eq!(look(&mut io, &config, &table, soon).await, First::Nothing);
        tokio::io::AsyncWriteExt::write_all(&mut client, b"GET / HT")
            .await
            .unwrap();
        assert_eq!(look(&mut io, &config, &table, soon).await, First::Late);
        drop(client);
        assert_eq!(look(&mut io, &config, &table, soon).await, First::Nothing);
    }
}
