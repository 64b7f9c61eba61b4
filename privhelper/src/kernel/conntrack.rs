//! Forgetting the flows of one lease, and proving it.

use std::io;

use super::Kernel;
use super::netlink::{message, unless};

const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;
const CTA_MARK: u16 = 8;
const CTA_MARK_MASK: u16 = 21;
/// Any family, version 0, no resource.
const ANY: [u8; 4] = [0; 4];

/// Deletes the flows whose mark matches; others are walked past, not touched.
pub(crate) fn flush(k: &mut Kernel, mark: u32, mask: u32) -> io::Result<()> {
    let which = attrs![CTA_MARK => mark, CTA_MARK_MASK => mask];
    // No connection tracking yet, or nothing that matches.
    unless(libc::ENOENT, k.filter.run(message(DELETE, 0, &ANY, &which)))
}

/// How many flows bear a matching mark; the kernel does the filtering.
pub(crate) fn count(k: &mut Kernel, mark: u32, mask: u32) -> io::Result<usize> {
    let which = attrs![CTA_MARK => mark, CTA_MARK_MASK => mask];
    let flows = k.filter.dump(GET, &ANY, &which, |_, found| found.push(()));
    flows.map(|f| f.len())
}
