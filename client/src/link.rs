//! A session with a gateway: upgrade, hello, welcome.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use rvpn_proto::control::{
    self, Goodbye, Hello, Message as Control, OFFLOAD, Policy, Stage, VERSIONS, Welcome, close,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::header::{
    AUTHORIZATION, HeaderValue, RETRY_AFTER, SEC_WEBSOCKET_PROTOCOL, USER_AGENT,
};
use tokio_tungstenite::tungstenite::http::{Response, StatusCode};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::ahead::Ahead;
use crate::fail::{Failure, Kind};
use crate::profile::{Address, Hidden, encode, program};
use crate::text::shown;
use crate::tls;

/// Largest message that is taken.
const LIMIT: usize = rvpn_proto::record::MAX_RECEIVED;
/// How long the upgrade and the welcome may each take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A WebSocket over TLS.
pub(crate) type Socket<S> = WebSocketStream<Ahead<TlsStream<S>>>;

/// What is asked of a gateway.
pub(crate) struct Ask<'a> {
    /// Which.
    pub(crate) to: &'a Address,
    /// For this login.
    pub(crate) token: &'a Hidden,
    /// Of this installation.
    pub(crate) instance: &'a str,
    /// Super-packets.
    pub(crate) offload: bool,
    /// Largest packet.
    pub(crate) mtu: Option<u16>,
    /// Of the session before.
    pub(crate) ticket: Option<&'a str>,
    /// What the gateway may decide.
    pub(crate) policy: Policy<'a>,
}

/// Why there is no session.
#[derive(Debug)]
pub(crate) struct Denied {
    /// For the user.
    pub(crate) failure: Failure,
    /// Whether trying again can help.
    pub(crate) again: bool,
    /// When the gateway would like that.
    pub(crate) after: Option<Duration>,
}

impl From<Failure> for Denied {
    fn from(failure: Failure) -> Denied {
        let again = failure.kind == Kind::Unavailable;
        Denied {
            failure,
            again,
            after: None,
        }
    }
}

/// Logs in over a connection to the gateway and says hello.
pub(crate) async fn open<S>(
    connector: &TlsConnector,
    ask: Ask<'_>,
    tcp: S,
) -> Result<(Socket<S>, Box<Welcome>), Denied>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let late = |what: &str| {
        Failure::unavailable(format!("{} does not finish {what} in {PATIENCE:?}", ask.to))
    };
    let tls = tls::handshake(connector, ask.to, tcp).await?;
    let upgraded = upgrade(ask.to, ask.token, control::SUBPROTOCOL, LIMIT, tls);
    let mut socket = timeout(PATIENCE, upgraded)
        .await
        .map_err(|_| late("the upgrade"))??;
    let welcome = timeout(PATIENCE, greet(&ask, &mut socket))
        .await
        .map_err(|_| late("its welcome"))??;
    if let Err(refusal) = welcome.validate(&ask.policy) {
        let failure = Failure::new(
            Kind::Protocol,
            format!("{} asks for what it may not: {refusal}", ask.to),
        );
        let text = format!("refused: {refusal}");
        let _told = timeout(
            Duration::from_secs(1),
            goodbye(&mut socket, close::POLICY, &text),
        )
        .await;
        return Err(failure.into());
    }
    Ok((socket, welcome))
}

/// Opens a WebSocket that speaks `protocol`, in messages of `limit` bytes at most.
pub(crate) async fn upgrade<S>(
    to: &Address,
    token: &Hidden,
    protocol: &'static str,
    limit: usize,
    tls: TlsStream<S>,
) -> Result<Socket<S>, Denied>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let broken =
        |e: &dyn std::fmt::Display| Failure::internal(format!("cannot make the request: {e}"));
    let url = format!("wss://{}{}", to.authority(), control::PATH);
    let mut request = url.into_client_request().map_err(|e| broken(&e))?;
    let mut bearer =
        HeaderValue::from_str(&format!("Bearer {}", token.0)).map_err(|e| broken(&e))?;
    bearer.set_sensitive(true);
    let agent = HeaderValue::from_str(&program()).map_err(|e| broken(&e))?;
    let headers = request.headers_mut();
    headers.insert(AUTHORIZATION, bearer);
    headers.insert(USER_AGENT, agent);
    headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    let config = WebSocketConfig::default()
        .read_buffer_size(64 * 1024)
        .write_buffer_size(16 * 1024)
        .max_write_buffer_size(1024 * 1024)
        .max_message_size(Some(limit))
        .max_frame_size(Some(limit));
    match tokio_tungstenite::client_async_with_config(request, Ahead::new(tls), Some(config)).await
    {
        Ok((socket, _)) => Ok(socket),
        Err(Error::Http(answer)) => Err(refused(to, protocol, &answer)),
        Err(Error::Io(error)) => {
            Err(Failure::unavailable(format!("{to} ended the connection: {error}")).into())
        }
        Err(error) => {
            let text = format!("{to} does not speak WebSocket as it should: {error}");
            Err(Failure::new(Kind::Protocol, text).into())
        }
    }
}

/// A status instead of the upgrade.
pub(crate) fn refused(to: &Address, protocol: &str, answer: &Response<Option<Vec<u8>>>) -> Denied {
    let status = answer.status();
    let after = answer.headers().get(RETRY_AFTER);
    let after = after
        .and_then(|v| v.to_str().ok()?.parse().ok())
        .map(Duration::from_secs);
    let (kind, text) = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => (
            Kind::Refused,
            format!(
                "{to} refused the login: the token or device is unknown, expired or revoked, or \
                 this clock is wrong; ask for a new token or invite"
            ),
        ),
        StatusCode::MISDIRECTED_REQUEST => (
            Kind::Usage,
            format!(
                "{to} does not answer to the name '{}': use the name it has",
                to.host
            ),
        ),
        StatusCode::TOO_MANY_REQUESTS => (
            Kind::Unavailable,
            format!(
                "{to} has had too many logins from here or of this account: wait and try again"
            ),
        ),
        // An older one knows the path, and not what is asked of it there.
        StatusCode::BAD_REQUEST if protocol == rvpn_proto::streams::SUBPROTOCOL => (
            Kind::Protocol,
            format!(
                "{to} cannot be served through: its gateway is too old, ask its operator to update it"
            ),
        ),
        status if status.is_server_error() => (
            Kind::Unavailable,
            format!(
                "{to} answers {status}: the gateway, or what is behind a proxy there, is not ready"
            ),
        ),
        status => (
            Kind::Protocol,
            format!(
                "{to} answers {status} where an RVPN gateway would open a WebSocket: is it one?"
            ),
        ),
    };
    Denied {
        again: kind == Kind::Unavailable,
        failure: Failure::new(kind, text),
        after,
    }
}

async fn greet<S>(ask: &Ask<'_>, socket: &mut Socket<S>) -> Result<Box<Welcome>, Denied>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let hello = Control::Hello(Hello {
        versions: VERSIONS.to_vec(),
        name: program(),
        instance: ask.instance.to_owned(),
        capabilities: match ask.offload {
            true => vec![OFFLOAD.to_owned()],
            false => Vec::new(),
        },
        mtu: ask.mtu,
        keepalive_s: None,
        ticket: ask.ticket.map(str::to_owned),
    });
    let hello = encode(&hello, Stage::BeforeLogin)?;
    let lost = |why: String| {
        Failure::unavailable(format!(
            "{} ended the session before it began: {why}",
            ask.to
        ))
    };
    socket
        .send(Message::text(hello))
        .await
        .map_err(|e| lost(e.to_string()))?;
    let mut said: Option<Goodbye> = None;
    loop {
        match socket.next().await {
            Some(Ok(Message::Text(text))) => match Control::parse(&text, Stage::Session) {
                Ok(Control::Welcome(welcome)) => return Ok(welcome),
                Ok(Control::Goodbye(goodbye)) => said = Some(goodbye),
                Ok(_) => {}
                Err(error) => {
                    let text = format!("{} sends what is no welcome: {error}", ask.to);
                    return Err(Failure::new(Kind::Protocol, text).into());
                }
            },
            Some(Ok(Message::Close(frame))) => return Err(sent_away(ask.to, said, frame)),
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(lost(error.to_string()).into()),
            None => return Err(lost("the connection closed".to_owned()).into()),
        }
    }
}

/// What a farewell means.
pub(crate) fn sent_away(to: &Address, said: Option<Goodbye>, frame: Option<CloseFrame>) -> Denied {
    let (code, reason) = match (&said, &frame) {
        (Some(g), _) => (g.code, g.text.clone()),
        (None, Some(f)) => (f.code.into(), f.reason.to_string()),
        (None, None) => (close::GOING_AWAY, "no reason was given".to_owned()),
    };
    let after = said
        .and_then(|g| g.retry_after_ms)
        .map(Duration::from_millis);
    let again = after.is_some()
        || matches!(
            code,
            close::GOING_AWAY | close::INTERNAL | close::RESTART | close::POOL_FULL
        );
    let kind = match code {
        close::POLICY => Kind::Refused,
        close::PROTOCOL | close::TOO_BIG => Kind::Protocol,
        _ => Kind::Unavailable,
    };
    Denied {
        failure: Failure::new(
            kind,
            format!("{to} ended the session: {} ({code})", shown(&reason)),
        ),
        again,
        after,
    }
}

/// Says goodbye and closes.
pub(crate) async fn goodbye<S>(socket: &mut Socket<S>, code: u16, text: &str)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let message = Control::Goodbye(Goodbye {
        code,
        text: text.chars().filter(|c| !c.is_control()).take(200).collect(),
        retry_after_ms: None,
    });
    if let Ok(text) = encode(&message, Stage::Session)
        && socket.send(Message::text(text)).await.is_err()
    {
        return;
    }
    let frame = CloseFrame {
        code: CloseCode::from(code),
        reason: "".into(),
    };
    if socket.send(Message::Close(Some(frame))).await.is_ok() {
        // Whatever still comes is of no interest, only that it ends.
        while matches!(socket.next().await, Some(Ok(_))) {}
    }
}
