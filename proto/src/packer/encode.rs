//! From frames to bytes.

use std::fmt;
use std::io::Write;

use super::VERSION;
use super::head::Word;
use super::profile::Profile;

/// A frame to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// Whose: see [`super::Head::id`].
    pub id: &'a str,
    /// What.
    pub word: Word<'a>,
    /// The port the visitor came to.
    pub service_port: u16,
    /// The name it asked for.
    pub name: &'a str,
    /// What it speaks.
    pub speaks: &'a str,
    /// The body.
    pub body: &'a [u8],
}

/// The header would not fit into its 255 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong;

impl fmt::Display for TooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a frame header over 255 bytes")
    }
}

impl std::error::Error for TooLong {}

impl Frame<'_> {
    /// A frame about the connection itself.
    pub fn control(body: &[u8]) -> Frame<'_> {
        Frame {
            id: super::NO_STREAM,
            word: Word::Control,
            service_port: 0,
            name: "",
            speaks: "",
            body,
        }
    }

    /// Appends the frame as this client takes it. A name that is too long for
    /// the header is left out: it is in the first bytes as well.
    pub fn encode(&self, profile: Profile, out: &mut Vec<u8>) -> Result<(), TooLong> {
        let mut header = [0; 255];
        let length = self.header(profile, self.name, &mut header);
        let length = match length {
            Err(TooLong) if !self.name.is_empty() => self.header(profile, "", &mut header)?,
            done => done?,
        };
        out.reserve(2 + usize::from(length) + self.body.len());
        out.extend_from_slice(&[VERSION, length]);
        out.extend_from_slice(&header[..usize::from(length)]);
        out.extend_from_slice(self.body);
        Ok(())
    }

    fn header(&self, profile: Profile, name: &str, out: &mut [u8; 255]) -> Result<u8, TooLong> {
        let mut rest = &mut out[..];
        let (id, size, word) = (self.id, self.body.len(), self.word.as_str());
        let port = self.service_port;
        let written = match self.word {
            Word::Control => write!(rest, "{id},{size},{word}"),
            Word::Connection => {
                let speaks = self.speaks;
                write!(rest, "{id},{size},{word},{port},{name},{speaks}")
            }
            _ if !profile.names_visitors() => write!(rest, "{id},{size},{word}"),
            _ => write!(rest, "{id},{size},{word},{port},{name}"),
        };
        written.map_err(|_| TooLong)?;
        let left = rest.len();
        u8::try_from(out.len() - left).map_err(|_| TooLong)
    }
}
