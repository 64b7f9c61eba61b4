//! One HTTP request on one connection.

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Duration, timeout};

use crate::cli::Admin;
use crate::fail::{Failure, Kind, Outcome, While as _};
use crate::home::read_private;

/// Longest answer that is read.
const ANSWER: usize = 64 * 1024 * 1024;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is asked.
pub(crate) struct Ask<'a> {
    pub(crate) method: Method,
    pub(crate) host: &'a str,
    pub(crate) path: &'a str,
    pub(crate) bearer: Option<&'a str>,
    pub(crate) body: Option<&'a Value>,
}

/// Asks, and reads the whole answer.
pub(crate) async fn ask<S>(io: S, ask: Ask<'_>) -> Outcome<(StatusCode, Bytes)>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let body = ask.body.map(Value::to_string).unwrap_or_default();
    let mut request = Request::builder()
        .method(ask.method)
        .uri(ask.path)
        .header(HOST, ask.host);
    if ask.body.is_some() {
        request = request.header(CONTENT_TYPE, "application/json");
    }
    if let Some(bearer) = ask.bearer {
        request = request.header(AUTHORIZATION, format!("Bearer {bearer}"));
    }
    let request = request
        .body(Full::new(Bytes::from(body)))
        .while_doing("make a request")?;
    let talk = async {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(io)).await?;
        // Ends with the request; its error is the request's.
        let driven = tokio::spawn(connection);
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER).collect().await;
        driven.abort();
        Ok::<_, hyper::Error>((status, body))
    };
    let late = || Failure::unavailable(format!("{} does not answer in {PATIENCE:?}", ask.host));
    let (status, body) = timeout(PATIENCE, talk)
        .await
        .map_err(|_| late())?
        .map_err(|e| Failure::unavailable(format!("no answer from {}: {e}", ask.host)))?;
    let body = body.map_err(|e| Failure::unavailable(format!("half an answer only: {e}")))?;
    Ok((status, body.to_bytes()))
}

/// Asks the gateway's API.
pub(crate) async fn api(
    admin: &Admin,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Outcome<Value> {
    let unreachable = |e: std::io::Error| {
        Failure::unavailable(format!(
            "no gateway answers at {}: {e}; is it running here? --admin says where its API is",
            admin.admin
        ))
    };
    let (status, answer) = match admin.admin.strip_prefix("unix:") {
        Some(socket) => {
            let io = UnixStream::connect(socket).await.map_err(unreachable)?;
            let request = Ask {
                method,
                host: "localhost",
                path,
                bearer: None,
                body,
            };
            ask(io, request).await?
        }
        None => {
            // Before connecting, as this is the likelier thing to be missing.
            let token = read_private(&admin.admin_token_file)?;
            let io = TcpStream::connect(&admin.admin)
                .await
                .map_err(unreachable)?;
            if !io.peer_addr().is_ok_and(|a| a.ip().is_loopback()) {
                return Err(Failure::usage(format!(
                    "{} is not on this machine: the API's token goes over loopback only",
                    admin.admin
                )));
            }
            let request = Ask {
                method,
                host: &admin.admin,
                path,
                bearer: Some(token.trim()),
                body,
            };
            ask(io, request).await?
        }
    };
    let value: Value = match answer.is_empty() {
        true => Value::Null,
        false => serde_json::from_slice(&answer)
            .map_err(|e| Failure::new(Kind::Protocol, format!("not an answer of the API: {e}")))?,
    };
    if status.is_success() {
        return Ok(value);
    }
    let detail = value["detail"].as_str().unwrap_or("no reason was given");
    let kind = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Kind::Refused,
        StatusCode::SERVICE_UNAVAILABLE => Kind::Unavailable,
        _ => Kind::Usage,
    };
    Err(Failure::new(kind, format!("the gateway says: {detail}")))
}
