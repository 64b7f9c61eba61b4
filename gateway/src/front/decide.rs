//! Where a connection goes: from what it is, the configuration and the table.
//!
//! A name that nobody serves leads to the gateway itself, which tells a browser
//! so; it never leads to some client or other.

use rvpn_proto::name::Name;
use rvpn_proto::sniff::ClientHello;
use rvpn_proto::sniff::alert::Alert;

pub use super::look::What;
use crate::config::{Config, Mode, Unknown};
use crate::http::{Front, Visitor};
use crate::serve::table::Ending;
use crate::serve::{Service, Visit};

/// Where to.
pub enum Way {
    /// To our HTTP, as it is.
    Http,
    /// To our HTTP, when TLS has ended here.
    Here(Certificate),
    /// To a client, untouched.
    Through(Visit),
    /// Nowhere.
    Refused(Refusal),
}

/// With which certificate TLS ends here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Certificate {
    /// That of the name, or else the gateway's own.
    Own(Option<Name>),
    /// In the place of the client that serves the name.
    Served(Name),
    /// For an authority that checks the name.
    Challenge(Name),
}

impl Certificate {
    /// Whom the visitor asked for.
    pub fn name(&self) -> Option<&Name> {
        match self {
            Certificate::Own(name) => name.as_ref(),
            Certificate::Served(name) | Certificate::Challenge(name) => Some(name),
        }
    }
}

/// What is said in parting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A TLS alert.
    Alert(Alert),
    /// That HTTP/1.1 is spoken here, in the words of HTTP/2.
    NoHttp2,
    /// That such a request is not for this port, in the words of HTTP/1.
    Misdirected,
    /// That the protocol is not known, in JSON, as an ancestor did.
    Unknown,
    /// Nothing.
    Silence,
}

/// Decides. Asks for nothing but what is known already.
pub fn decide(what: &What, mode: Mode, config: &Config, visitor: &Visitor, front: &Front) -> Way {
    match (what, mode) {
        (What::Tls(hello), _) => tls(hello, config, visitor, front),
        (What::BadTls(alert), _) => Way::Refused(Refusal::Alert(*alert)),
        (_, Mode::Tls) => Way::Refused(Refusal::Alert(Alert::UnexpectedMessage)),
        (What::Http, _) => Way::Http,
        (What::Http2, _) => Way::Refused(Refusal::NoHttp2),
        (What::Ssh, _) => by_default(config, config.front.ssh.as_ref(), Service::Ssh, visitor),
        (What::Other, _) => by_default(config, config.front.other.as_ref(), Service::Tcp, visitor),
        (What::Silent, _) => match &config.front.silent {
            Some(name) => through(name, Service::Tcp, visitor),
            None => Way::Refused(Refusal::Silence),
        },
    }
}

fn tls(hello: &ClientHello, config: &Config, visitor: &Visitor, front: &Front) -> Way {
    let Some(name) = &hello.name else {
        return Way::Here(Certificate::Own(None));
    };
    if hello.protocols.acme && front.tls.challenged(name).is_some() {
        return Way::Here(Certificate::Challenge(name.clone()));
    }
    // The gateway's names are nobody else's, whatever the table says.
    let own = config.names.lists(name.as_str()) || config.is_admin_name(name.as_str());
    if !own {
        match front.table.ending(name) {
            Some(Ending::There) => return through(name, Service::Https, visitor),
            Some(Ending::Here) => return Way::Here(Certificate::Served(name.clone())),
            None => {}
        }
    }
    Way::Here(Certificate::Own(Some(name.clone())))
}

/// To the service that the configuration names for those who name none.
fn by_default(config: &Config, name: Option<&Name>, service: Service, visitor: &Visitor) -> Way {
    match (name, config.front.unknown) {
        (Some(name), _) => through(name, service, visitor),
        (None, Unknown::Json) => Way::Refused(Refusal::Unknown),
        (None, Unknown::Close) => Way::Refused(Refusal::Silence),
    }
}

fn through(name: &Name, service: Service, visitor: &Visitor) -> Way {
    Way::Through(Visit {
        peer: visitor.peer,
        port: visitor.port,
        name: Some(name.clone()),
        service,
    })
}
