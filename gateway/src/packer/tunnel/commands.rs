//! What a client commands: tokens that come and go, and what they are worth.

use std::sync::Arc;
use std::time::SystemTime;

use rvpn_proto::packer::{Command, Failure, Heard, code, failed, notice, succeeded};
use tokio::sync::oneshot;
use tracing::{debug, info, warn};

use super::{Judging, Listening, MOST_JUDGING, MOST_WRONG, Member, Over, State};
use crate::auth::{Denied, Grant};
use crate::packer::SERVICE;
use crate::packer::tokens::{self, Print};
use crate::serve::Carrier;
use crate::serve::account::Carrying;
use crate::session::hub::Card;

impl State {
    pub(super) fn control(&mut self, body: &[u8]) -> Result<(), Over> {
        let (id, command) = match Heard::parse(body) {
            Ok(Heard::Request { id, command }) => (id, command),
            Ok(Heard::Reply { .. } | Heard::Notice) => return Ok(()),
            Err(failure) => {
                self.command(&notice(failure));
                return Ok(());
            }
        };
        let refuse = |code, message| Err(Failure { code, message });
        let done = match command {
            Command::AddToken(token) => return self.show(id, &token),
            Command::DeleteToken(Some(token)) => {
                // What is not there any more is gone as it should be.
                self.tokens.remove(&tokens::print(&token));
                Ok(())
            }
            Command::DeleteToken(None) => {
                self.tokens.clear();
                Ok(())
            }
            Command::Hello => Ok(()),
            Command::Pair => refuse(
                code::INVALID_TOKEN,
                "this gateway gives no tokens to clients; start the client with one",
            ),
            Command::Unknown => refuse(code::UNKNOWN_COMMAND, "unknown command"),
            Command::Malformed => refuse(code::BAD_COMMAND, "the command lacks what belongs to it"),
        };
        self.answer(id, done);
        Ok(())
    }

    fn answer(&mut self, id: i64, done: Result<(), Failure>) {
        let text = match done {
            Ok(()) => succeeded(id),
            Err(failure) => failed(id, failure),
        };
        self.command(&text);
    }

    /// Has a token judged, elsewhere.
    fn show(&mut self, id: i64, token: &str) -> Result<(), Over> {
        let print = tokens::print(token);
        if self.tokens.has(&print) {
            self.answer(id, Ok(()));
            return Ok(());
        }
        if self.judging.len() >= MOST_JUDGING {
            let message = "too many tokens at once";
            let code = code::BAD_COMMAND;
            self.answer(id, Err(Failure { code, message }));
            return Ok(());
        }
        let (answer, verdict) = oneshot::channel();
        let judged = self.desk.judge(token);
        self.shared.control.spawn(async move {
            // The tunnel may have ended meanwhile; then the place is given back.
            drop(answer.send(judged.await));
        });
        self.judging.push_back(Judging { id, print, verdict });
        Ok(())
    }

    /// A verdict has come.
    pub(in crate::packer) fn judged(
        &mut self,
        judging: &Judging,
        verdict: Result<Grant, Denied>,
    ) -> Result<(), Over> {
        let grant = match verdict {
            Ok(grant) => grant,
            Err(why) => {
                let message = "invalid access token";
                let code = code::INVALID_TOKEN;
                self.answer(judging.id, Err(Failure { code, message }));
                self.wrong += 1;
                return match (why, self.is_stranger() && self.wrong >= MOST_WRONG) {
                    (Denied::TooMany, _) if self.is_stranger() => {
                        Err(Over::Close(1013, "too many connections of the account"))
                    }
                    (_, true) => Err(Over::Close(1008, "invalid access token")),
                    _ => Ok(()),
                };
            }
        };
        let done = self.login(judging.print, grant)?;
        self.answer(judging.id, done);
        if done.is_ok() {
            self.listen(judging.print);
        }
        Ok(())
    }

    /// Has the ports of a token listened on, and tells what was granted when
    /// that is known.
    pub(in crate::packer) fn listen(&mut self, print: Print) {
        let Some((place, ports)) = self.tokens.doors(&print) else {
            return self.grant();
        };
        let (answer, opened) = oneshot::channel();
        self.shared.control.spawn(async move {
            let mut opened = Vec::new();
            for port in ports {
                match place.listen(port).await {
                    Ok(()) => opened.push(port),
                    Err(refused) => debug!(%refused, "a port is not served"),
                }
            }
            // The tunnel may have ended meanwhile; then its place goes with us.
            drop(answer.send(opened));
        });
        self.listening.push_back(Listening { print, opened });
    }

    /// The ports of a token are open, or will not be.
    pub(in crate::packer) fn opened(&mut self, print: Print, ports: Vec<u16>) {
        self.tokens.opened(&print, ports);
        self.grant();
    }

    /// Takes a login: from here on the client is somebody.
    pub(in crate::packer) fn login(
        &mut self,
        print: Print,
        grant: Grant,
    ) -> Result<Result<(), Failure>, Over> {
        let account = Arc::clone(&grant.account);
        let (subject, token_id) = (Arc::clone(&grant.subject), grant.token_id);
        let who = tokens::Who {
            table: &self.shared.table,
            carrier: Arc::clone(&self.way) as Arc<dyn Carrier>,
            peer: self.peer,
            instance: Arc::clone(&self.instance),
        };
        if let Err(failure) = self.tokens.add(print, grant, who) {
            return Ok(Err(failure));
        }
        if self.member.is_some() {
            return Ok(Ok(()));
        }
        if self.shared.hub.is_closed() {
            return Err(Over::Close(1012, "the gateway restarts"));
        }
        let row = Carrying::open(&self.shared.meter, &account, SERVICE).map_err(|error| {
            warn!(%error, "cannot begin a session");
            Over::Close(1013, "the gateway is out of resources")
        })?;
        let card = Card {
            id: row.number(),
            account,
            token_id,
            subject,
            service: SERVICE,
            peer: self.peer,
            started: SystemTime::now(),
            addresses: Vec::new(),
            slot: None,
            core: self.way.core,
            gauge: Arc::default(),
        };
        info!(account = %card.account, "client came");
        self.member = Some(Member {
            _entry: self.shared.hub.enter(card, self.way.orders.clone()),
            row,
        });
        self.pending = None;
        Ok(Ok(()))
    }

    /// Brings the meter up to date: visitors' bytes are counted where they are
    /// served, those of the wire here.
    pub(in crate::packer) fn publish(&mut self, wire: (u64, u64)) {
        if let Some(member) = &mut self.member {
            member.row.wire(wire);
        }
    }

    /// Tells what was granted.
    fn grant(&mut self) {
        if self.profile.takes_grants() {
            let granted = self.tokens.granted(&self.host, self.port);
            self.command(&granted.command());
        }
    }
}
