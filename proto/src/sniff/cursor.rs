//! Reading a message that is spread over records, without putting it together.

use super::alert::Alert;

/// What precedes the content of every record.
pub(super) const RECORD_HEADER: usize = 5;

/// The handshake bytes of a run of records; the last may be cut off. The
/// headers have been checked.
#[derive(Clone)]
pub(super) struct Cursor<'a> {
    /// What is left of the current record.
    here: &'a [u8],
    /// The records behind it.
    rest: &'a [u8],
    /// Bytes of the message that may still be read.
    left: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(records: &'a [u8], length: usize) -> Cursor<'a> {
        Cursor {
            here: &[],
            rest: records,
            left: length,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// The next bytes that lie together, at most `most`.
    fn piece(&mut self, most: usize) -> Result<&'a [u8], Alert> {
        let most = most.min(self.left);
        while self.here.is_empty() {
            let (header, rest) = self
                .rest
                .split_first_chunk::<RECORD_HEADER>()
                .ok_or(Alert::Decode)?;
            let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
            (self.here, self.rest) = rest.split_at(length.min(rest.len()));
        }
        let (piece, here) = self.here.split_at(most.min(self.here.len()));
        self.here = here;
        self.left -= piece.len();
        Ok(piece)
    }

    /// Fills the buffer.
    pub(super) fn fill(&mut self, mut buffer: &mut [u8]) -> Result<(), Alert> {
        if buffer.len() > self.left {
            return Err(Alert::Decode);
        }
        while !buffer.is_empty() {
            let piece = self.piece(buffer.len())?;
            let (now, later) = buffer.split_at_mut(piece.len());
            now.copy_from_slice(piece);
            buffer = later;
        }
        Ok(())
    }

    pub(super) fn skip(&mut self, mut count: usize) -> Result<(), Alert> {
        if count > self.left {
            return Err(Alert::Decode);
        }
        while count > 0 {
            count -= self.piece(count)?.len();
        }
        Ok(())
    }

    pub(super) fn u8(&mut self) -> Result<u8, Alert> {
        let mut one = [0];
        self.fill(&mut one)?;
        Ok(one[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16, Alert> {
        let mut two = [0; 2];
        self.fill(&mut two)?;
        Ok(u16::from_be_bytes(two))
    }

    /// The next `count` bytes for themselves; this one goes on behind them.
    pub(super) fn part(&mut self, count: usize) -> Result<Cursor<'a>, Alert> {
        let mut part = self.clone();
        self.skip(count)?;
        part.left = count;
        Ok(part)
    }

    /// A part whose length stands in front of it in one byte.
    pub(super) fn part8(&mut self) -> Result<Cursor<'a>, Alert> {
        let count = self.u8()?;
        self.part(count.into())
    }

    /// A part whose length stands in front of it in two bytes.
    pub(super) fn part16(&mut self) -> Result<Cursor<'a>, Alert> {
        let count = self.u16()?;
        self.part(count.into())
    }

    pub(super) fn len(&self) -> usize {
        self.left
    }
}
