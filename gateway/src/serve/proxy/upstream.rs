//! A request on its way to a client, and the answer back.

use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::debug;

use super::head::{self, WebSocket};
use super::{Answer, Connection, HEAD_LIMIT, pages};
use crate::serve::Visit;
use crate::serve::splice::{Metered, Requests, splice};
use crate::serve::table::What;
use crate::serve::visit::{Reached, Unserved, proxy_header, reach};

/// How long a stream waits for the next request: less than servers do, so that
/// no request meets a server that is just hanging up.
const RESTING: Duration = Duration::from_secs(4);
/// How long its task may take to be free again.
const TURN: Duration = Duration::from_millis(20);
/// What an answer's head may be.
const MAX_HEADERS: usize = 256;

/// A stream to a client that speaks HTTP. Dropping it cuts it off.
pub(super) struct Upstream {
    number: u64,
    what: What,
    sender: SendRequest<Incoming>,
    requests: Requests,
    running: Running,
    rested: Instant,
}

/// The task that moves its bytes, which ends with it unless it was let go.
struct Running(Option<JoinHandle<()>>);

impl Running {
    fn let_go(mut self) {
        self.0 = None;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// Sends the request to a client that serves its name and returns the answer,
/// or the page that stands for it.
pub(super) async fn forward(
    connection: &Connection,
    visit: Visit,
    mut request: Request<Incoming>,
    upgrade: Option<WebSocket>,
) -> Result<Answer, Answer> {
    if head::expects_too_much(request.headers()) {
        return Err(pages::closing(StatusCode::EXPECTATION_FAILED));
    }
    // The visitor's side of an upgrade, for when the client agrees.
    let near = upgrade.map(|_| hyper::upgrade::on(&mut request));
    let mut upstream = match again(connection, &visit).await {
        Some(upstream) => upstream,
        None => open(connection, &visit).await?,
    };
    upstream.requests.request();
    let mut sent = upstream.sender.try_send_request(request).await;
    if let Err(error) = &mut sent
        && let Some(unsent) = error.take_message()
    {
        // The stream had ended before it took anything of the request.
        upstream = open(connection, &visit).await?;
        upstream.requests.request();
        sent = upstream.sender.try_send_request(unsent).await;
    }
    let answer = match sent {
        Ok(answer) => answer,
        Err(error) => {
            let error = error.into_error();
            debug!(%error, "a client gave no answer");
            if error.is_user() {
                // The visitor's own body was none.
                return Err(pages::closing(StatusCode::BAD_REQUEST));
            }
            return Err(pages::page(StatusCode::BAD_GATEWAY));
        }
    };
    upstream.requests.response();
    match (answer.status() == StatusCode::SWITCHING_PROTOCOLS, near) {
        (true, Some(near)) => Ok(switch(connection, upstream, answer, near)),
        // Nobody asked for it.
        (true, None) => Err(pages::closing(StatusCode::BAD_GATEWAY)),
        (false, near) => {
            let mut answer = pass_back(connection, upstream, answer);
            if near.is_some() {
                // What was sent in expectation of another protocol is not read
                // as anything.
                let close = HeaderValue::from_static("close");
                answer.headers_mut().insert(CONNECTION, close);
            }
            Ok(answer)
        }
    }
}

/// The stream of the last request, if it leads to the same and is still good.
async fn again(connection: &Connection, visit: &Visit) -> Option<Upstream> {
    let mut upstream = connection.take_upstream()?;
    let What::Name(pattern) = &upstream.what else {
        return None;
    };
    let name = visit.name.as_ref()?;
    let table = &connection.front.table;
    let good = pattern.covers(name)
        && upstream.rested.elapsed() < RESTING
        && table.still(upstream.number, &upstream.what)
        && table.nearest(name).as_ref() == Some(&upstream.what);
    if !good {
        return None;
    }
    // Its task may not have turned since the last answer ended.
    let ready = timeout(TURN, upstream.sender.ready()).await;
    matches!(ready, Ok(Ok(()))).then_some(upstream)
}

async fn open(connection: &Connection, visit: &Visit) -> Result<Upstream, Answer> {
    let table = &connection.front.table;
    let first = connection.take_first();
    let Reached { chosen, mut stream } =
        reach(table, visit, first, Metered::bytes)
            .await
            .map_err(|why| {
                pages::page(match why {
                    Unserved::Full => StatusCode::SERVICE_UNAVAILABLE,
                    Unserved::Nobody | Unserved::Failed => StatusCode::BAD_GATEWAY,
                })
            })?;
    connection.settle();
    let failed = || pages::page(StatusCode::BAD_GATEWAY);
    if chosen.proxy {
        let header = proxy_header(visit.peer, visit.port);
        stream.write_all(&header).await.map_err(|_| failed())?;
    }
    let requests = stream.requests();
    let (sender, conn) = http1::Builder::new()
        .max_buf_size(HEAD_LIMIT)
        .max_headers(MAX_HEADERS)
        .preserve_header_case(true)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|_| failed())?;
    let running = tokio::spawn(async move {
        if let Err(error) = conn.with_upgrades().await {
            debug!(%error, "a stream to a client");
        }
    });
    Ok(Upstream {
        number: chosen.number,
        what: chosen.what,
        sender,
        requests,
        running: Running(Some(running)),
        rested: Instant::now(),
    })
}

/// Both sides agree on a WebSocket: from here on bytes are bytes.
fn switch(
    connection: &Connection,
    upstream: Upstream,
    mut answer: Response<Incoming>,
    near: hyper::upgrade::OnUpgrade,
) -> Answer {
    let websocket = answer
        .headers()
        .get(UPGRADE)
        .is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"websocket"));
    if !websocket {
        return pages::closing(StatusCode::BAD_GATEWAY);
    }
    let far = hyper::upgrade::on(&mut answer);
    let idle = connection.idle;
    tokio::spawn(async move {
        let Upstream {
            sender, running, ..
        } = upstream;
        let both = async { Ok::<_, hyper::Error>((near.await?, far.await?)) };
        match both.await {
            Ok((near, far)) => {
                running.let_go();
                drop(sender);
                splice(TokioIo::new(near), TokioIo::new(far), idle).await;
            }
            Err(error) => debug!(%error, "a WebSocket that did not begin"),
        }
    });
    let (mut parts, _) = answer.into_parts();
    head::back(&mut parts.headers);
    let headers = &mut parts.headers;
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    let nothing = http_body_util::Empty::new();
    let nothing = nothing.map_err(|never| match never {}).boxed_unsync();
    Response::from_parts(parts, nothing)
}

/// The answer with its body, behind which the stream is free for the next request.
fn pass_back(
    connection: &Connection,
    mut upstream: Upstream,
    answer: Response<Incoming>,
) -> Answer {
    let (mut parts, body) = answer.into_parts();
    head::back(&mut parts.headers);
    upstream.rested = Instant::now();
    connection.keep(upstream);
    Response::from_parts(parts, body.boxed_unsync())
}
