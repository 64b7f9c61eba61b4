//! (nat)
