//! What attacks have in common: the taken-over gateway, calls made from inside
//! another process, and the reading of what a process has said to the kernel.

pub mod inject;
pub mod netlink;
pub mod trace;

use std::process::Command;

use serde_json::Value;

use crate::helper::{Helper, bin};
use crate::topology::Lab;

/// A taken-over gateway that is to try this.
pub fn evil_command(helper: &Helper, attack: &str, number: u64) -> Command {
    let mut c = Command::new(bin("evil-gw"));
    c.arg(&helper.socket)
        .arg(helper.uid.to_string())
        .arg(helper.gateway_uid.to_string());
    c.arg(attack).arg(number.to_string());
    c
}

/// Lets a taken-over gateway try this, and returns what it saw.
#[track_caller]
pub fn evil(lab: &Lab, helper: &Helper, attack: &str, number: u64) -> Value {
    let out = lab.gw.output(&mut evil_command(helper, attack, number));
    let (text, errors) = (
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
    );
    assert!(
        out.status.success(),
        "{attack}: {errors}; helper: {}",
        helper.log()
    );
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{attack}: {e}: {text}"))
}
