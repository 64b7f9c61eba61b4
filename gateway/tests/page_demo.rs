//! R-21, the first demonstration: a text to everybody, and counters.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod front_support;

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use front_support::client::{login, upgrade};
use front_support::tokens::claims;
use front_support::{Lab, NAME, PATIENCE};
use futures_util::{SinkExt, StreamExt};
use rvpn_gateway::demo::{LIMIT, TEXT};
use rvpn_gateway::store::{Revocation, Scope};
use serde_json::json;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tracing::subscriber::DefaultGuard;

type Socket = WebSocketStream<TlsStream<TcpStream>>;

const ON: &str = "[demo]\necho = true\nevery-seconds = 1\n";
const OPEN: &str = "[demo]\necho = true\nanonymous = true\nevery-seconds = 1\n";

/// The next message that is not a ping.
async fn next(socket: &mut Socket) -> Message {
    loop {
        let message = timeout(PATIENCE, socket.next()).await;
        match message.expect("a message in time").unwrap().unwrap() {
            Message::Ping(_) | Message::Pong(_) => {}
            message => return message,
        }
    }
}

async fn close_code(socket: &mut Socket) -> u16 {
    loop {
        if let Message::Close(frame) = next(socket).await {
            return frame.unwrap().code.into();
        }
    }
}

fn with_token(token: &str) -> String {
    upgrade(
        "/ws/client",
        NAME,
        &format!("Authorization: Bearer {token}\r\n"),
    )
}

async fn listen(lab: &Lab) -> Socket {
    lab.socket(&with_token(&lab.ops.good())).await
}

async fn until_empty(lab: &Lab) {
    let gone = async {
        while lab.front.audience.count() > 0 || lab.front.gate.connections() > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, gone).await.expect("all have left");
}

/// What is logged on this thread, which is all there is.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn start(level: tracing::Level) -> (Log, DefaultGuard) {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn lines(&self, what: &str) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let demo = text.lines().filter(|l| l.contains("rvpn_gateway::demo"));
        demo.filter(|l| l.contains(what))
            .map(str::to_owned)
            .collect()
    }
}

#[tokio::test]
async fn r_21_the_text_comes_every_so_often_and_counters_match() {
    let (log, _guard) = Log::start(tracing::Level::INFO);
    let lab = Lab::and(ON).await;
    let mut socket = listen(&lab).await;
    assert_eq!(next(&mut socket).await, Message::text(TEXT));
    let said: [Message; 3] = [
        Message::text("hello"),
        Message::binary(vec![0, 255, 10]),
        Message::text("\u{1b}[31mred\nINFO forged"),
    ];
    for message in said {
        socket.send(message).await.unwrap();
    }
    for _ in 0..2 {
        assert_eq!(next(&mut socket).await, Message::text(TEXT));
    }
    socket.close(None).await.unwrap();
    // The answer to it, and no more after that.
    while let Ok(Some(Ok(message))) = timeout(PATIENCE, socket.next()).await {
        assert!(!message.is_text(), "{message}");
    }
    until_empty(&lab).await;
    let read: Vec<_> = log.lines(": message ");
    let wanted = [
        ("bytes_read=5 bytes_written=14", "[104, 101, 108, 108, 111]"),
        ("bytes_read=8 bytes_written=14", "[0, 255, 10]"),
        ("bytes_read=28 bytes_written=14", "[27, 91, 51, 49, 109,"),
    ];
    assert_eq!(read.len(), wanted.len(), "{read:?}");
    for (line, (counters, bytes)) in read.iter().zip(wanted) {
        assert!(line.contains(counters) && line.contains(bytes), "{line}");
    }
    let left = log.lines("listener left");
    assert!(
        left[0].ends_with("bytes_read=28 bytes_written=42"),
        "{left:?}"
    );
    assert!(log.lines("forged").is_empty());
    assert_eq!(lab.echo.count(), 0, "it is no session");
}

#[tokio::test]
async fn the_time_between_two_texts_is_five_seconds_unless_told() {
    let lab = Lab::and("[demo]\necho = true\n").await;
    let demo = lab.front.config().demo.unwrap();
    assert_eq!(demo.every, Duration::from_secs(5));
    assert!(!demo.anonymous);
    let start = std::time::Instant::now();
    let mut socket = listen(&lab).await;
    assert_eq!(next(&mut socket).await, Message::text(TEXT));
    assert!(start.elapsed() >= Duration::from_secs(5));
}

#[tokio::test]
async fn what_is_longer_than_512_bytes_is_not_read() {
    let (log, _guard) = Log::start(tracing::Level::INFO);
    let lab = Lab::and(ON).await;
    let mut socket = listen(&lab).await;
    socket.send(Message::binary(vec![7; LIMIT])).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::text(TEXT));
    assert_eq!(log.lines("bytes_read=512 ").len(), 1);
    socket
        .send(Message::binary(vec![7; LIMIT + 1]))
        .await
        .unwrap();
    assert_eq!(close_code(&mut socket).await, 1009);
    until_empty(&lab).await;
    // A very long one, whose end is still on the way when it is refused.
    let (mut sink, mut stream) = listen(&lab).await.split();
    let sending = tokio::spawn(async move {
        // It may be refused in the middle.
        let _sent = sink.send(Message::binary(vec![7; 4 << 20])).await;
        sink
    });
    let code = loop {
        match timeout(PATIENCE, stream.next()).await.unwrap().unwrap() {
            Ok(Message::Close(frame)) => break u16::from(frame.unwrap().code),
            Ok(_) => {}
            Err(error) => panic!("no farewell: {error}"),
        }
    };
    assert_eq!(code, 1009);
    drop(stream);
    sending.abort();
    until_empty(&lab).await;
}

#[tokio::test]
async fn it_is_for_those_with_a_token_unless_it_is_open_to_all() {
    let lab = Lab::and(ON).await;
    let good = lab.ops.good();
    let path = |query: &str| upgrade(&format!("/ws/client{query}"), NAME, "");
    assert_eq!(lab.request(&path("")).await.status, 403);
    assert_eq!(lab.request(&with_token("a.b.c")).await.status, 403);
    // As the first demonstration's own page would come: it can only change the URL.
    let reply = lab.request(&path(&format!("?access_token={good}"))).await;
    assert_eq!(reply.status, 101);
    assert_eq!(reply.header("sec-websocket-protocol"), None);
    // As ours comes.
    let more = format!("Sec-WebSocket-Protocol: rvpn.demo.1, rvpn.bearer.{good}\r\n");
    let reply = lab.request(&upgrade("/ws/client", NAME, &more)).await;
    assert_eq!(reply.status, 101);
    assert_eq!(reply.header("sec-websocket-protocol"), Some("rvpn.demo.1"));
    // Pages of others may not, even with one.
    let foreign = format!("{more}Origin: https://evil.test\r\n");
    let reply = lab.request(&upgrade("/ws/client", NAME, &foreign)).await;
    assert_eq!(reply.status, 403);
    until_empty(&lab).await;

    let (log, _guard) = Log::start(tracing::Level::DEBUG);
    let lab = Lab::and(OPEN).await;
    let mut socket = lab.socket(&path("")).await;
    socket.send(Message::text("anybody")).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::text(TEXT));
    drop(socket);
    until_empty(&lab).await;
    // Strangers do not fill the log of those who did not ask for it.
    let lines = log.lines("");
    assert!(
        lines.len() >= 3 && lines.iter().all(|l| l.contains("DEBUG")),
        "{lines:?}"
    );
}

#[tokio::test]
async fn the_audience_is_limited_and_so_is_what_it_may_say() {
    let lab = Lab::and(format!("{OPEN}clients = 2\n")).await;
    let path = upgrade("/ws/client", NAME, "");
    let (first, second) = (lab.socket(&path).await, lab.socket(&path).await);
    let full = lab.request(&path).await;
    assert_eq!(full.status, 503);
    assert!(full.header("retry-after").is_some());
    // Whoever comes for the tunnel is not concerned.
    assert_eq!(lab.request(&login(&lab.ops.good())).await.status, 101);
    drop((first, second));
    until_empty(&lab).await;
    let mut socket = lab.socket(&path).await;
    let chatter = async {
        loop {
            if socket.feed(Message::text("x")).await.is_err() || socket.flush().await.is_err() {
                return;
            }
            if let Some(Some(Ok(Message::Close(frame)))) =
                futures_util::FutureExt::now_or_never(socket.next())
            {
                assert_eq!(u16::from(frame.unwrap().code), 1008);
                return;
            }
        }
    };
    timeout(PATIENCE, chatter).await.expect("an end to it");
    drop(socket);
    until_empty(&lab).await;
}

#[tokio::test]
async fn its_listeners_leave_when_their_time_is_over() {
    let lab = Lab::and(ON).await;
    // Taken back.
    let mut socket = listen(&lab).await;
    let revocation = Revocation {
        scope: Scope::Subject,
        value: "alice".to_owned(),
        reason: String::new(),
        created: 0,
        until: None,
    };
    assert_eq!(lab.front.gate.revoke(revocation).await.unwrap(), 1);
    assert_eq!(close_code(&mut socket).await, 1008);
    drop(socket);
    // Expired.
    let soon = SystemTime::now() + Duration::from_secs(1);
    let exp = soon
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let mut short = claims("bob");
    short["exp"] = json!(exp);
    let mut socket = lab.socket(&with_token(&lab.ops.claims(&short))).await;
    assert_eq!(close_code(&mut socket).await, 1008);
    drop(socket);
    until_empty(&lab).await;
    // The gateway ends.
    let carol = with_token(&lab.ops.claims(&claims("carol")));
    let mut socket = lab.socket(&carol).await;
    lab.front.stop();
    assert_eq!(close_code(&mut socket).await, 1012);
    drop(socket);
    until_empty(&lab).await;
    assert_eq!(lab.request(&carol).await.status, 503);
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let parse = |text: &str| {
        let least = "helper.user = 7\n[[listener]]\naddress = \"[::]:443\"\n";
        let path = std::path::Path::new("/etc/rvpn/gateway.toml");
        let text = format!("{least}{text}");
        rvpn_gateway::config::Config::parse(&text, path, |_| None).map_err(|e| e.to_string())
    };
    assert!(parse("").unwrap().demo.is_none());
    assert!(parse("[demo]\nevery-seconds = 2\n").unwrap().demo.is_none());
    for (wrong, why) in [
        (
            "[demo]\necho = true\nevery-seconds = 0\n",
            "between 1 and 60",
        ),
        (
            "[demo]\necho = true\nevery-seconds = 61\n",
            "between 1 and 60",
        ),
        ("[demo]\necho = true\nclients = 0\n", "between 1 and 65536"),
        ("[demo]\nanonymous = true\n", "add echo"),
        ("[demo]\nehco = true\n", "did you mean `echo`?"),
        (
            "[demo]\necho = true\n[[dialect]]\npath = \"/ws/client\"\n",
            "use another",
        ),
    ] {
        let error = parse(wrong).expect_err(wrong);
        assert!(error.contains(why), "{error}");
    }
    // Without the demonstration the path is free.
    assert!(parse("[[dialect]]\npath = \"/ws/client\"\n").is_ok());
}
