//! A file of 64-bit counters, mapped and shared with whoever reads it later.
//!
//! The kernel keeps what was stored in it when the process is killed, which is
//! the whole point: no system call, no journal, no loss.
#![expect(
    unsafe_code,
    reason = "mapping a file and giving its words out as atomics"
)]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The words of one mapped file.
#[derive(Debug)]
pub(super) struct Words {
    base: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread, and its words are reached as atomics only.
unsafe impl Send for Words {}
// SAFETY: as above; an atomic may be used from several threads at once.
unsafe impl Sync for Words {}

impl Words {
    /// Maps the whole of a file, whose length is a positive multiple of eight.
    /// The file is locked by us and private to our user, so nobody cuts it.
    pub(super) fn map(file: &File) -> io::Result<Words> {
        let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let length = NonZeroUsize::new(bytes).ok_or(io::ErrorKind::UnexpectedEof)?;
        if bytes % size_of::<AtomicU64>() != 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing of ours.
        let base = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, file, 0)? };
        Ok(Words {
            base: base.cast(),
            len: bytes / size_of::<AtomicU64>(),
        })
    }

    /// All of them.
    pub(super) fn all(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, holds len words of which any bits are valid,
        // is never moved, and lives as long as self.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made above, and no borrow of it outlives self.
        let unmapped = unsafe { munmap(self.base.cast(), self.len * size_of::<AtomicU64>()) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}
