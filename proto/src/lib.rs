//! What RVPN says on the wire, and what it does to a packet.
//!
//! Everything here is pure: bytes in, bytes out. No sockets, no clocks, no
//! `unsafe`, so all of it can be tested by table, by property and by fuzzer.
#![forbid(unsafe_code)]

pub mod checksum;
pub mod control;
pub mod dialect;
pub mod frame;
pub mod gso;
pub mod name;
pub mod nat;
pub mod packer;
pub mod packet;
pub mod queue;
pub mod record;
pub mod sniff;
pub mod streams;
pub mod validate;
