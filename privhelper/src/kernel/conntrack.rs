//! Forgetting the flows of one lease, and proving it.

use std::io;

use super::netlink::{Buf, Socket};

const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;
const CTA_MARK: u16 = 8;
const CTA_MARK_MASK: u16 = 21;
/// Any family, version 0, no resource.
const ANY: [u8; 4] = [0; 4];

fn filter(b: &mut Buf, mark: u32, mask: u32) {
    b.be32(CTA_MARK, mark).be32(CTA_MARK_MASK, mask);
}

/// Deletes the flows whose mark matches; others are walked past, not touched.
pub(crate) fn flush(socket: &mut Socket, mark: u32, mask: u32) -> io::Result<()> {
    let mut b = Buf::default();
    b.message(DELETE, libc::NLM_F_ACK, &ANY, |b| filter(b, mark, mask));
    match socket.run(&mut b) {
        // No connection tracking yet, or nothing that matches.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT)) => Ok(()),
        other => other,
    }
}

/// How many flows bear a matching mark; the kernel does the filtering.
pub(crate) fn count(socket: &mut Socket, mark: u32, mask: u32) -> io::Result<usize> {
    let n = std::cell::Cell::new(0);
    socket.dump(
        GET,
        &ANY,
        |b| filter(b, mark, mask),
        |_| n.set(n.get() + 1),
        || n.set(0),
    )?;
    Ok(n.get())
}
