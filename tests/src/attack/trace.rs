//! What a traced process said, byte for byte: strace with `-f -yy -e write=all`
//! prints every buffer sent below the call that sent it.

use std::collections::BTreeMap;

/// Arguments for [`Helper::wrapped_in`](crate::Helper::wrapped_in); the trace goes to `file`.
pub fn strace(file: &str) -> Vec<&str> {
    vec![
        "strace",
        "-f",
        "-qq",
        "-yy",
        "-s",
        "300",
        "-e",
        "write=all",
        "-o",
        file,
    ]
}

/// Where a buffer went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum To {
    Route,
    Netfilter,
    /// Any other netlink family.
    OtherNetlink,
    /// No netlink socket.
    Elsewhere,
}

/// One buffer.
#[derive(Clone, Debug)]
pub struct Sent {
    pub to: To,
    pub bytes: Vec<u8>,
}

/// One call, as strace shows it; an interrupted one where it began.
#[derive(Clone, Debug)]
pub struct Call {
    pub name: String,
    pub line: String,
    /// Buffers sent before it.
    pub sent_before: usize,
}

/// Splits a trace into its calls and the buffers sent.
pub fn read(trace: &str) -> (Vec<Call>, Vec<Sent>) {
    let (mut calls, mut sent) = (Vec::new(), Vec::new());
    let mut begun: BTreeMap<&str, To> = BTreeMap::new();
    let mut to = To::Elsewhere;
    let mut bytes = Vec::new();
    for line in trace.lines() {
        if let Some(dump) = line.strip_prefix(" | ") {
            bytes.extend(dumped(dump));
            continue;
        }
        if !bytes.is_empty() {
            let bytes = std::mem::take(&mut bytes);
            sent.push(Sent { to, bytes });
        }
        let Some((pid, rest)) = line.split_once(' ') else {
            continue;
        };
        let rest = rest.trim_start();
        if rest.starts_with("<... ") {
            to = begun.get(pid).copied().unwrap_or(To::Elsewhere);
        } else if let Some((name, _)) = rest.split_once('(') {
            to = destination(rest);
            begun.insert(pid, to);
            calls.push(Call {
                name: name.to_owned(),
                line: rest.to_owned(),
                sent_before: sent.len(),
            });
        }
    }
    if !bytes.is_empty() {
        sent.push(Sent { to, bytes });
    }
    (calls, sent)
}

/// By the first argument, a descriptor with what it is.
fn destination(call: &str) -> To {
    let first = call.split(',').next().unwrap_or_default();
    match first.split_once("<NETLINK:[") {
        Some((_, family)) if family.starts_with("ROUTE:") => To::Route,
        Some((_, family)) if family.starts_with("NETFILTER:") => To::Netfilter,
        Some(_) => To::OtherNetlink,
        None => To::Elsewhere,
    }
}

/// `00010  28 00 ...  text`: the offset, sixteen bytes in two groups, the same as text.
fn dumped(line: &str) -> impl Iterator<Item = u8> {
    const FIRST: usize = 7;
    const PER_LINE: usize = 16;
    let hex = line
        .get(FIRST..FIRST + 3 * PER_LINE + 1)
        .unwrap_or_default();
    hex.split_whitespace()
        .take(PER_LINE)
        .map_while(|b| u8::from_str_radix(b, 16).ok())
        .collect::<Vec<_>>()
        .into_iter()
}
