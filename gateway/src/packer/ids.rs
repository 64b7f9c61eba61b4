//! What visitors are called in a tunnel.

use std::collections::{HashMap, VecDeque};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::bell::Number;

/// How long the name of a visitor who has left is not given to another one: so
/// long may its client still speak of it.
const MEMORY: Duration = Duration::from_secs(60);
/// Names that are remembered so.
const REMEMBERED: usize = 8192;
/// Ports that are tried for a visitor whose own is taken.
const TRIES: u32 = 65_535;

/// A visitor's name in the tunnel: its address, as text.
pub(super) type Id = Arc<str>;

/// Whom a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    /// A visitor who is here.
    Here(Number),
    /// One who was. The client is told so once.
    Left {
        /// Whether it was.
        told: bool,
    },
    /// Nobody ever.
    Nobody,
}

/// All names of one tunnel.
#[derive(Debug, Default)]
pub(super) struct Ids {
    by_name: HashMap<Id, Who>,
    left: VecDeque<(Instant, Id)>,
}

impl Ids {
    /// Names a visitor: by its address, or by the next port of it that is free.
    /// None if there is no such port.
    pub(super) fn give(&mut self, peer: SocketAddr, number: Number, now: Instant) -> Option<Id> {
        self.forget(now);
        let mut text = String::with_capacity(56);
        let mut port = peer.port();
        for _ in 0..TRIES {
            text.clear();
            // Port 0 is nobody's.
            if port != 0 {
                write(&mut text, peer.ip().to_canonical(), port);
                if !self.by_name.contains_key(&*text) {
                    let id = Id::from(text);
                    self.by_name.insert(Arc::clone(&id), Who::Here(number));
                    return Some(id);
                }
            }
            port = port.wrapping_add(1);
        }
        None
    }

    /// Whom the client means.
    pub(super) fn find(&self, id: &str) -> Who {
        self.by_name.get(id).copied().unwrap_or(Who::Nobody)
    }

    /// The client was told that the visitor has left.
    pub(super) fn told(&mut self, id: &str) {
        if let Some(Who::Left { told }) = self.by_name.get_mut(id) {
            *told = true;
        }
    }

    /// A visitor has left. Its name is kept from others for a while, unless its
    /// client is known to be done with it.
    pub(super) fn leave(&mut self, id: &Id, done: bool, now: Instant) {
        if done {
            self.by_name.remove(id);
            return;
        }
        if let Some(slot) = self.by_name.get_mut(id) {
            *slot = Who::Left { told: false };
            self.left.push_back((now, Arc::clone(id)));
        }
        if self.left.len() > REMEMBERED
            && let Some((_, oldest)) = self.left.pop_front()
        {
            self.by_name.remove(&oldest);
        }
    }

    fn forget(&mut self, now: Instant) {
        while let Some((since, _)) = self.left.front()
            && now.saturating_duration_since(*since) >= MEMORY
            && let Some((_, id)) = self.left.pop_front()
        {
            self.by_name.remove(&id);
        }
    }
}

fn write(text: &mut String, address: IpAddr, port: u16) {
    let family = match address {
        IpAddr::V4(_) => "IPv4",
        IpAddr::V6(_) => "IPv6",
    };
    if write!(text, "{family},{address},{port}").is_err() {
        debug_assert!(false, "writing to a text does not fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn two_visitors_of_one_address_have_two_names() {
        let now = Instant::now();
        let mut ids = Ids::default();
        let first = ids.give(at("192.0.2.7:65535"), 1, now).unwrap();
        let second = ids.give(at("[::ffff:192.0.2.7]:65535"), 2, now).unwrap();
        assert_eq!(&*first, "IPv4,192.0.2.7,65535");
        assert_eq!(&*second, "IPv4,192.0.2.7,1");
        assert_eq!(ids.find(&second), Who::Here(2));
        assert_eq!(ids.find("IPv4,192.0.2.7,2"), Who::Nobody);
        let six = ids.give(at("[2001:db8::7]:80"), 3, now).unwrap();
        assert_eq!(&*six, "IPv6,2001:db8::7,80");
    }

    #[test]
    fn a_name_is_not_given_again_while_its_client_may_speak_of_it() {
        let now = Instant::now();
        let mut ids = Ids::default();
        let peer = at("192.0.2.7:1000");
        let first = ids.give(peer, 1, now).unwrap();
        ids.leave(&first, false, now);
        assert_eq!(ids.find(&first), Who::Left { told: false });
        ids.told(&first);
        assert_eq!(ids.find(&first), Who::Left { told: true });
        assert_eq!(&*ids.give(peer, 2, now).unwrap(), "IPv4,192.0.2.7,1001");
        let later = now + MEMORY;
        assert_eq!(ids.give(peer, 3, later).unwrap(), first);
        ids.leave(&first, true, later);
        assert_eq!(ids.find(&first), Who::Nobody);
    }

    #[test]
    fn names_of_the_past_do_not_pile_up() {
        let now = Instant::now();
        let mut ids = Ids::default();
        for n in 0..3 * REMEMBERED as u64 {
            let peer = SocketAddr::new([10, 0, (n >> 8) as u8, n as u8].into(), 9);
            let id = ids.give(peer, n, now).unwrap();
            ids.leave(&id, false, now);
        }
        assert!(ids.by_name.len() <= REMEMBERED + 1 && ids.left.len() <= REMEMBERED + 1);
    }
}
