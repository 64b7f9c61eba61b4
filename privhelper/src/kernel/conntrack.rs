//! Forgetting the flows of one lease, and proving it.

use std::io;

use super::Kernel;
use super::netlink::{message, unless};

const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;
const CTA_MARK: u16 = 8;
const CTA_MARK_MASK: u16 = 21;

/// About the flows of any family whose mark matches.
fn about(kind: u16, flags: libc::c_int, mark: u32, mask: u32) -> Vec<u8> {
    let which = attrs![CTA_MARK => mark, CTA_MARK_MASK => mask];
    message(kind, flags, &[0; 4], &which)
}

/// Deletes the flows whose mark matches; others are walked past, not touched.
pub(crate) fn flush(k: &mut Kernel, mark: u32, mask: u32) -> io::Result<()> {
    // No connection tracking yet, or nothing that matches.
    unless(libc::ENOENT, k.filter.run(about(DELETE, 0, mark, mask)))
}

/// How many flows bear a matching mark; the kernel does the filtering.
pub(crate) fn count(k: &mut Kernel, mark: u32, mask: u32) -> io::Result<usize> {
    let question = about(GET, libc::NLM_F_DUMP, mark, mask);
    k.filter.ask(question, |_| Some(())).map(|all| all.len())
}
