//! (packet)
