//! What a client may serve: its tokens, each with a place in the table.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use aws_lc_rs::digest::{SHA256, digest};
use rvpn_proto::packer::{Failure, Grant as Granted, code};
use tokio::time::sleep_until;
use tracing::debug;

use crate::auth::Grant;
use crate::serve::Carrier;
use crate::serve::table::{Ending, Offer, Place, Server, Table};
use crate::session::begin::monotonic;

/// Tokens of one connection.
const MOST: usize = 16;

/// A token's print: it is compared, never kept.
pub type Print = [u8; 32];

/// Of a token.
pub fn print(token: &str) -> Print {
    let mut print = [0; 32];
    print.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
    print
}

/// A token that counts.
struct Held {
    print: Print,
    grant: Grant,
    /// What it is worth, in the table. Dropping it serves nothing more of it.
    place: Arc<Place>,
    names: Vec<String>,
    ports: Vec<u16>,
    over: Pin<Box<dyn Future<Output = &'static str> + Send>>,
}

/// All of a connection's.
#[derive(Default)]
pub(super) struct Tokens {
    held: Vec<Held>,
}

/// What all places of a connection have in common.
pub(super) struct Who<'a> {
    pub(super) table: &'a Arc<Table>,
    pub(super) carrier: Arc<dyn Carrier>,
    pub(super) peer: SocketAddr,
    /// Told apart from other connections of the account by this.
    pub(super) instance: Arc<str>,
}

impl Tokens {
    /// Whether there is this one.
    pub(super) fn has(&self, print: &Print) -> bool {
        self.held.iter().any(|h| h.print == *print)
    }

    /// Serves what a token is for.
    pub(super) fn add(&mut self, print: Print, grant: Grant, who: Who<'_>) -> Result<(), Failure> {
        let failed = |code, message| Err(Failure { code, message });
        if self.has(&print) {
            return Ok(());
        }
        if self.held.len() >= MOST {
            return failed(code::BAD_COMMAND, "too many tokens on one connection");
        }
        if self.held.iter().any(|h| h.grant.account != grant.account) {
            return failed(
                code::INVALID_TOKEN,
                "this token is of another account than the first; use a connection for each",
            );
        }
        let place = who.table.join_beside(Server {
            account: Arc::clone(&grant.account),
            instance: who.instance,
            rights: Arc::clone(&grant.rights),
            peer: who.peer,
            carrier: who.carrier,
        });
        let ending = match grant.tunnel.decrypt {
            true => Ending::Here,
            false => Ending::There,
        };
        let mut names = Vec::new();
        for pattern in &grant.rights.names {
            let offer = Offer {
                pattern: pattern.clone(),
                service: None,
                ending,
                proxy: false,
            };
            match place.offer(offer) {
                Ok(()) => names.push(pattern.to_string()),
                Err(refused) => debug!(%refused, "not served"),
            }
        }
        if names.is_empty() && grant.rights.ports.is_empty() {
            return failed(INVALID_NAME, "none of the token's names can be served here");
        }
        self.held.push(Held {
            print,
            over: over(&grant),
            grant,
            place: Arc::new(place),
            names,
            ports: Vec::new(),
        });
        Ok(())
    }

    /// What is needed to listen on the ports of a token; none if it has none.
    pub(super) fn doors(&self, print: &Print) -> Option<(Arc<Place>, Vec<u16>)> {
        let held = self.held.iter().find(|h| h.print == *print)?;
        let ports = &held.grant.rights.ports;
        (!ports.is_empty()).then(|| (Arc::clone(&held.place), ports.clone()))
    }

    /// The ports of a token that are listened on.
    pub(super) fn opened(&mut self, print: &Print, ports: Vec<u16>) {
        if let Some(held) = self.held.iter_mut().find(|h| h.print == *print) {
            held.ports = ports;
        }
    }

    /// Serves what this token was for no longer. False if there is none.
    pub(super) fn remove(&mut self, print: &Print) -> bool {
        let before = self.held.len();
        self.held.retain(|h| h.print != *print);
        self.held.len() < before
    }

    /// Serves nothing more.
    pub(super) fn clear(&mut self) {
        self.held.clear();
    }

    /// Takes out those whose time is over. Ready with the reason of the last
    /// one if none is left.
    pub(super) fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<&'static str> {
        let mut last = None;
        self.held
            .retain_mut(|held| match held.over.as_mut().poll(cx) {
                Poll::Pending => true,
                Poll::Ready(reason) => {
                    last = Some(reason);
                    false
                }
            });
        match last {
            Some(reason) if self.held.is_empty() => Poll::Ready(reason),
            _ => Poll::Pending,
        }
    }

    /// What the client is told that it serves.
    pub(super) fn granted(&self, host: &str, port: u16) -> Granted {
        Granted {
            host: host.to_owned(),
            names: self.held.iter().flat_map(|h| h.names.clone()).collect(),
            port,
            ports: self.held.iter().flat_map(|h| h.ports.clone()).collect(),
        }
    }
}

/// The names of a token are not for whoever has it.
const INVALID_NAME: &str = "E_INVALID_NAME";

/// Resolves when a login ends from outside, with the reason.
fn over(grant: &Grant) -> Pin<Box<dyn Future<Output = &'static str> + Send>> {
    let mut revoked = grant.revoked.clone();
    let expiry = grant.expires_at.map(monotonic);
    Box::pin(async move {
        let expired = async {
            match expiry {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = async {
                if revoked.wait_for(|r| *r).await.map(drop).is_err() {
                    // Nobody is left who could revoke it.
                    std::future::pending::<()>().await;
                }
            } => "access was revoked",
            () = expired => "the token has expired",
        }
    })
}
