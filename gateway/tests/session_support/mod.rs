//! What the session tests share.
#![expect(dead_code, reason = "every test program uses another part of this")]

pub(crate) mod fake_helper;
pub(crate) mod lab;
pub(crate) mod plain;
pub(crate) mod wire;
