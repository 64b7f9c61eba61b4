//! HTTP for names that clients serve.
//!
//! Every request is read whole as far as its head goes, judged by its own
//! `Host`, and written anew: what a client receives is what we understood, not
//! what was sent. Bodies stream both ways, as far as the slower side goes.
//!
//! A visitor's connection lives on the core of the client that its first
//! request is for, and has one stream to a client at a time, used again as
//! long as the next request is for the same.

pub mod first;
mod head;
mod pages;
mod upstream;
mod watched;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use rvpn_proto::name::Name;
use tracing::debug;

use self::head::Told;
use self::upstream::Upstream;
use self::watched::{Pulse, Watched};
use super::table::{Chosen, Wanted};
use super::visit::watch_over;
use super::{Service, Visit};
use crate::acme::CHALLENGE_PATH;
use crate::admit::Io;
use crate::config::serve::Http;
use crate::http::{Front, Visitor};
use crate::limits::PendingPass;

/// A request's line and headers together.
const HEAD_LIMIT: usize = 32 * 1024;
const MAX_HEADERS: usize = 100;
/// How long a request or an answer may stand still, whatever is allowed to
/// connections that are not read.
const STILL: Duration = Duration::from_secs(600);

/// A body of ours or of a client.
type Body = UnsyncBoxBody<Bytes, hyper::Error>;
type Answer = Response<Body>;

/// Everything about a connection that its requests share.
struct Connection {
    front: Arc<Front>,
    visitor: Visitor,
    tls: bool,
    /// The client that was chosen before the first request was read.
    first: Mutex<Option<Chosen>>,
    /// Its place among the strangers, until it is counted among a client's visitors.
    pass: Mutex<Option<PendingPass>>,
    /// The stream that was used last.
    upstream: Mutex<Option<Upstream>>,
    pulse: Pulse,
    idle: Duration,
}

/// Serves a connection whose first request is for `name`, on the core of the
/// client that serves it.
pub async fn serve(front: Arc<Front>, io: Io, visitor: Visitor, pass: PendingPass, name: Name) {
    let wanted = Wanted::Name(name, Service::Http);
    let first = front.table.seek(&wanted, visitor.peer, &[]).await;
    let config = front.config();
    let core = first.as_ref().map(|c| c.server.carrier.core());
    let connection = Arc::new(Connection {
        visitor,
        tls: io.is_tls(),
        first: Mutex::new(first),
        pass: Mutex::new(Some(pass)),
        upstream: Mutex::default(),
        pulse: Pulse::default(),
        idle: config.serve.idle,
        front: Arc::clone(&front),
    });
    let head_time = config.limits.login_time;
    match core {
        Some(core) => {
            let task = async move { run(connection, io, head_time, true).await };
            front.sessions.run(core, Box::pin(task));
        }
        None => run(connection, io, head_time, false).await,
    }
}

async fn run(connection: Arc<Connection>, mut io: Io, head_time: Duration, moved: bool) {
    if moved && let Err(error) = io.rehome() {
        return debug!(%error, "cannot move a visitor to its server's core");
    }
    watch_over(&io);
    let still = connection.idle.min(STILL);
    let pulse = connection.pulse.clone();
    let service = service_fn(|request| {
        let connection = Arc::clone(&connection);
        let answer: Pin<Box<dyn Future<Output = Result<Answer, Infallible>> + Send>> =
            Box::pin(async move { Ok(respond(&connection, request).await) });
        answer
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_time)
        .max_buf_size(HEAD_LIMIT)
        .max_headers(MAX_HEADERS)
        .half_close(true)
        .preserve_header_case(true)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(Watched::new(io, pulse.clone())), service)
        .with_upgrades();
    tokio::select! {
        served = serving => {
            if let Err(error) = served {
                debug!(%error, "a visitor's connection");
            }
        }
        () = pulse.stops(still) => debug!("a visitor's connection stood still"),
    }
}

async fn respond(connection: &Connection, request: Request<Incoming>) -> Answer {
    match answer(connection, request).await {
        Ok(answer) => answer,
        // Whoever is counted nowhere any more does not stay for pages.
        Err(page) if lock(&connection.pass).is_none() => pages::close(page),
        Err(page) => page,
    }
}

async fn answer(connection: &Connection, request: Request<Incoming>) -> Result<Answer, Answer> {
    let (mut parts, body) = request.into_parts();
    let wrong = || pages::closing(StatusCode::BAD_REQUEST);
    let (name, host) = head::host(&parts).ok_or_else(wrong)?;
    if connection
        .visitor
        .asked
        .as_ref()
        .is_some_and(|asked| *asked != name)
    {
        return Err(pages::closing(StatusCode::MISDIRECTED_REQUEST));
    }
    let config = connection.front.config();
    if config.names.lists(name.as_str()) {
        // It began with a name of ours or it goes elsewhere: never both.
        return Err(pages::closing(StatusCode::MISDIRECTED_REQUEST));
    }
    if parts.method == Method::CONNECT || !head::is_sound(&parts) {
        return Err(wrong());
    }
    let told = told(connection, &parts, &host);
    let path = parts.uri.path();
    let challenge = path.starts_with(CHALLENGE_PATH);
    if challenge
        && parts.method == Method::GET
        && let Some(text) = connection.front.acme.answer(&name, path)
    {
        // Ours to answer: TLS for this name ends here.
        return Ok(pages::plain(text));
    }
    if !told.secure && !challenge {
        match config.serve.policy(&name).http {
            Http::Forward => {}
            Http::Redirect => return Err(pages::moved(&parts, &name)),
            Http::AcmeOnly => return Err(pages::page(StatusCode::NOT_FOUND)),
        }
    }
    let upgrade = head::upgrade(&parts);
    if upgrade.is_some() && parts.version != Version::HTTP_11 {
        return Err(wrong());
    }
    head::forward(&mut parts, &told, upgrade);
    let visit = Visit {
        peer: told.peer,
        port: connection.visitor.port,
        name: Some(name),
        service: Service::Http,
    };
    upstream::forward(connection, visit, Request::from_parts(parts, body), upgrade).await
}

/// What the client is told of the visitor. Who is believed may say whom it
/// speaks for; nobody else may.
fn told(connection: &Connection, parts: &hyper::http::request::Parts, host: &str) -> Told {
    let visitor = &connection.visitor;
    let address = visitor.address(&parts.headers);
    let said_secure = visitor.believed && head::says_https(&parts.headers);
    Told {
        peer: SocketAddr::new(address, visitor.peer.port()),
        secure: connection.tls || said_secure,
        host: host.to_owned(),
    }
}

impl Connection {
    fn take_first(&self) -> Option<Chosen> {
        lock(&self.first).take()
    }

    /// From here on it counts among a client's visitors.
    fn settle(&self) {
        lock(&self.pass).take();
    }

    fn take_upstream(&self) -> Option<Upstream> {
        lock(&self.upstream).take()
    }

    fn keep(&self, upstream: Upstream) {
        *lock(&self.upstream) = Some(upstream);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
