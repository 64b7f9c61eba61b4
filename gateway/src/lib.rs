//! The gateway's parts, as a library so that tests and benches can hold them.

pub mod cores;
pub mod fd;
pub mod helper;
pub mod meter;
pub mod session;
pub mod ticket;
pub mod tun;
