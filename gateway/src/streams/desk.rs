//! The text messages of a client that serves.

use std::sync::Arc;
use std::time::Duration;

use rvpn_proto::control::{ControlError, ErrorNotice, Goodbye, Stage};
use rvpn_proto::name::Pattern;
use rvpn_proto::streams::{
    Counts, Ending as Wished, Message as Control, OFFERS, Offered, Serve, ServedAs, Serving, Turned,
};
use tokio_tungstenite::tungstenite::Message;
use tracing::{info, warn};

use super::carrier::{Client, Line};
use super::names::{self, NoName};
use crate::admit::Via;
use crate::auth::rights::Rights;
use crate::serve::Service;
use crate::serve::table::{Ending, Offer, Place, Refused};
use crate::session::drive::End;

/// Names that a refusal mentions.
const MENTIONED: usize = 5;

/// Answers the control messages of one client.
pub(super) struct Desk {
    place: Place,
    client: Arc<Client>,
    rights: Arc<Rights>,
    via: Arc<Via>,
    instance: String,
    told: Counts,
}

/// Why something is not served: code, words, remedy.
type No = (&'static str, String, String);

impl Desk {
    pub(super) fn new(
        place: Place,
        client: Arc<Client>,
        rights: Arc<Rights>,
        via: Arc<Via>,
        instance: String,
    ) -> Desk {
        Desk {
            place,
            client,
            rights,
            via,
            instance,
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
        let id = serve.id;
        encode(&match self.judge(serve) {
            Ok(at) => {
                info!(
                    id,
                    service = serve.service.as_str(),
                    name = at.name,
                    port = at.port,
                    "served"
                );
                Control::Serving(Serving { id, at })
            }
            Err((code, text, remedy)) => {
                info!(id, service = serve.service.as_str(), code, "not served");
                Control::Refused(Turned {
                    id,
                    code: code.to_owned(),
                    text: cut(&text),
                    remedy: cut(&remedy),
                })
            }
        })
    }

    fn judge(&self, serve: &Serve) -> Result<ServedAs, No> {
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
            Offered::Tcp => self.port(serve),
            Offered::Http | Offered::Tls | Offered::Ssh => self.name(serve),
        }
    }

    fn name(&self, serve: &Serve) -> Result<ServedAs, No> {
        let (service, ending, scheme) = match serve.service {
            Offered::Http => (Service::Http, Ending::Here, names::web(&self.via)),
            Offered::Tls => (Service::Https, Ending::There, "https"),
            _ => (Service::Ssh, Ending::There, "ssh"),
        };
        let taken = |pattern: &Pattern| {
            self.client.lines(|lines| {
                let same =
                    |l: &Line| l.service == serve.service && l.pattern.as_ref() == Some(pattern);
                lines.iter().any(same)
            })
        };
        let label = names::own_label(&self.instance, serve.id);
        let pattern = names::meant(serve.name.as_deref(), &self.rights.names, &label, taken)
            .map_err(|why| self.no_name(serve.name.as_deref(), &why))?;
        let offer = Offer {
            pattern: pattern.clone(),
            service: Some(service),
            ending,
        };
        self.place
            .offer(offer)
            .map_err(|refused| self.refused(&refused))?;
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

    fn port(&self, serve: &Serve) -> Result<ServedAs, No> {
        let no = |text: String| {
            let remedy = match self.rights.ports.as_slice() {
                [] => "ask for a token or invite with ports".to_owned(),
                ports => {
                    let some = ports.iter().take(MENTIONED).map(u16::to_string);
                    format!(
                        "this login may serve on: {}",
                        some.collect::<Vec<_>>().join(", ")
                    )
                }
            };
            ("port", text, remedy)
        };
        let Some(port) = serve.port.or(self.rights.ports.first().copied()) else {
            return Err(no("this login may serve on no port".to_owned()));
        };
        if !self.rights.port(port) {
            return Err(no(format!("port {port} is not among those of this login")));
        }
        Err(no(format!("port {port} is not open here")))
    }

    fn withdraw(&self, id: u32) {
        let gone = self.client.lines(|lines| {
            let at = lines.iter().position(|l| l.id == id)?;
            Some(lines.swap_remove(at))
        });
        let Some(pattern) = gone.and_then(|line| line.pattern) else {
            return;
        };
        // Something else of this client may have the same name.
        let still: Vec<Line> = self.client.lines(|lines| {
            let same = lines
                .iter()
                .filter(|l| l.pattern.as_ref() == Some(&pattern));
            same.cloned().collect()
        });
        self.place.withdraw(&pattern);
        for line in still {
            let (service, ending) = match line.service {
                Offered::Http => (Service::Http, Ending::Here),
                Offered::Tls => (Service::Https, Ending::There),
                _ => (Service::Ssh, Ending::There),
            };
            let again = Offer {
                pattern: pattern.clone(),
                service: Some(service),
                ending,
            };
            if let Err(error) = self.place.offer(again) {
                warn!(%error, "a name is not offered any more");
            }
        }
    }

    fn allowed(&self) -> String {
        match self.rights.names.as_slice() {
            [] => "ask for a token or invite with names".to_owned(),
            names => {
                let some = names.iter().take(MENTIONED).map(Pattern::to_string);
                format!(
                    "this login may serve: {}",
                    some.collect::<Vec<_>>().join(", ")
                )
            }
        }
    }

    fn no_name(&self, wish: Option<&str>, why: &NoName) -> No {
        let wish = wish.unwrap_or("");
        match why {
            NoName::NotAName => (
                "name",
                format!("'{wish}' is not a host name"),
                "write it like app or app.example.org".to_owned(),
            ),
            NoName::None => (
                "claim",
                "this login may serve no names".to_owned(),
                self.allowed(),
            ),
            NoName::AllTaken => (
                "limit",
                "all names of this login are served by this client already".to_owned(),
                "say with --name which one to use, or ask for more names".to_owned(),
            ),
            NoName::NothingAbove => (
                "claim",
                format!("this login may serve nothing that '{wish}' could be a part of"),
                self.allowed(),
            ),
        }
    }

    fn refused(&self, refused: &Refused) -> No {
        let (code, remedy) = match refused {
            Refused::Claim(_) => ("claim", self.allowed()),
            Refused::Reserved(_) => ("reserved", "use another name".to_owned()),
            Refused::Taken(_) => (
                "taken",
                "use another name, or ask the operator whose it is".to_owned(),
            ),
        };
        (code, refused.to_string(), remedy)
    }
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
