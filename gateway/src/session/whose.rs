//! Which lease a client comes for.

use rvpn_ipc::Key;
use tracing::debug;

use super::hub::Hub;
use crate::ticket::{Holder, TicketKey};

/// A lease key, and the number of the ticket that led to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whose {
    /// The key.
    pub key: Key,
    /// Zero without a ticket.
    pub epoch: u64,
}

/// The lease of a client that logged in as `account` with the token `token_id`
/// and says that it is `instance` of it and has this `ticket`.
///
/// A ticket that is not accepted costs the client nothing but the way back: it
/// gets the lease it would have had without one, which is its account's own.
pub fn whose(
    tickets: &TicketKey,
    hub: &Hub,
    account: &str,
    token_id: &str,
    instance: Option<&str>,
    ticket: Option<&str>,
    now: u64,
) -> Whose {
    if let Some(text) = ticket {
        match tickets.open(account, text, now) {
            Ok(claims) if hub.admits_ticket(claims.key, claims.epoch) => {
                return Whose {
                    key: claims.key,
                    epoch: claims.epoch,
                };
            }
            Ok(_) => debug!("a ticket that was used or voided"),
            Err(error) => debug!(%error, "a ticket that is not accepted"),
        }
    }
    let holder = match instance {
        Some(name) => Holder::Instance(name),
        None => Holder::Token(token_id),
    };
    Whose {
        key: tickets.lease_key(account, holder),
        epoch: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cores::Cores;
    use crate::session::hub::orders;
    use crate::ticket::Claims;
    use std::sync::Arc;
    use std::time::Duration;

    struct Lab {
        tickets: TicketKey,
        hub: Arc<Hub>,
    }

    impl Lab {
        fn new() -> Lab {
            let dir = tempfile::tempdir().unwrap();
            Lab {
                tickets: TicketKey::load_or_create(&dir.path().join("key")).unwrap(),
                hub: Arc::default(),
            }
        }

        fn ask(&self, account: &str, ticket: Option<&str>) -> Whose {
            let (t, h) = (&self.tickets, &self.hub);
            whose(t, h, account, "token", Some("phone"), ticket, 10)
        }

        fn ticket(&self, account: &str, key: Key, epoch: u64) -> String {
            let claims = Claims {
                key,
                generation: 1,
                epoch,
                expires: 20,
            };
            self.tickets.seal(account, &claims).unwrap()
        }
    }

    #[test]
    fn aut_20_a_ticket_leads_its_account_to_its_lease_and_nobody_else() {
        let lab = Lab::new();
        let key = Key([5; 16]);
        let ticket = lab.ticket("alice", key, 3);
        assert_eq!(lab.ask("alice", Some(&ticket)), Whose { key, epoch: 3 });
        let without = lab.ask("bob", None);
        assert_eq!(lab.ask("bob", Some(&ticket)), without);
        assert_ne!(without.key, key);
        assert_eq!(lab.ask("bob", Some("guessed")), without);
    }

    #[test]
    fn aut_20_neither_an_older_ticket_nor_one_from_before_a_goodbye_leads_back() {
        let lab = Lab::new();
        let key = Key([5; 16]);
        let core = Cores::start(1, false).unwrap().least_loaded().core();
        let life = Duration::from_secs(60);
        let (claim, _) = lab.hub.claim(key, core, orders().0, life).unwrap();
        let first = lab.ticket("alice", key, claim.next_epoch(0));
        let second = lab.ticket("alice", key, claim.next_epoch(1));
        claim.heard();
        assert_ne!(lab.ask("alice", Some(&first)).key, key);
        assert_eq!(lab.ask("alice", Some(&second)).key, key);
        claim.void_tickets();
        assert_ne!(lab.ask("alice", Some(&second)).key, key);
    }

    #[test]
    fn without_a_ticket_the_instance_counts_and_else_the_token() {
        let lab = Lab::new();
        let (t, h) = (&lab.tickets, &lab.hub);
        let of = |token, instance| whose(t, h, "alice", token, instance, None, 0).key;
        assert_eq!(of("t1", Some("phone")), of("t2", Some("phone")));
        assert_ne!(of("t1", Some("phone")), of("t1", Some("laptop")));
        assert_ne!(of("t1", None), of("t2", None));
    }
}
