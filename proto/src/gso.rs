//! (gso)
