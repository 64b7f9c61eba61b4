//! A frame's header: text, separated by commas.

use std::fmt;

/// What a frame is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word<'a> {
    /// Bytes of a visitor, by service.
    Data(&'a str),
    /// A command, or the answer to one.
    Control,
    /// A visitor has come.
    Connection,
    /// A side has closed in order.
    End,
    /// A side has closed otherwise.
    Error,
    /// Too much has arrived for now.
    Pause,
    /// More may come.
    Resume,
}

impl<'a> Word<'a> {
    /// The meaning of the fifth field.
    pub fn of(service: &'a str) -> Word<'a> {
        match service {
            "control" => Word::Control,
            "connection" => Word::Connection,
            "end" => Word::End,
            "error" => Word::Error,
            "pause" => Word::Pause,
            "resume" => Word::Resume,
            data => Word::Data(data),
        }
    }

    /// As it is written.
    pub fn as_str(self) -> &'a str {
        match self {
            Word::Data(service) => service,
            Word::Control => "control",
            Word::Connection => "connection",
            Word::End => "end",
            Word::Error => "error",
            Word::Pause => "pause",
            Word::Resume => "resume",
        }
    }
}

/// A frame's header as it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head<'a> {
    /// Whose it is: family, address and port, exactly as they are written,
    /// with the commas between them. Clients give back what they were given.
    pub id: &'a str,
    /// What it is.
    pub word: Word<'a>,
    /// Bytes of the body.
    pub length: usize,
    /// The port the visitor came to, if it is said.
    pub service_port: &'a str,
    /// The name the visitor asked for, if it is said.
    pub name: &'a str,
    /// What the visitor speaks, where the word is about a visitor that has come.
    pub speaks: &'a str,
}

/// Why bytes are no frame. Nothing after it can be told apart any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A frame begins with something else.
    Version {
        /// The byte.
        first: u8,
    },
    /// The header is not printable text.
    NotText,
    /// The header has fewer than five fields.
    Fields {
        /// How many it has.
        fields: usize,
    },
    /// The length is not a number.
    Length,
    /// The body is longer than anybody needs.
    TooLong {
        /// As it says.
        length: usize,
        /// As it may be.
        limit: usize,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Version { first } => write!(f, "a frame of version {}", 255 - first),
            Fault::NotText => f.write_str("a frame header that is not text"),
            Fault::Fields { fields } => write!(f, "a frame header of {fields} fields"),
            Fault::Length => f.write_str("a frame length that is not a number"),
            Fault::TooLong { length, limit } => {
                write!(f, "a frame of {length} bytes where {limit} are allowed")
            }
        }
    }
}

impl std::error::Error for Fault {}

/// Where the fields of a header lie in it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fields {
    id: Span,
    length: usize,
    service: Span,
    service_port: Span,
    name: Span,
    speaks: Span,
}

/// A part of a header, which has at most 255 bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    from: u8,
    to: u8,
}

impl Span {
    fn of(self, header: &str) -> &str {
        header
            .get(usize::from(self.from)..usize::from(self.to))
            .unwrap_or_default()
    }
}

impl Fields {
    /// Finds them. Space around a field is nobody's, except in the id.
    pub(super) fn find(header: &[u8]) -> Result<Fields, Fault> {
        let text = text(header).ok_or(Fault::NotText)?;
        let mut fields = [Span::default(); 8];
        let (mut count, mut at) = (0, 0);
        for field in text.split(',') {
            if let Some(slot) = fields.get_mut(count) {
                let start = at + field.len() - field.trim_ascii_start().len();
                let from = u8::try_from(start).map_err(|_| Fault::NotText)?;
                let to = start + field.trim_ascii().len();
                let to = u8::try_from(to).map_err(|_| Fault::NotText)?;
                *slot = Span { from, to };
            }
            if count == 2 {
                let to = u8::try_from(at + field.len()).map_err(|_| Fault::NotText)?;
                fields[0] = Span { from: 0, to };
            }
            count += 1;
            at += field.len() + 1;
        }
        if count < 5 {
            return Err(Fault::Fields { fields: count });
        }
        let [id, _, _, length, service, service_port, name, speaks] = fields;
        Ok(Fields {
            id,
            length: number(length.of(text)).ok_or(Fault::Length)?,
            service,
            service_port,
            name,
            speaks,
        })
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    pub(super) fn head<'a>(&self, header: &'a [u8]) -> Head<'a> {
        let text = text(header).unwrap_or_default();
        Head {
            id: self.id.of(text),
            word: Word::of(self.service.of(text)),
            length: self.length,
            service_port: self.service_port.of(text),
            name: self.name.of(text),
            speaks: self.speaks.of(text),
        }
    }
}

/// Printable ASCII, and the line break that one client ends its header with.
fn text(header: &[u8]) -> Option<&str> {
    let plain = |b: &u8| matches!(b, b' '..=b'~' | b'\n' | b'\r');
    match header.iter().all(plain) {
        true => std::str::from_utf8(header).ok(),
        false => None,
    }
}

/// Digits only: no sign, and no more of them than any length has.
fn number(digits: &str) -> Option<usize> {
    let fits = (1..=10).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
    fits.then(|| digits.parse().ok()).flatten()
}
