//! From bytes to frames.

use super::VERSION;
use super::head::{Fault, Fields, Head, Word};

/// How long a body may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of a visitor's bytes. They are passed on as they come and take no room here.
    pub data: usize,
    /// Of everything else, which is gathered until it is whole.
    pub word: usize,
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Bytes of a visitor: all of a frame, or as much of it as has arrived.
    Data {
        /// Whose.
        head: Head<'a>,
        /// These, out of the input.
        bytes: &'a [u8],
        /// Whether the frame ends with them.
        last: bool,
    },
    /// A whole frame that is about a visitor, or about nobody.
    Word {
        /// What about.
        head: Head<'a>,
        /// Its body.
        body: &'a [u8],
    },
}

/// Reads frames out of bytes that come in any portions. It holds one header,
/// and the body of a word that is not whole yet.
#[derive(Debug)]
pub struct Decoder {
    limits: Limits,
    state: State,
    header: [u8; 255],
    word: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Version,
    HeaderLength,
    Header {
        have: u8,
        want: u8,
    },
    Data {
        fields: Fields,
        size: u8,
        left: usize,
    },
    Word {
        fields: Fields,
        size: u8,
    },
    Broken(Fault),
}

impl Decoder {
    /// Begins at the first byte of a connection.
    pub fn new(limits: Limits) -> Decoder {
        Decoder {
            limits,
            state: State::Version,
            header: [0; 255],
            word: Vec::new(),
        }
    }

    /// Bounds the frames from the next header on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Takes from the front of `input` what makes the next piece; `None` when
    /// all of it was taken. After a fault there are only faults.
    pub fn next<'a, 'i: 'a>(
        &'a mut self,
        input: &mut &'i [u8],
    ) -> Result<Option<Piece<'a>>, Fault> {
        loop {
            match self.state {
                State::Broken(fault) => return Err(fault),
                State::Version => {
                    let Some(first) = take_one(input) else {
                        return Ok(None);
                    };
                    if first != VERSION {
                        return Err(self.broken(Fault::Version { first }));
                    }
                    self.state = State::HeaderLength;
                }
                State::HeaderLength => {
                    let Some(want) = take_one(input) else {
                        return Ok(None);
                    };
                    self.state = State::Header { have: 0, want };
                }
                State::Header { have, want } => {
                    let room = &mut self.header[usize::from(have)..usize::from(want)];
                    let part = take(input, room.len());
                    room[..part.len()].copy_from_slice(part);
                    let left = room.len() - part.len();
                    if left > 0 {
                        let have = want - u8::try_from(left).unwrap_or(want);
                        self.state = State::Header { have, want };
                        return Ok(None);
                    }
                    self.begin(want)?;
                    // A frame without a body is whole now, not when more comes.
                    if let State::Data { fields, size, left } = self.state
                        && left == 0
                    {
                        self.state = State::Version;
                        let head = fields.head(&self.header[..usize::from(size)]);
                        return Ok(Some(Piece::Data {
                            head,
                            bytes: &[],
                            last: true,
                        }));
                    }
                }
                State::Data { fields, size, left } => {
                    let bytes = take(input, left);
                    if bytes.is_empty() {
                        return Ok(None);
                    }
                    let left = left - bytes.len();
                    self.state = match left {
                        0 => State::Version,
                        left => State::Data { fields, size, left },
                    };
                    let head = fields.head(&self.header[..usize::from(size)]);
                    return Ok(Some(Piece::Data {
                        head,
                        bytes,
                        last: left == 0,
                    }));
                }
                State::Word { fields, size } => {
                    let want = fields.length() - self.word.len();
                    let part = take(input, want);
                    if part.len() < want {
                        self.word.extend_from_slice(part);
                        return Ok(None);
                    }
                    self.state = State::Version;
                    let head = fields.head(&self.header[..usize::from(size)]);
                    let body = match self.word.is_empty() {
                        true => part,
                        false => {
                            self.word.extend_from_slice(part);
                            &self.word
                        }
                    };
                    return Ok(Some(Piece::Word { head, body }));
                }
            }
        }
    }

    /// Whether nothing of a frame is held: all that came was whole.
    pub fn is_between(&self) -> bool {
        matches!(self.state, State::Version)
    }

    /// The header is whole.
    fn begin(&mut self, size: u8) -> Result<(), Fault> {
        let header = &self.header[..usize::from(size)];
        let fields = match Fields::find(header) {
            Ok(fields) => fields,
            Err(fault) => return Err(self.broken(fault)),
        };
        let head = fields.head(header);
        let length = head.length;
        let data = matches!(head.word, Word::Data(_));
        let limit = match data {
            true => self.limits.data,
            false => self.limits.word,
        };
        if length > limit {
            return Err(self.broken(Fault::TooLong { length, limit }));
        }
        self.state = match data {
            true => State::Data {
                fields,
                size,
                left: length,
            },
            false => {
                // What the last one needed is given back, if that was much.
                self.word.clear();
                self.word.shrink_to(512);
                State::Word { fields, size }
            }
        };
        Ok(())
    }

    fn broken(&mut self, fault: Fault) -> Fault {
        self.state = State::Broken(fault);
        fault
    }
}

fn take_one(input: &mut &[u8]) -> Option<u8> {
    let (&first, rest) = input.split_first()?;
    *input = rest;
    Some(first)
}

fn take<'a>(input: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (part, rest) = input.split_at(most.min(input.len()));
    *input = rest;
    part
}
