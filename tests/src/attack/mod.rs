//! What attacks have in common: calls made from inside another process, and the
//! reading of what a process has said to the kernel.

pub mod inject;
