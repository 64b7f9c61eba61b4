//! Bounds of everything in a message, as [`crate::control`] has them.

use super::message::{Hello, Message, Serve, ServedAs, Turned, Welcome};
use crate::control::bounds::{
    NAME, TEXT, VERSIONS, fault, filled, goodbye, identifier, list, notice, range, text,
};
use crate::control::{ControlError, What};

/// Names and ports of a login.
const RIGHTS: usize = 256;
/// Addresses of one thing that is served.
const URLS: usize = 8;
/// `https://`, a name, a port.
const URL: usize = 300;
/// A name with `*.` before it.
const HOST: usize = 256;

pub(super) fn message(message: &Message) -> Result<(), ControlError> {
    match message {
        Message::Hello(hello) => check_hello(hello),
        Message::Welcome(welcome) => check_welcome(welcome),
        Message::Serve(serve) => check_serve(serve),
        Message::Serving(serving) => check_served(&serving.at),
        Message::Refused(Turned {
            id: _,
            code,
            text: words,
            remedy,
        }) => {
            identifier("code", code)?;
            text("text", words, TEXT)?;
            text("remedy", remedy, TEXT)
        }
        Message::Goodbye(parting) => goodbye(parting),
        Message::Error(error) => notice(error),
        // Numbers of which every value is possible.
        Message::Withdraw(_) | Message::Counts(_) => Ok(()),
    }
}

fn check_hello(hello: &Hello) -> Result<(), ControlError> {
    if hello.versions.is_empty() {
        return fault("versions", What::Empty);
    }
    list("versions", &hello.versions, VERSIONS)?;
    text("name", &hello.name, NAME)?;
    identifier("instance", &hello.instance)?;
    match hello.keepalive_s {
        Some(seconds) => range("keepalive_s", seconds.into(), 1, 3600),
        None => Ok(()),
    }
}

fn check_welcome(welcome: &Welcome) -> Result<(), ControlError> {
    text("name", &welcome.name, NAME)?;
    identifier("session", &welcome.session)?;
    range("keepalive_s", welcome.keepalive_s.into(), 1, 3600)?;
    list("names", &welcome.names, RIGHTS)?;
    welcome.names.iter().try_for_each(|n| name("names", n))?;
    list("ports", &welcome.ports, RIGHTS)?;
    let limits = welcome.limits;
    range("streams", limits.streams.into(), 1, 1 << 20)?;
    range("offers", limits.offers.into(), 1, 1 << 20)?;
    let bytes = |field, n: u32| range(field, n.into(), 1024, u32::MAX.into());
    bytes("max_message", limits.max_message)?;
    bytes("max_control", limits.max_control)
}

fn check_serve(serve: &Serve) -> Result<(), ControlError> {
    if let Some(port) = serve.port {
        range("port", port.into(), 1, 65_535)?;
    }
    match &serve.name {
        Some(wish) => name("name", wish),
        None => Ok(()),
    }
}

fn check_served(at: &ServedAs) -> Result<(), ControlError> {
    if let Some(served) = &at.name {
        name("name", served)?;
    }
    list("urls", &at.urls, URLS)?;
    at.urls.iter().try_for_each(|u| text("urls", u, URL))
}

/// Something that may be a name; whether it is one is for others to say.
pub(super) fn name(field: &'static str, name: &str) -> Result<(), ControlError> {
    filled(field, name)?;
    text(field, name, HOST)
}
