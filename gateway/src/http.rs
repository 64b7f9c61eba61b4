//! The public port's HTTP: the way in for clients, and a page for everybody else.
//!
//! hyper parses; the upgrade is ours. Until the 101 is written nothing of what
//! a client sent behind its request is looked at, and if there is no 101 the
//! connection closes, so that it never is.

pub mod answer;
pub mod join;
mod login;
mod office;
pub mod request;

use std::convert::Infallible;
use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use axum::Router;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::HeaderMap;
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rvpn_proto::control::SUBPROTOCOL;
use rvpn_proto::name::Name;
use rvpn_proto::streams;
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::debug;

use self::answer::{Answer, Refusal};
use self::login::Asked;
use self::request::Target;
use crate::acme::{Acme, CHALLENGE_PATH};
use crate::admit::{Admission, Io, Kind, Sessions};
use crate::auth::Gate;
use crate::auth::live::Pass;
use crate::config::Config;
use crate::demo::{self, Audience, Guest};
use crate::front::listeners::Listeners;
use crate::front::ports::Ports;
use crate::limits::{Failures, Pending, PendingPass, Place, Refusals};
use crate::packer;
use crate::serve::proxy;
use crate::serve::proxy::first::{self, First};
use crate::serve::table::Table;
use crate::tls::Tls;

/// A request's line and headers together.
const HEAD_LIMIT: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;
/// How many login times a stranger may stay, whatever it asks for.
const STAY: u32 = 3;
/// How long the farewell to a slow stranger may take.
const PARTING: Duration = Duration::from_secs(1);

/// All that the public port works with.
pub struct Front {
    config: ArcSwap<Config>,
    /// Who is let in.
    pub gate: Arc<Gate>,
    /// The certificate.
    pub tls: Arc<Tls>,
    /// Certificates that are got and renewed by themselves.
    pub acme: Arc<Acme>,
    /// Where those go who are.
    pub sessions: Arc<dyn Sessions>,
    /// Who serves what to the world.
    pub table: Arc<Table>,
    /// Who came for the demonstration.
    pub audience: Audience,
    /// The operators' API, for a name of theirs on the public port.
    pub office: OnceLock<Router>,
    /// Strangers.
    pub pending: Arc<Pending>,
    /// Those who failed.
    pub failures: Failures,
    /// And how often.
    pub refusals: Refusals,
    /// TLS handshakes at once.
    pub handshakes: Semaphore,
    /// Where people come in.
    pub listeners: Listeners,
    stopping: AtomicBool,
}

impl Front {
    /// Puts the parts together.
    pub fn new(
        config: Arc<Config>,
        gate: Arc<Gate>,
        tls: Arc<Tls>,
        sessions: Arc<dyn Sessions>,
    ) -> Arc<Front> {
        let handshakes = Semaphore::new(config.limits.handshakes);
        let acme = Acme::new(config.state_dir.clone(), Arc::clone(&tls));
        let table = sessions.table();
        table.configure(config.serve.clone());
        let front = Arc::new(Front {
            config: ArcSwap::new(config),
            gate,
            tls,
            acme,
            table,
            sessions,
            audience: Audience::default(),
            office: OnceLock::new(),
            pending: Arc::default(),
            failures: Failures::new(),
            refusals: Refusals::new(Instant::now()),
            handshakes,
            listeners: Listeners::default(),
            stopping: AtomicBool::new(false),
        });
        front.table.listen_by(Arc::new(Ports::of(&front)));
        front
    }

    /// The configuration in force.
    pub fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    /// Puts another in force, for requests from now on.
    pub fn configure(&self, config: Arc<Config>) {
        self.table.configure(config.serve.clone());
        self.config.store(config);
    }

    /// Lets nobody in from now on.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.audience.stop();
    }

    /// Whether nobody is let in any more.
    pub fn stopped(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Whether a client that comes now can be served, and if not, why.
    pub fn ready(&self) -> Result<(), String> {
        match self.stopped() {
            true => Err("shutting down".to_owned()),
            false => self.sessions.ready(),
        }
    }
}

/// Who connects, as far as is known before a login.
#[derive(Clone, Debug)]
pub struct Visitor {
    /// The address behind a proxy that said so by PROXY v2.
    pub peer: SocketAddr,
    /// Whether its `X-Forwarded-For` is believed.
    pub believed: bool,
    /// Which listener it came through.
    pub listener: usize,
    /// The port it came to.
    pub port: u16,
    /// Whom it asked for when TLS ended here, if it did and said so.
    pub asked: Option<Name>,
}

impl Visitor {
    /// Whom limits and logs are about.
    pub(crate) fn address(&self, headers: &HeaderMap) -> IpAddr {
        let last = headers.get_all("x-forwarded-for").iter().next_back();
        let forwarded = last
            .filter(|_| self.believed)
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.rsplit(',').next())
            .and_then(|v| v.trim().parse::<IpAddr>().ok());
        forwarded.map_or(self.peer.ip(), |a| a.to_canonical())
    }
}

/// Where an upgrade leads.
enum Way {
    Session(Box<Admission>),
    Demo(Guest),
    Tunnel(Box<packer::Arrival>),
}

/// What a request led to beside its answer.
type Let = Arc<Mutex<Option<(Way, Option<Pass>)>>>;

/// Serves one connection until it is a session's or closed.
pub async fn serve(front: Arc<Front>, mut io: Io, visitor: Visitor, pass: PendingPass) {
    let config = front.config();
    let limit = config.limits.login_time;
    match first::look(&mut io, &config, &front.table, limit).await {
        First::Ours(bytes) => io.unread(bytes),
        First::Theirs(bytes, name) => {
            io.unread(bytes);
            return proxy::serve(front, io, visitor, pass, name).await;
        }
        First::Late => return say_late(io).await,
        First::Nothing => return drop(timeout(PARTING, io.shutdown()).await),
    }
    drop(config);
    let tls = io.is_tls();
    let let_in: Let = Arc::default();
    let service = service_fn(|request| {
        let (front, let_in) = (Arc::clone(&front), Arc::clone(&let_in));
        let visitor = visitor.clone();
        let answer: Pin<Box<dyn Future<Output = Result<Answer, Infallible>> + Send>> =
            Box::pin(async move {
                let answered = respond(&front, request, visitor, tls, &let_in).await;
                Ok(answered.unwrap_or_else(Refusal::into_answer))
            });
        answer
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limit)
        .max_buf_size(HEAD_LIMIT)
        .max_headers(MAX_HEADERS)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(io), service);
    let served = poll_fn(|cx| connection.poll_without_shutdown(cx));
    let served = timeout(limit * STAY, served).await;
    let parts = connection.into_parts();
    let mut io = parts.io.into_inner();
    let admitted = let_in.lock().unwrap_or_else(PoisonError::into_inner).take();
    match (served, admitted) {
        (Ok(Ok(())), Some((way, place))) => {
            if let Some(place) = place {
                io.hold(place);
            }
            match way {
                Way::Tunnel(mut arrival) => {
                    // Who has not logged in yet is still a stranger.
                    arrival.pending = arrival.login.is_none().then_some(pass);
                    front.sessions.tunnel(*arrival, io, parts.read_buf);
                }
                Way::Session(admission) => {
                    drop(pass);
                    front.sessions.admit(*admission, io, parts.read_buf);
                }
                Way::Demo(guest) => {
                    drop(pass);
                    guest.run(io, parts.read_buf).await;
                }
            }
        }
        (Ok(Err(error)), _) if error.is_timeout() && !parts.read_buf.is_empty() => {
            // In the middle of a request: the only case that deserves a word.
            say_late(io).await;
        }
        (served, _) => {
            if let Ok(Err(error)) = served {
                debug!(%error, "a stranger's connection");
            }
            drop(timeout(PARTING, io.shutdown()).await);
        }
    }
}

async fn say_late(mut io: Io) {
    drop(timeout(PARTING, io.write_all(answer::TIMEOUT)).await);
    drop(timeout(PARTING, io.shutdown()).await);
}

async fn respond(
    front: &Arc<Front>,
    request: Request<Incoming>,
    visitor: Visitor,
    tls: bool,
    let_in: &Let,
) -> Result<Answer, Refusal> {
    let config = front.config();
    let (head, body) = request.into_parts();
    if office::is_asked(&head, &visitor, tls, &config)
        && let Some(router) = front.office.get()
    {
        request::sizes(&head)?;
        let place = Place::of(visitor.address(&head.headers));
        let request = Request::from_parts(head, body);
        return office::respond(front, router.clone(), request, place).await;
    }
    if let Some(text) = challenged(front, &head) {
        return Ok(answer::plain(text));
    }
    let host = request::host(&head, &config.names)?;
    request::sizes(&head)?;
    let asked = Asked {
        front,
        head: &head,
        address: visitor.address(&head.headers),
        visitor,
    };
    let get = matches!(head.method, Method::GET | Method::HEAD);
    match Target::of_request(&head, &config) {
        Target::Tunnel => {
            let accept = request::upgrade(&head)?;
            request::origin(&head.headers, &host, tls, &config)?;
            let led = asked.tunnel(front, &host).await?;
            *let_in.lock().unwrap_or_else(PoisonError::into_inner) = Some(led);
            Ok(answer::switching(&accept, None))
        }
        Target::Join if head.method == Method::POST => {
            request::origin(&head.headers, &host, tls, &config)?;
            join::respond(front, &head, body, Place::of(asked.address)).await
        }
        Target::Packets => {
            let accept = request::upgrade(&head)?;
            request::origin(&head.headers, &host, tls, &config)?;
            let (kind, protocol) = if request::offers(&head.headers, SUBPROTOCOL) {
                (Kind::Native, SUBPROTOCOL)
            } else if request::offers(&head.headers, streams::SUBPROTOCOL) {
                let via = host.via(tls || asked.visitor.believed);
                (Kind::Streams(Arc::new(via)), streams::SUBPROTOCOL)
            } else {
                return Err(Refusal::new(
                    StatusCode::BAD_REQUEST,
                    "the subprotocol rvpn.packets.1 or rvpn.streams.1 is missing",
                ));
            };
            let led = asked.session(kind).await?;
            *let_in.lock().unwrap_or_else(PoisonError::into_inner) = Some(led);
            Ok(answer::switching(&accept, Some(protocol)))
        }
        Target::Dialect(dialect) => {
            let accept = request::upgrade(&head)?;
            request::origin(&head.headers, &host, tls, &config)?;
            let led = asked.session(Kind::Dialect(dialect)).await?;
            *let_in.lock().unwrap_or_else(PoisonError::into_inner) = Some(led);
            Ok(answer::switching(&accept, None))
        }
        Target::Demo(demo) => {
            let accept = request::upgrade(&head)?;
            request::origin(&head.headers, &host, tls, &config)?;
            let led = asked.demo(&demo).await?;
            *let_in.lock().unwrap_or_else(PoisonError::into_inner) = Some(led);
            let offered = request::offers(&head.headers, demo::SUBPROTOCOL);
            Ok(answer::switching(
                &accept,
                offered.then_some(demo::SUBPROTOCOL),
            ))
        }
        Target::Check if get => {
            request::origin(&head.headers, &host, tls, &config)?;
            // What it would be given is given back at once.
            asked.session(Kind::Native).await.map(drop)?;
            Ok(answer::nothing())
        }
        Target::Landing if get => Ok(answer::landing()),
        Target::Client(part) if get => Ok(answer::client(part, config.demo.as_ref())),
        Target::Moved(to) if get => Ok(answer::moved(to)),
        Target::Nothing => Err(Refusal::new(StatusCode::NOT_FOUND, "not found")),
        _ => Err(Refusal::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "not like this",
        )),
    }
}

/// What an authority is to find that checks a name here, ours or not. Nobody
/// else's challenge is answered.
fn challenged(front: &Front, head: &Parts) -> Option<String> {
    let path = head.uri.path();
    if head.method != Method::GET || !path.starts_with(CHALLENGE_PATH) {
        return None;
    }
    let host = request::own_host(head).ok()?;
    front.acme.answer(&Name::parse(host.name()).ok()?, path)
}

/// A body that is there at once.
pub(crate) type Whole = Full<Bytes>;
