//! A stream in the hands of whoever uses it.

use std::fmt;
use std::io;
use std::task::{Context, Poll};

use super::Mux;

/// A stream. Dropping it before both sides have finished cuts it off; what was
/// finished is still sent.
pub struct Handle {
    mux: Mux,
    id: u32,
}

/// Why a stream cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// It was cut off by the other side, or here for what it held.
    Reset,
    /// The connection is over.
    Lost,
    /// It was finished already.
    Finished,
}

impl From<Broken> for io::Error {
    fn from(broken: Broken) -> io::Error {
        let (kind, text) = match broken {
            Broken::Reset => (io::ErrorKind::ConnectionReset, "the stream was cut off"),
            Broken::Lost => (io::ErrorKind::ConnectionAborted, "the connection is over"),
            Broken::Finished => (io::ErrorKind::BrokenPipe, "the stream was finished"),
        };
        io::Error::new(kind, text)
    }
}

impl Handle {
    pub(super) fn new(mux: Mux, id: u32) -> Handle {
        Handle { mux, id }
    }

    /// Its number on the wire.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Reads; nothing is the end of what the other side had to say.
    pub fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<Result<usize, Broken>> {
        self.mux.with(|core| core.poll_read(self.id, cx, into))
    }

    /// Writes as much as there is room for.
    pub fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, Broken>> {
        self.mux.with(|core| core.poll_write(self.id, cx, bytes))
    }

    /// Says that nothing more will be written.
    pub fn finish(&mut self) -> Result<(), Broken> {
        self.mux.with(|core| core.finish(self.id))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.mux.with(|core| core.leave(self.id));
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Handle").field(&self.id).finish()
    }
}
