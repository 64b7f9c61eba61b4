//! The operators' API, on a listener of its own.
//!
//! It never shares a port with strangers: loopback, where callers show the
//! admin token, or a socket file, whose permissions decide. A page in an
//! operator's browser cannot reach it either: foreign hosts and origins are
//! refused, and no cookie means anything.

mod ancestor;
mod answer;
mod certificates;
mod console;
mod count;
mod guard;
mod handlers;
mod listeners;
mod servers;
pub mod view;

use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{delete, get, post};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::debug;

use self::view::SessionRow;
use crate::config::{Config, Secret};
use crate::http::Front;
use crate::tls::Fingerprint;

const TOKEN_FILE: &str = "admin.token";
const BODY_LIMIT: usize = 16 * 1024;
/// An operator's tool sends its request at once.
const HEAD_TIME: Duration = Duration::from_secs(10);

/// What the API may ask about sessions and do to them.
pub trait SessionDirectory: Send + Sync + 'static {
    /// All of them, with their counters as of now.
    fn list(&self) -> Vec<SessionRow>;

    /// Ends one for good; false if there is none of this number.
    fn kick(&self, id: u128) -> bool;
}

/// What the API works with.
pub struct Desk {
    /// The public side.
    pub front: Arc<Front>,
    /// The sessions.
    pub directory: Arc<dyn SessionDirectory>,
    /// What callers must show; none where the socket's permissions decide.
    pub token: Option<Secret>,
    /// When the process began.
    pub started: Instant,
}

impl Desk {
    fn config(&self) -> Arc<Config> {
        self.front.config()
    }

    /// What an invite must pin, if anything.
    fn pin(&self) -> Option<Fingerprint> {
        let tls = &self.front.tls;
        tls.self_signed().then(|| tls.fingerprint())
    }
}

/// The admin token, made once and readable by its owner only.
pub fn admin_token(state_dir: &Path) -> io::Result<Secret> {
    let path = state_dir.join(TOKEN_FILE);
    match std::fs::read(&path) {
        Ok(bytes) if bytes.len() >= 32 => return Ok(Secret::new(bytes.trim_ascii())),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let text = crate::auth::base64::to_url(&crate::ticket::random::<32>()?);
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)?;
    io::Write::write_all(&mut file, format!("{text}\n").as_bytes())?;
    Ok(Secret::new(text.into_bytes()))
}

/// All routes, guarded.
pub fn router(desk: Arc<Desk>) -> Router {
    let api = Router::new()
        .route("/health", get(handlers::health))
        .route("/config", get(handlers::config))
        .route("/sessions", get(handlers::sessions))
        .route("/sessions/{id}", delete(handlers::kick))
        .route("/usage", get(handlers::usage))
        .route("/usage/accounts", get(handlers::usage_by_account))
        .route("/invites", get(handlers::invites).post(handlers::invite))
        .route("/invites/{id}", delete(handlers::remove_invite))
        .route(
            "/revocations",
            get(handlers::revocations).post(handlers::revoke),
        )
        .route(
            "/revocations/{scope}/{value}",
            delete(handlers::remove_revocation),
        )
        .route("/certificates", get(certificates::list))
        .route("/certificates/{name}/retry", post(certificates::retry))
        .route("/servers", get(servers::list))
        .route("/servers/{id}", delete(servers::kick))
        .route("/names", get(servers::names))
        .route("/listeners", get(listeners::list).post(listeners::add))
        .route("/listeners/{address}", delete(listeners::remove))
        .route("/keys", get(handlers::keys))
        .route("/keys/{id}", delete(handlers::remove_key));
    Router::new()
        .nest("/api/v1", api)
        .route("/api/servers", get(ancestor::first_servers))
        .merge(ancestor::routes())
        .layer(axum::middleware::from_fn_with_state(
            Arc::clone(&desk),
            guard::token,
        ))
        .route("/", get(console::root))
        .route("/admin", get(console::without_slash))
        .route("/admin/", get(console::page))
        .route("/admin/admin.css", get(console::style))
        .route("/admin/admin.js", get(console::script))
        .route("/livez", get(handlers::live))
        .route("/readyz", get(handlers::ready))
        .fallback(handlers::nowhere)
        .method_not_allowed_fallback(handlers::not_so)
        .layer(axum::middleware::from_fn_with_state(
            Arc::clone(&desk),
            guard::host,
        ))
        .layer(axum::middleware::from_fn(count::requests))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(desk)
}

/// Where the API is served.
#[derive(Debug)]
pub enum Socket {
    /// Loopback.
    Tcp(TcpListener),
    /// A socket file.
    Unix(UnixListener),
}

/// Serves until told to stop.
pub async fn run(socket: Socket, router: Router, mut stop: watch::Receiver<bool>) {
    loop {
        let accepted: io::Result<()> = tokio::select! {
            _ = stop.wait_for(|s| *s) => return,
            accepted = async {
                match &socket {
                    Socket::Tcp(tcp) => tcp.accept().await.map(|(io, _)| serve(io, &router)),
                    Socket::Unix(unix) => unix.accept().await.map(|(io, _)| serve(io, &router)),
                }
            } => accepted,
        };
        if let Err(error) = accepted {
            debug!(%error, "admin accept");
            sleep(Duration::from_millis(100)).await;
        }
    }
}

fn serve(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: &Router) {
    let service = TowerToHyperService::new(router.clone());
    tokio::spawn(async move {
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIME)
            .serve_connection(TokioIo::new(count::Bytes(io)), service)
            .await;
        if let Err(error) = served {
            debug!(%error, "an operator's connection");
        }
    });
}
