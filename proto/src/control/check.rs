//! Bounds of everything in a message.
//!
//! Texts end in logs and on terminals, lists in routing tables, so both are
//! limited here once instead of everywhere they are used.

use std::ops::RangeInclusive;

use super::error::{ControlError, What};
use super::message::{
    Counters, ErrorNotice, Goodbye, Hello, Limits, Message, Quota, Resolve, Resolved, Stats,
    Ticket, Welcome,
};

pub(crate) const NAME: usize = 128;
const ID: usize = 64;
const TICKET: usize = 512;
pub(crate) const TEXT: usize = 512;
const HOST: usize = 253;
pub(crate) const VERSIONS: usize = 16;
const CAPABILITIES: usize = 32;
const DNS: usize = 8;
const ROUTES: usize = 256;
const ADDRESSES: usize = 32;
/// A later gateway may use any; these are what a close frame may carry at all.
const CODES: RangeInclusive<u16> = 1000..=4999;
const MONTH_MS: u64 = 31 * 24 * 3600 * 1000;

impl Message {
    pub(super) fn check(&self) -> Result<(), ControlError> {
        match self {
            Self::Hello(hello) => check_hello(hello),
            Self::Welcome(welcome) => check_welcome(welcome),
            Self::Ticket(ticket) => check_ticket(ticket),
            Self::Resolve(Resolve { id: _, name }) => {
                filled("name", name)?;
                text("name", name, HOST)
            }
            Self::Resolved(resolved) => check_resolved(resolved),
            Self::Goodbye(goodbye) => check_goodbye(goodbye),
            Self::Error(error) => check_notice(error),
            // Numbers of which every value is possible.
            Self::Stats(Stats {
                outbound: None | Some(Counters { .. }),
                inbound: None | Some(Counters { .. }),
            })
            | Self::Quota(Quota { .. }) => Ok(()),
        }
    }
}

fn check_hello(hello: &Hello) -> Result<(), ControlError> {
    if hello.versions.is_empty() {
        return fault("versions", What::Empty);
    }
    list("versions", &hello.versions, VERSIONS)?;
    text("name", &hello.name, NAME)?;
    identifier("instance", &hello.instance)?;
    capabilities(&hello.capabilities)?;
    if let Some(mtu) = hello.mtu {
        range("mtu", mtu.into(), 576, 65_535)?;
    }
    if let Some(seconds) = hello.keepalive_s {
        range("keepalive_s", seconds.into(), 1, 3600)?;
    }
    match &hello.ticket {
        Some(ticket) => ticket_text(ticket),
        None => Ok(()),
    }
}

fn check_welcome(welcome: &Welcome) -> Result<(), ControlError> {
    text("name", &welcome.name, NAME)?;
    identifier("session", &welcome.session)?;
    capabilities(&welcome.capabilities)?;
    list("dns", &welcome.dns, DNS)?;
    list("routes", &welcome.routes, ROUTES)?;
    if let Some(ticket) = &welcome.ticket {
        check_ticket(ticket)?;
    }
    range("keepalive_s", welcome.keepalive_s.into(), 1, 3600)?;
    let Limits {
        max_message,
        max_control,
        outbound_rate: _,
        inbound_rate: _,
        flows: _,
    } = welcome.limits;
    range("max_message", max_message.into(), 2048, u64::from(u32::MAX))?;
    range("max_control", max_control.into(), 256, u64::from(u32::MAX))
}

fn check_ticket(ticket: &Ticket) -> Result<(), ControlError> {
    ticket_text(&ticket.ticket)
}

fn check_resolved(resolved: &Resolved) -> Result<(), ControlError> {
    list("addresses", &resolved.addresses, ADDRESSES)?;
    match &resolved.error {
        Some(error) => text("error", error, TEXT),
        None => Ok(()),
    }
}

pub(crate) fn check_goodbye(goodbye: &Goodbye) -> Result<(), ControlError> {
    range(
        "code",
        goodbye.code.into(),
        (*CODES.start()).into(),
        (*CODES.end()).into(),
    )?;
    text("text", &goodbye.text, TEXT)?;
    match goodbye.retry_after_ms {
        Some(ms) => range("retry_after_ms", ms, 0, MONTH_MS),
        None => Ok(()),
    }
}

pub(crate) fn check_notice(error: &ErrorNotice) -> Result<(), ControlError> {
    identifier("code", &error.code)?;
    text("text", &error.text, TEXT)
}

fn capabilities(capabilities: &[String]) -> Result<(), ControlError> {
    list("capabilities", capabilities, CAPABILITIES)?;
    capabilities
        .iter()
        .try_for_each(|c| identifier("capabilities", c))
}

fn ticket_text(ticket: &str) -> Result<(), ControlError> {
    filled("ticket", ticket)?;
    if ticket.len() > TICKET {
        return fault("ticket", What::Long { limit: TICKET });
    }
    if !ticket.bytes().all(|b| b.is_ascii_graphic()) {
        return fault("ticket", What::Characters);
    }
    Ok(())
}

pub(crate) fn identifier(field: &'static str, id: &str) -> Result<(), ControlError> {
    filled(field, id)?;
    if id.len() > ID {
        return fault(field, What::Long { limit: ID });
    }
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if !id.bytes().all(allowed) {
        return fault(field, What::Characters);
    }
    Ok(())
}

pub(crate) fn text(field: &'static str, text: &str, limit: usize) -> Result<(), ControlError> {
    if text.len() > limit {
        return fault(field, What::Long { limit });
    }
    if text.chars().any(char::is_control) {
        return fault(field, What::Characters);
    }
    Ok(())
}

pub(crate) fn filled(field: &'static str, text: &str) -> Result<(), ControlError> {
    if text.is_empty() {
        return fault(field, What::Empty);
    }
    Ok(())
}

pub(crate) fn list<T>(field: &'static str, list: &[T], limit: usize) -> Result<(), ControlError> {
    if list.len() > limit {
        return fault(field, What::Many { limit });
    }
    Ok(())
}

pub(crate) fn range(
    field: &'static str,
    value: u64,
    min: u64,
    max: u64,
) -> Result<(), ControlError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    fault(field, What::Range { value, min, max })
}

pub(crate) fn fault(field: &'static str, what: What) -> Result<(), ControlError> {
    Err(ControlError::Field { field, what })
}
