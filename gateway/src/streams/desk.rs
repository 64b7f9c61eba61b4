//! The text messages of a client that serves.

use std::sync::Arc;
use std::time::Duration;

use rvpn_proto::control::{ControlError, ErrorNotice, Goodbye, Stage};
use rvpn_proto::name::Pattern;
use rvpn_proto::streams::{
    Counts, Ending as Wished, Message as Control, OFFERS, Offered, Serve, ServedAs, Serving, Turned,
};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;
use tracing::{info, warn};

use super::carrier::{Client, Line};
use super::names;
use crate::admit::Via;
use crate::auth::rights::Rights;
use crate::serve::Service;
use crate::serve::names::Unclear;
use crate::serve::table::{Ending, Offer, Place, Refused, Server};
use crate::session::carriage::End;

/// Names that a refusal mentions.
const MENTIONED: usize = 5;

/// Answers the control messages of one client.
pub(super) struct Desk {
    place: Arc<Place>,
    client: Arc<Client>,
    account: Arc<str>,
    instance: Arc<str>,
    rights: Arc<Rights>,
    via: Arc<Via>,
    /// Where ports are opened, never on a data core, and the answers go.
    runtime: Handle,
    answers: mpsc::Sender<Message>,
    told: Counts,
}

/// Why something is not served: code, words, remedy.
type No = (&'static str, String, String);

impl Desk {
    pub(super) fn new(
        place: Place,
        client: Arc<Client>,
        server: &Server,
        via: Arc<Via>,
        runtime: Handle,
        answers: mpsc::Sender<Message>,
    ) -> Desk {
        Desk {
            place: Arc::new(place),
            client,
            account: Arc::clone(&server.account),
            instance: Arc::clone(&server.instance),
            rights: Arc::clone(&server.rights),
            via,
            runtime,
            answers,
            told: Counts::default(),
        }
    }

    /// Takes one message; the answer, if there is one.
    pub(super) fn text(&mut self, text: &str) -> Result<Option<Message>, End> {
        match Control::parse(text, Stage::Session) {
            Ok(Control::Serve(serve)) => Ok(self.serve(&serve)),
            Ok(Control::Withdraw(withdraw)) => {
                self.withdraw(withdraw.id);
                Ok(None)
            }
            Ok(Control::Counts(_)) => Ok(encode(&Control::Counts(self.client.counts()))),
            Ok(Control::Goodbye(_)) => Err(End::Goodbye),
            // A client has nothing to tell us with these.
            Ok(
                Control::Hello(_) | Control::Welcome(_) | Control::Serving(_) | Control::Refused(_),
            ) => Ok(notice("not-now", "this message has no place here")),
            Ok(Control::Error(_)) => Ok(None),
            Err(error @ ControlError::Unknown { .. }) => {
                Ok(notice("unknown-kind", &error.to_string()))
            }
            Err(_) => Err(End::Misbehaved {
                code: rvpn_proto::control::close::POLICY,
                reason: "malformed control message",
            }),
        }
    }

    /// The visitors, if their number changed since they were last told.
    pub(super) fn counts(&mut self) -> Option<Message> {
        let counts = self.client.counts();
        if counts == self.told {
            return None;
        }
        self.told = counts;
        encode(&Control::Counts(counts))
    }

    fn serve(&self, serve: &Serve) -> Option<Message> {
        match self.judge(serve) {
            Ok(None) => None,
            Ok(Some(at)) => answer(serve, Ok(at)),
            Err(no) => answer(serve, Err(no)),
        }
    }

    /// Where it is served; nothing if that is said later.
    fn judge(&self, serve: &Serve) -> Result<Option<ServedAs>, No> {
        let room = self
            .client
            .lines(|lines| lines.len() < OFFERS || lines.iter().any(|l| l.id == serve.id));
        if !room {
            return Err((
                "limit",
                format!("one client may serve {OFFERS} things at once"),
                "serve the others by a second client with a device of its own".to_owned(),
            ));
        }
        // The same number again is something else from now on.
        self.withdraw(serve.id);
        let fits = matches!(
            (serve.service, serve.ending),
            (_, None)
                | (Offered::Http, Some(Wished::Gateway))
                | (Offered::Tls, Some(Wished::Client))
        );
        if !fits {
            return Err((
                "ending",
                "TLS of what is served as http ends at the gateway, of tls at the client"
                    .to_owned(),
                "leave it out".to_owned(),
            ));
        }
        match serve.service {
            Offered::Tcp => self.port(serve).map(|()| None),
            Offered::Http | Offered::Tls | Offered::Ssh => self.name(serve).map(Some),
        }
    }

    fn name(&self, serve: &Serve) -> Result<ServedAs, No> {
        let scheme = match serve.service {
            Offered::Http => names::web(&self.via),
            Offered::Tls => "https",
            _ => "ssh",
        };
        let taken = |pattern: &Pattern| {
            self.client.lines(|lines| {
                let same =
                    |l: &Line| l.service == serve.service && l.pattern.as_ref() == Some(pattern);
                lines.iter().any(same)
            })
        };
        let label = names::own_label(&self.instance, serve.id);
        let wish = serve.name.as_deref();
        let pattern = names::meant(&self.rights, &self.account, wish, &label, taken)
            .map_err(|why| self.unclear(&why))?;
        self.place
            .offer(offer(pattern.clone(), serve.service))
            .map_err(|why| refused(&self.rights, &why))?;
        self.client.lines(|lines| {
            lines.push(Line {
                id: serve.id,
                service: serve.service,
                pattern: Some(pattern.clone()),
                port: None,
            });
        });
        let name = pattern.to_string();
        Ok(ServedAs {
            urls: vec![names::url(scheme, &name, self.via.port)],
            name: Some(name),
            port: None,
        })
    }

    fn port(&self, serve: &Serve) -> Result<(), No> {
        let Some(port) = serve.port.or(self.rights.ports.first().copied()) else {
            let text = "this login may serve on no port".to_owned();
            return Err(("port", text, ports(&self.rights)));
        };
        let line = Line {
            id: serve.id,
            service: serve.service,
            pattern: None,
            port: Some(port),
        };
        // Its first visitor may come before the answer is on its way.
        self.client.lines(|lines| lines.push(line));
        let (place, client) = (Arc::clone(&self.place), Arc::clone(&self.client));
        let (rights, via) = (Arc::clone(&self.rights), Arc::clone(&self.via));
        let (serve, answers) = (serve.clone(), self.answers.clone());
        self.runtime.spawn(async move {
            let opened = place.listen(port).await;
            let said = match opened {
                Ok(()) => Ok(ServedAs {
                    name: None,
                    port: Some(port),
                    urls: vec![names::url("tcp", &via.host, port)],
                }),
                Err(why) => {
                    client.lines(|lines| lines.retain(|l| l.id != serve.id));
                    Err(refused(&rights, &why))
                }
            };
            if let Some(message) = answer(&serve, said) {
                // A session that ended does without.
                drop(answers.send(message).await);
            }
        });
        Ok(())
    }

    fn withdraw(&self, id: u32) {
        let gone = self.client.lines(|lines| {
            let at = lines.iter().position(|l| l.id == id)?;
            Some(lines.swap_remove(at))
        });
        let Some(gone) = gone else {
            return;
        };
        // Something else of this client may be served under the same.
        let same = |l: &&Line| l.pattern == gone.pattern && l.port == gone.port;
        let still: Vec<Line> = self
            .client
            .lines(|lines| lines.iter().filter(same).cloned().collect());
        match (&gone.pattern, gone.port) {
            (Some(pattern), _) => self.place.withdraw(pattern),
            (None, Some(port)) if still.is_empty() => self.place.withdraw_port(port),
            (None, _) => {}
        }
        for line in still {
            if let Some(pattern) = line.pattern
                && let Err(error) = self.place.offer(offer(pattern, line.service))
            {
                warn!(%error, "a name is not offered any more");
            }
        }
    }

    fn unclear(&self, why: &Unclear) -> No {
        let code = match why {
            Unclear::NotAName(..) => "name",
            Unclear::Nothing(_) | Unclear::NotYours(_) | Unclear::Several(..) => "claim",
        };
        (code, why.to_string(), allowed(&self.rights))
    }
}

/// As the table has it.
fn offer(pattern: Pattern, service: Offered) -> Offer {
    let (service, ending) = match service {
        Offered::Http => (Service::Http, Ending::Here),
        Offered::Tls => (Service::Https, Ending::There),
        Offered::Ssh | Offered::Tcp => (Service::Ssh, Ending::There),
    };
    Offer {
        pattern,
        service: Some(service),
        ending,
        // The client is told of every visitor anyway.
        proxy: false,
    }
}

fn answer(serve: &Serve, said: Result<ServedAs, No>) -> Option<Message> {
    let (id, service) = (serve.id, serve.service.as_str());
    encode(&match said {
        Ok(at) => {
            info!(id, service, name = at.name, port = at.port, "served");
            Control::Serving(Serving { id, at })
        }
        Err((code, text, remedy)) => {
            info!(id, service, code, "not served");
            Control::Refused(Turned {
                id,
                code: code.to_owned(),
                text: cut(&text),
                remedy: cut(&remedy),
            })
        }
    })
}

fn allowed(rights: &Rights) -> String {
    match rights.names.as_slice() {
        [] => "ask for a token or invite with names".to_owned(),
        names => {
            let some = names.iter().take(MENTIONED).map(Pattern::to_string);
            let some = some.collect::<Vec<_>>().join(", ");
            format!("this login may serve: {some}")
        }
    }
}

fn ports(rights: &Rights) -> String {
    match rights.ports.as_slice() {
        [] => "ask for a token or invite with ports".to_owned(),
        ports => {
            let some = ports.iter().take(MENTIONED).map(u16::to_string);
            let some = some.collect::<Vec<_>>().join(", ");
            format!("this login may serve on: {some}")
        }
    }
}

fn refused(rights: &Rights, refused: &Refused) -> No {
    let (code, remedy) = match refused {
        Refused::Claim(_) => ("claim", allowed(rights)),
        Refused::Reserved(_) => ("reserved", "use another name".to_owned()),
        Refused::Taken(_) => (
            "taken",
            "use another name, or ask the operator whose it is".to_owned(),
        ),
        Refused::Port(_) => ("port", ports(rights)),
        Refused::PortTaken(_) => ("taken", "use another port".to_owned()),
        Refused::PortFault(..) => ("fault", "ask the operator, or use another port".to_owned()),
        Refused::TooMany(_) => ("limit", "serve less by one client".to_owned()),
        Refused::NoRoom(_) => ("limit", "try again later, or ask the operator".to_owned()),
    };
    (code, refused.to_string(), remedy)
}

/// What fits a message for people.
fn cut(text: &str) -> String {
    let fit = text.chars().filter(|c| !c.is_control());
    let text: String = fit.collect();
    text[..text.floor_char_boundary(500)].to_owned()
}

/// A message for the wire; an invalid one would be our own fault and is not sent.
pub(super) fn encode(message: &Control) -> Option<Message> {
    match message.to_text(Stage::Session) {
        Ok(text) => Some(Message::text(text)),
        Err(error) => {
            warn!(%error, "a control message of our own is not valid");
            None
        }
    }
}

/// What is said before a close frame.
pub(super) fn goodbye(code: u16, text: &str, retry_after: Option<Duration>) -> Option<Message> {
    let retry_after_ms = retry_after.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
    encode(&Control::Goodbye(Goodbye {
        code,
        text: text.to_owned(),
        retry_after_ms,
    }))
}

fn notice(code: &str, text: &str) -> Option<Message> {
    encode(&Control::Error(ErrorNotice {
        code: code.to_owned(),
        text: text.to_owned(),
    }))
}
