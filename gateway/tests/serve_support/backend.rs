//! What a client that serves has behind it: an HTTP server that remembers.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rvpn_gateway::serve::Visit;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::watch;

use super::Asked;

pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// A request as the server behind a client saw it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) line: String,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Vec<(String, String)>,
}

impl Seen {
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        let found = self.headers.iter().filter(|(n, _)| n == name);
        found.map(|(_, v)| v.as_str()).collect()
    }
}

/// Everything that came, in order.
#[derive(Clone)]
pub(crate) struct Backend {
    pub(crate) seen: Arc<Mutex<Vec<Seen>>>,
    pub(crate) visits: Arc<Mutex<Vec<Visit>>>,
    /// Bytes of all streams, as they came and as they went.
    pub(crate) moved: Arc<Mutex<(Vec<u8>, u64)>>,
    stop: watch::Sender<bool>,
}

/// How it answers.
pub(crate) type Answering = fn(&str, &Seen) -> Response<Body>;

impl Backend {
    /// Serves all streams of a client; `canary` is known to `answering`.
    pub(crate) fn start(canary: &str, mut asked: Asked, answering: Answering) -> Backend {
        let backend = Backend {
            seen: Arc::default(),
            visits: Arc::default(),
            moved: Arc::default(),
            stop: watch::Sender::new(false),
        };
        let all = backend.clone();
        let canary: Arc<str> = canary.into();
        let mut stopped = all.stop.subscribe();
        tokio::spawn(async move {
            loop {
                let next = tokio::select! {
                    next = asked.recv() => next,
                    _ = stopped.wait_for(|s| *s) => None,
                };
                let Some((visit, stream)) = next else { return };
                all.visits.lock().unwrap().push(visit);
                let (all, canary) = (all.clone(), Arc::clone(&canary));
                tokio::spawn(async move {
                    let mut stopped = all.stop.subscribe();
                    tokio::select! {
                        () = all.serve(stream, &canary, answering) => {}
                        _ = stopped.wait_for(|s| *s) => {}
                    }
                });
            }
        });
        backend
    }

    async fn serve(&self, stream: DuplexStream, canary: &str, answering: Answering) {
        let tee = Tee {
            inner: stream,
            moved: Arc::clone(&self.moved),
        };
        let service = service_fn(|request: Request<Incoming>| async move {
            let seen = see(request).await?;
            let answer = answering(canary, &seen);
            self.seen.lock().unwrap().push(seen);
            Ok::<_, hyper::Error>(answer)
        });
        let _ended = http1::Builder::new()
            .half_close(true)
            .serve_connection(TokioIo::new(tee), service)
            .await;
    }

    /// Cuts all streams off.
    pub(crate) fn kill(&self) {
        self.stop.send_replace(true);
    }

    pub(crate) fn last(&self) -> Seen {
        self.seen.lock().unwrap().last().unwrap().clone()
    }

    pub(crate) fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

async fn see(request: Request<Incoming>) -> Result<Seen, hyper::Error> {
    let line = format!("{} {}", request.method(), request.uri());
    let headers = pairs(request.headers());
    let body = request.into_body().collect().await?;
    Ok(Seen {
        line,
        headers,
        trailers: body.trailers().map(pairs).unwrap_or_default(),
        body: body.to_bytes().to_vec(),
    })
}

fn pairs(headers: &hyper::HeaderMap) -> Vec<(String, String)> {
    let text = |v: &hyper::header::HeaderValue| String::from_utf8_lossy(v.as_bytes()).into_owned();
    headers
        .iter()
        .map(|(n, v)| (n.to_string(), text(v)))
        .collect()
}

/// The canary, and what was asked.
pub(crate) fn tell(canary: &str, seen: &Seen) -> Response<Body> {
    whole(format!("{canary} {} {}\n", seen.line, seen.body.len()))
}

pub(crate) fn whole(text: impl Into<Bytes>) -> Response<Body> {
    Response::new(Full::new(text.into()).boxed_unsync())
}

/// Remembers what passes.
struct Tee {
    inner: DuplexStream,
    moved: Arc<Mutex<(Vec<u8>, u64)>>,
}

impl AsyncRead for Tee {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        let new = &buf.filled()[before..];
        self.moved.lock().unwrap().0.extend_from_slice(new);
        polled
    }
}

impl AsyncWrite for Tee {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        if let Poll::Ready(Ok(n)) = polled {
            self.moved.lock().unwrap().1 += n as u64;
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
