//! The first message of TLS: whom the visitor asks for and what it can do.
//!
//! It may be spread over records and segments in any way. Only what decides
//! where the connection goes is read; whoever ends TLS reads it all again.

use super::alert::Alert;
use super::cursor::{Cursor, RECORD_HEADER};
use crate::name::Name;

/// Longest greeting. With keys that resist quantum computers they have about two thousand bytes.
pub const HELLO_LIMIT: usize = 16 * 1024;
/// What is kept of the records it is in: many small ones have as many headers.
pub const RECORDS_LIMIT: usize = 24 * 1024;
/// Longest record without encryption.
const RECORD_LIMIT: usize = 16 * 1024;

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
/// Kind and length of a handshake message.
const MESSAGE_HEADER: usize = 4;

const SERVER_NAME: u16 = 0;
const PROTOCOLS: u16 = 16;
const SUPPORTED_VERSIONS: u16 = 43;
const TLS12: u16 = 0x0303;
const TLS13: u16 = 0x0304;

/// What a visitor says first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientHello {
    /// Whom it asks for, canonical. An address counts as a name here; TLS has no
    /// place for one, but some clients put it there.
    pub name: Option<Name>,
    /// What it would speak inside.
    pub protocols: Protocols,
    /// Whether it can do TLS 1.2.
    pub tls12: bool,
    /// Whether it can do TLS 1.3.
    pub tls13: bool,
}

/// Protocols that a visitor offers (ALPN), as far as they matter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Protocols {
    /// How many it names.
    pub count: u16,
    /// `http/1.1` is among them.
    pub http11: bool,
    /// `h2` is.
    pub http2: bool,
    /// `acme-tls/1` is: an authority checks the name.
    pub acme: bool,
}

/// What the bytes so far are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reading {
    /// The beginning of a greeting.
    More,
    /// A greeting.
    Hello(ClientHello),
    /// None that can be answered with anything but this.
    Bad(Alert),
}

/// Reads a greeting as it arrives. Every byte is looked at once until the
/// greeting is whole, and once more then.
#[derive(Clone, Debug, Default)]
pub struct HelloReader {
    /// Where the record begins whose end has not been seen.
    record: usize,
    /// Bytes of the message in the records before it.
    before: usize,
}

impl HelloReader {
    /// From the beginning.
    pub fn new() -> HelloReader {
        HelloReader::default()
    }

    /// Looks at all bytes of the connection so far: those of the last call and
    /// what came since.
    pub fn read(&mut self, bytes: &[u8]) -> Reading {
        self.find(bytes).unwrap_or_else(Reading::Bad)
    }

    fn find(&mut self, bytes: &[u8]) -> Result<Reading, Alert> {
        let whole = bytes.len();
        let bytes = &bytes[..whole.min(RECORDS_LIMIT)];
        loop {
            let from = bytes.get(self.record..).unwrap_or_default();
            let length = check_header(from)?;
            let Some(length) = length else { break };
            let content = &from[RECORD_HEADER..];
            let here = content.len().min(length);
            let have = self.before + here;
            if let Some(message) = message_length(bytes, have)?
                && have >= message
            {
                return parse(Cursor::new(bytes, message)).map(Reading::Hello);
            }
            if content.len() < length {
                break;
            }
            self.before = have;
            self.record += RECORD_HEADER + length;
        }
        match whole > RECORDS_LIMIT {
            true => Err(Alert::Decode),
            false => Ok(Reading::More),
        }
    }
}

/// The length of the record that begins here, as soon as it is known, each byte
/// judged as it comes.
fn check_header(bytes: &[u8]) -> Result<Option<usize>, Alert> {
    let kind = bytes.first().copied().unwrap_or(HANDSHAKE);
    let major = bytes.get(1).copied().unwrap_or(3);
    if kind != HANDSHAKE {
        return Err(Alert::UnexpectedMessage);
    }
    if major != 3 {
        return Err(Alert::ProtocolVersion);
    }
    let Some((header, _)) = bytes.split_first_chunk::<RECORD_HEADER>() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
    match length {
        1..=RECORD_LIMIT => Ok(Some(length)),
        // Empty ones could go on for ever.
        _ => Err(Alert::Decode),
    }
}

/// The length of the whole message with its header, as soon as it is known.
fn message_length(bytes: &[u8], have: usize) -> Result<Option<usize>, Alert> {
    let mut message = Cursor::new(bytes, have);
    if have > 0 && message.u8()? != CLIENT_HELLO {
        return Err(Alert::UnexpectedMessage);
    }
    if have < MESSAGE_HEADER {
        return Ok(None);
    }
    let high = usize::from(message.u8()?);
    let length = (high << 16) + usize::from(message.u16()?) + MESSAGE_HEADER;
    match length <= HELLO_LIMIT {
        true => Ok(Some(length)),
        false => Err(Alert::Decode),
    }
}

fn parse(mut message: Cursor<'_>) -> Result<ClientHello, Alert> {
    message.skip(MESSAGE_HEADER)?;
    let version = message.u16()?;
    // The random bytes.
    message.skip(32)?;
    let session = message.part8()?;
    let suites = message.part16()?;
    let compressions = message.part8()?;
    let odd = session.len() > 32
        || suites.is_empty()
        || !suites.len().is_multiple_of(2)
        || compressions.is_empty();
    if odd {
        return Err(Alert::Decode);
    }
    let mut found = Extensions::default();
    if !message.is_empty() {
        let mut extensions = message.part16()?;
        while !extensions.is_empty() {
            let kind = extensions.u16()?;
            let content = extensions.part16()?;
            found.take(kind, content)?;
        }
    }
    if !message.is_empty() {
        return Err(Alert::Decode);
    }
    let (tls12, tls13) = found.versions.unwrap_or((version >= TLS12, false));
    if !tls12 && !tls13 {
        return Err(Alert::ProtocolVersion);
    }
    Ok(ClientHello {
        name: found.name,
        protocols: found.protocols.unwrap_or_default(),
        tls12,
        tls13,
    })
}

#[derive(Default)]
struct Extensions {
    named: bool,
    name: Option<Name>,
    protocols: Option<Protocols>,
    versions: Option<(bool, bool)>,
}

impl Extensions {
    fn take(&mut self, kind: u16, content: Cursor<'_>) -> Result<(), Alert> {
        let again = match kind {
            SERVER_NAME => std::mem::replace(&mut self.named, true),
            PROTOCOLS => self.protocols.is_some(),
            SUPPORTED_VERSIONS => self.versions.is_some(),
            // Also what nobody knows, which clients send so that it stays allowed.
            _ => return Ok(()),
        };
        if again {
            return Err(Alert::IllegalParameter);
        }
        match kind {
            SERVER_NAME => self.name = Some(server_name(content)?),
            PROTOCOLS => self.protocols = Some(protocols(content)?),
            _ => self.versions = Some(versions(content)?),
        }
        Ok(())
    }
}

/// There is one name in the list, or the visitor wants two things at once.
fn server_name(mut content: Cursor<'_>) -> Result<Name, Alert> {
    let mut list = content.part16()?;
    if !content.is_empty() {
        return Err(Alert::Decode);
    }
    let mut name = None;
    while !list.is_empty() {
        // Names of hosts are of kind 0; there never was another.
        let kind = list.u8()?;
        let text = list.part16()?;
        if kind != 0 || name.is_some() {
            return Err(Alert::IllegalParameter);
        }
        name = Some(host(text)?);
    }
    name.ok_or(Alert::Decode)
}

fn host(mut text: Cursor<'_>) -> Result<Name, Alert> {
    // The longest name and the dot at its end.
    let mut buffer = [0; 254];
    let text_bytes = buffer
        .get_mut(..text.len())
        .ok_or(Alert::UnrecognizedName)?;
    text.fill(text_bytes)?;
    let text = std::str::from_utf8(text_bytes).map_err(|_| Alert::UnrecognizedName)?;
    Name::parse(text).map_err(|_| Alert::UnrecognizedName)
}

fn protocols(mut content: Cursor<'_>) -> Result<Protocols, Alert> {
    let mut list = content.part16()?;
    if !content.is_empty() || list.is_empty() {
        return Err(Alert::Decode);
    }
    let mut found = Protocols::default();
    while !list.is_empty() {
        let mut one = list.part8()?;
        let length = one.len();
        if length == 0 {
            return Err(Alert::Decode);
        }
        let mut buffer = [0; 10];
        if let Some(text) = buffer.get_mut(..length) {
            one.fill(text)?;
            match &*text {
                b"http/1.1" => found.http11 = true,
                b"h2" => found.http2 = true,
                b"acme-tls/1" => found.acme = true,
                _ => {}
            }
        }
        found.count += 1;
    }
    Ok(found)
}

fn versions(mut content: Cursor<'_>) -> Result<(bool, bool), Alert> {
    let mut list = content.part8()?;
    if !content.is_empty() || list.is_empty() {
        return Err(Alert::Decode);
    }
    let (mut tls12, mut tls13) = (false, false);
    while !list.is_empty() {
        let version = list.u16()?;
        tls12 |= version == TLS12;
        tls13 |= version == TLS13;
    }
    Ok((tls12, tls13))
}
