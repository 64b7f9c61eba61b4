//! Bodies and what goes with them: lengths, trailers, upgrades, expectations.

use std::convert::Infallible;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Frame};
use hyper::{Response, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::front_support::Lab;
use crate::front_support::client::{ACCEPT, ask, read_reply, read_to_end, upgrade};
use crate::serve_support::backend::{Body, Seen, whole};
use crate::serve_support::serve;
use crate::{get, plain, web, web_with};

#[tokio::test]
async fn a_websocket_is_passed_on_and_bytes_behind_its_request_wait_for_the_101() {
    let lab = Lab::new().await;
    let mut a = serve(&lab.front.table, "alice", "1", &["a.ex"]);
    let mut io = lab.tcp().await;
    let early = upgrade("/ws", "a.ex", "Sec-WebSocket-Protocol: chat\r\n") + "early bytes";
    io.write_all(early.as_bytes()).await.unwrap();
    let (_, mut stream) = a.asked.recv().await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        assert!(stream.read_buf(&mut head).await.unwrap() > 0);
    }
    let text = String::from_utf8(head).unwrap();
    assert!(text.contains("Sec-WebSocket-Protocol: chat") && text.contains("Sec-WebSocket-Key"));
    // Nothing more comes before the answer.
    let more = tokio::time::timeout(Duration::from_millis(100), stream.read(&mut [0; 1])).await;
    assert!(more.is_err());
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {ACCEPT}\r\n\r\nhello"
    );
    stream.write_all(answer.as_bytes()).await.unwrap();
    let mut bytes = [0; 11];
    stream.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"early bytes");
    let mut reply = read_reply(&mut io).await;
    assert_eq!(reply.status, 101);
    assert_eq!(reply.header("sec-websocket-accept"), Some(ACCEPT));
    while reply.rest.len() < 5 {
        io.read_buf(&mut reply.rest).await.unwrap();
    }
    assert_eq!(reply.rest, b"hello");
    stream.write_all(b"and more").await.unwrap();
    let mut bytes = [0; 8];
    io.read_exact(&mut bytes).await.unwrap();
    // Each side ends by itself.
    io.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut bytes).await.unwrap(), 0);
    stream.write_all(b"last").await.unwrap();
    drop(stream);
    assert_eq!(read_to_end(&mut io).await, b"last");
    assert_eq!(lab.front.table.snapshot().visitors.current, 0);
}

#[tokio::test]
async fn bodies_of_any_size_stream_both_ways() {
    const SIZE: usize = 40 << 20;
    let lab = Lab::new().await;
    let mut a = serve(&lab.front.table, "alice", "1", &["a.ex"]);
    let mut io = lab.tcp().await;
    let head = format!("POST / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: {SIZE}\r\n\r\n");
    io.write_all(head.as_bytes()).await.unwrap();
    let (_, mut stream) = a.asked.recv().await.unwrap();
    let (mut read, mut write) = io.into_split();
    let piece: Vec<u8> = (0..1 << 16).map(|i: u32| (i % 251) as u8).collect();
    let sent = piece.clone();
    let sending = tokio::spawn(async move {
        for _ in 0..SIZE / sent.len() {
            write.write_all(&sent).await.unwrap();
        }
        write
    });
    // As long as the client does not read, no more is taken than buffers hold.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!sending.is_finished());
    let mut got = Vec::new();
    while !got.windows(4).any(|w| w == b"\r\n\r\n") {
        stream.read_buf(&mut got).await.unwrap();
    }
    let head = got.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    let mut body = got.split_off(head);
    let mut at = 0;
    while at < SIZE {
        for byte in body.drain(..) {
            assert_eq!(byte, piece[at % piece.len()]);
            at += 1;
        }
        if at < SIZE {
            assert!(stream.read_buf(&mut body).await.unwrap() > 0);
        }
    }
    sending.await.unwrap();
    // Back without a length, in chunks to the visitor.
    let answering = tokio::spawn(async move {
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            .await
            .unwrap();
        for _ in 0..SIZE / piece.len() {
            stream.write_all(&piece).await.unwrap();
        }
    });
    let mut reader = tokio::io::BufReader::new(&mut read);
    let mut total = 0;
    let head = read_reply(&mut reader).await;
    assert_eq!(head.header("transfer-encoding"), Some("chunked"));
    let mut buf = head.rest;
    total += buf.len();
    while !buf.ends_with(b"0\r\n\r\n") {
        buf.drain(..buf.len().saturating_sub(5));
        let before = buf.len();
        assert!(reader.read_buf(&mut buf).await.unwrap() > 0);
        total += buf.len() - before;
    }
    assert!(total > SIZE && total < SIZE + SIZE / 10, "{total}");
    answering.await.unwrap();
    let traffic = lab.front.table.snapshot().traffic;
    assert!(traffic.inbound > SIZE as u64 && traffic.outbound > SIZE as u64);
}

fn trailing(_: &str, seen: &Seen) -> Response<Body> {
    let mut trailers = hyper::HeaderMap::new();
    trailers.insert("x-sum", "42".parse().unwrap());
    let frames = [
        Ok::<_, Infallible>(Frame::data(Bytes::from(format!("{:?}", seen.trailers)))),
        Ok(Frame::trailers(trailers)),
    ];
    let body = http_body_util::StreamBody::new(futures_util::stream::iter(frames));
    let mut answer = Response::new(BodyExt::boxed_unsync(body));
    answer
        .headers_mut()
        .insert("trailer", "x-sum".parse().unwrap());
    answer
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let lab = Lab::new().await;
    let (_a, a) = web_with(&lab, "alice", &["a.ex"], trailing);
    let request = "POST / HTTP/1.1\r\nHost: a.ex\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\n\
                   Connection: close, TE\r\nTrailer: x-own\r\n\r\n1\r\nA\r\n0\r\nx-own: 7\r\n\r\n";
    let mut io = lab.tcp().await;
    io.write_all(request.as_bytes()).await.unwrap();
    let all = String::from_utf8_lossy(&read_to_end(&mut io).await).into_owned();
    assert_eq!(a.last().trailers, [("x-own".to_owned(), "7".to_owned())]);
    assert!(all.ends_with("0\r\nx-sum: 42\r\n\r\n"), "{all}");
}

fn odd(_: &str, seen: &Seen) -> Response<Body> {
    let mut answer = whole("some text");
    let status = match seen.line.rsplit('/').next() {
        Some("none") => StatusCode::NO_CONTENT,
        Some("same") => StatusCode::NOT_MODIFIED,
        _ => StatusCode::OK,
    };
    if status != StatusCode::OK {
        answer = Response::new(Full::default().boxed_unsync());
    }
    *answer.status_mut() = status;
    answer
        .headers_mut()
        .insert("connection", "x-hop".parse().unwrap());
    answer.headers_mut().insert("x-hop", "1".parse().unwrap());
    answer
}

#[tokio::test]
async fn answers_without_a_body_and_older_visitors_are_served_as_they_should_be() {
    let lab = Lab::new().await;
    let (_a, a) = web_with(&lab, "alice", &["a.ex"], odd);
    let mut io = lab.tcp().await;
    let request =
        |method: &str, path: &str| format!("{method} {path} HTTP/1.1\r\nHost: a.ex\r\n\r\n");
    let mut head = String::new();
    io.write_all(request("HEAD", "/").as_bytes()).await.unwrap();
    while !head.ends_with("\r\n\r\n") {
        head.push(char::from(io.read_u8().await.unwrap()));
    }
    assert!(
        head.contains("content-length: 9") && !head.contains("x-hop"),
        "{head}"
    );
    for (path, status) in [("/none", 204), ("/same", 304), ("/", 200)] {
        // Were there a body, the next answer would begin with it.
        let reply = ask(&mut io, &request("GET", path)).await;
        assert_eq!(reply.status, status);
    }
    // HTTP/1.0 ends with its connection, even if its visitor half-closes at once.
    let mut io = lab.tcp().await;
    io.write_all(b"GET / HTTP/1.0\r\nHost: a.ex\r\n\r\n")
        .await
        .unwrap();
    io.shutdown().await.unwrap();
    let all = String::from_utf8_lossy(&read_to_end(&mut io).await).into_owned();
    assert!(
        all.starts_with("HTTP/1.0 200") && all.ends_with("some text"),
        "{all}"
    );
    assert_eq!(a.last().all("host"), ["a.ex"]);
}

#[tokio::test]
async fn who_waits_for_a_100_gets_it_and_other_expectations_are_refused() {
    let lab = Lab::new().await;
    let (_a, a) = web(&lab, "alice", &["a.ex"]);
    let head = "POST / HTTP/1.1\r\nHost: a.ex\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n";
    let mut io = lab.tcp().await;
    let reply = ask(&mut io, head).await;
    assert_eq!(reply.status, 100);
    let reply = ask(&mut io, "body").await;
    assert_eq!((reply.status, &*reply.text()), (200, "alice POST / 4\n"));
    let strange = get("a.ex", "/", "Expect: miracles\r\n");
    assert_eq!(plain(&lab, &strange).await.status, 417);
    assert_eq!(a.count(), 1);
}
