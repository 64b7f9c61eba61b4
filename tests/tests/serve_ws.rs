//! WebSockets of others through the reverse tunnel: what a server of theirs
//! says to frames of every kind is the same with the gateway in between.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use rvpn_lab::gateway::Gateway;
use rvpn_lab::machine::Machine;
use rvpn_lab::serving::{connect, listen};
use rvpn_lab::topology::{GW4, at};
use rvpn_lab::{Helper, Lab, Ns};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::accept_async;
use tokio_tungstenite::tungstenite::Message;

const NAME: &str = "socket.example";
const PATIENCE: Duration = Duration::from_secs(10);

const FIN: u8 = 0x80;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// What the server has to make of a script.
#[derive(Clone, Debug)]
enum Expect {
    /// These frames, in this order, and then the farewell that it was given.
    Frames(Vec<(u8, Vec<u8>)>),
    /// An end, and nothing of what was wrong.
    Failure,
}

struct Case {
    what: String,
    script: Vec<u8>,
    expect: Expect,
}

/// A masked frame.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];
    let mut bytes = vec![first];
    match payload.len() {
        len @ 0..126 => bytes.push(0x80 | len as u8),
        len @ 126..=0xffff => {
            bytes.push(0x80 | 126);
            bytes.extend((len as u16).to_be_bytes());
        }
        len => {
            bytes.push(0x80 | 127);
            bytes.extend((len as u64).to_be_bytes());
        }
    }
    bytes.extend(MASK);
    bytes.extend(payload.iter().zip(MASK.iter().cycle()).map(|(b, m)| b ^ m));
    bytes
}

fn good(what: impl Into<String>, frames: &[Vec<u8>], answers: &[(u8, &[u8])]) -> Case {
    let mut script = frames.concat();
    script.extend(frame(FIN | CLOSE, &[3, 0xe8]));
    let answers = answers
        .iter()
        .map(|(first, payload)| (FIN | first, payload.to_vec()));
    let end = [(FIN | CLOSE, vec![3, 0xe8])];
    Case {
        what: what.into(),
        script,
        expect: Expect::Frames(answers.chain(end).collect()),
    }
}

fn bad(what: impl Into<String>, frames: &[Vec<u8>]) -> Case {
    Case {
        what: what.into(),
        script: frames.concat(),
        expect: Expect::Failure,
    }
}

/// The classes of a well-known suite: framing, pings, reserved bits and codes,
/// fragments, UTF-8, closing, and messages in many pieces.
fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for len in [0, 1, 125, 126, 127, 128, 65_535, 65_536] {
        for opcode in [TEXT, BINARY] {
            let payload = vec![b'*'; len];
            let sent = [frame(FIN | opcode, &payload)];
            all.push(good(format!("{len} bytes"), &sent, &[(opcode, &payload)]));
        }
    }
    for len in [0, 5, 125] {
        let payload = vec![0xfe; len];
        let sent = [frame(FIN | PING, &payload)];
        all.push(good("a ping", &sent, &[(PONG, &payload)]));
    }
    all.push(bad("a long ping", &[frame(FIN | PING, &[0xfe; 126])]));
    all.push(good(
        "a pong nobody asked for",
        &[frame(FIN | PONG, b"x")],
        &[],
    ));
    for bits in [0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70] {
        all.push(bad("a reserved bit", &[frame(FIN | bits | TEXT, b"small")]));
    }
    for opcode in [3, 4, 5, 6, 7, 11, 12, 13, 14, 15] {
        all.push(bad("a reserved opcode", &[frame(FIN | opcode, b"")]));
    }
    let halves = [frame(TEXT, b"frag"), frame(FIN, b"ment")];
    all.push(good("fragments", &halves, &[(TEXT, b"fragment")]));
    let between = [
        frame(TEXT, b"frag"),
        frame(FIN | PING, b"p"),
        frame(FIN, b"ment"),
    ];
    all.push(good(
        "a ping between",
        &between,
        &[(PONG, b"p"), (TEXT, b"fragment")],
    ));
    all.push(bad("half a ping", &[frame(PING, b"a"), frame(FIN, b"b")]));
    all.push(bad("half a pong", &[frame(PONG, b"a"), frame(FIN, b"b")]));
    all.push(bad("the end of nothing", &[frame(FIN, b"a")]));
    all.push(bad(
        "the middle of nothing",
        &[frame(0, b"a"), frame(FIN | TEXT, b"b")],
    ));
    all.push(bad(
        "one in another",
        &[frame(TEXT, b"a"), frame(FIN | TEXT, b"b")],
    ));
    let word = "κόσμε 𝄞".as_bytes();
    all.push(good("UTF-8", &[frame(FIN | TEXT, word)], &[(TEXT, word)]));
    for cut in 1..word.len() {
        let parts = [frame(TEXT, &word[..cut]), frame(FIN, &word[cut..])];
        all.push(good("a character in two frames", &parts, &[(TEXT, word)]));
    }
    let wrong: [&[u8]; 8] = [
        b"\x80",
        b"\xff",
        b"\xc0\xaf",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xce\xba\xe1\xbd",
        b"\xf8\x88\x80\x80\x80",
        b"ok \xed\xbf\xbf ok",
    ];
    for text in wrong {
        all.push(bad(
            format!("{text:02x?} as text"),
            &[frame(FIN | TEXT, text)],
        ));
    }
    for code in [
        1000_u16, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999,
    ] {
        let farewell = code.to_be_bytes().to_vec();
        all.push(Case {
            what: format!("code {code}"),
            script: frame(FIN | CLOSE, &farewell),
            expect: Expect::Frames(vec![(FIN | CLOSE, farewell)]),
        });
    }
    for code in [0_u16, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999] {
        let farewell = frame(FIN | CLOSE, &code.to_be_bytes());
        all.push(bad(
            format!("code {code}"),
            &[farewell, frame(FIN | TEXT, b"after")],
        ));
    }
    all.push(bad("half a code", &[frame(FIN | CLOSE, b"\x03")]));
    all.push(bad(
        "a reason that is no text",
        &[frame(FIN | CLOSE, b"\x03\xe8\xff")],
    ));
    all.push(bad("a long reason", &[frame(FIN | CLOSE, &[0x03; 126])]));
    let late = [frame(FIN | CLOSE, b"\x03\xe8"), frame(FIN | TEXT, b"after")];
    all.push(Case {
        what: "data after the end".to_owned(),
        script: late.concat(),
        expect: Expect::Frames(vec![(FIN | CLOSE, b"\x03\xe8".to_vec())]),
    });
    let long = vec![b'*'; 65_536];
    let mut pieces: Vec<_> = long.chunks(1300).map(|piece| frame(0, piece)).collect();
    pieces[0][0] = TEXT;
    pieces.push(frame(FIN, b""));
    all.push(good("many pieces", &pieces, &[(TEXT, &long)]));
    all
}

/// Sends a message back as it came.
async fn echo(tcp: TcpStream) {
    let Ok(mut socket) = accept_async(tcp).await else {
        return;
    };
    while let Some(Ok(message)) = socket.next().await {
        let back = matches!(message, Message::Text(_) | Message::Binary(_));
        if back && socket.send(message).await.is_err() {
            return;
        }
    }
}

/// Plays a script and returns the frames that come back until the end.
async fn play(from: &Ns, to: SocketAddr, script: &[u8], pieces: usize) -> Vec<(u8, Vec<u8>)> {
    let mut tcp = connect(from, to);
    let request = format!(
        "GET /chat HTTP/1.1\r\nHost: {NAME}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    );
    tcp.write_all(request.as_bytes()).await.expect("request");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(tcp.read_u8().await.expect("an answer"));
    }
    let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101 "), "{head}");
    assert!(head.contains("sec-websocket-accept: "), "{head}");
    let mut back = Vec::new();
    let mut all = Vec::new();
    let (mut reader, mut writer) = tcp.split();
    let sending = async {
        for piece in script.chunks(pieces) {
            // Whoever has ended already does not read the rest.
            if writer.write_all(piece).await.is_err() {
                return;
            }
        }
    };
    let receiving = async {
        // A reset is an end, too: the server closed with something unread.
        let _end = reader.read_to_end(&mut back).await;
    };
    let both = async { tokio::join!(sending, receiving) };
    timeout(PATIENCE, both).await.expect("an end");
    let mut rest = &back[..];
    while let [first, len, ..] = *rest {
        let (head, len) = match len {
            126 => (4, usize::from(u16::from_be_bytes([rest[2], rest[3]]))),
            127 => (
                10,
                u64::from_be_bytes(rest[2..10].try_into().expect("8")) as usize,
            ),
            len => (2, usize::from(len)),
        };
        all.push((first, rest[head..head + len].to_vec()));
        rest = &rest[head + len..];
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pro_13_a_websocket_through_the_tunnel_is_the_same_as_without() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "");
    let phone = Machine::new(&lab, "phone", 10);
    let server = listen(&phone.ns, "0.0.0.0:3000");
    tokio::spawn(async move {
        while let Ok((tcp, _)) = server.accept().await {
            tokio::spawn(echo(tcp));
        }
    });
    let login = phone.login(&gateway, "alice", &[NAME], &[]);
    let _serve = phone.serving(&login, &["http://127.0.0.1:3000"]);
    let direct: SocketAddr = "1.1.1.10:3000".parse().expect("address");
    let through: SocketAddr = at(GW4, 443).parse().expect("address");
    for case in cases() {
        for pieces in [usize::MAX, 997] {
            let [alone, tunnelled] = [
                play(&lab.up, direct, &case.script, pieces).await,
                play(&lab.up, through, &case.script, pieces).await,
            ];
            match &case.expect {
                Expect::Frames(frames) => {
                    assert_eq!(alone, *frames, "{} without the tunnel", case.what);
                    assert_eq!(tunnelled, *frames, "{}", case.what);
                }
                Expect::Failure => {
                    for answers in [&alone, &tunnelled] {
                        let ends = |(first, _): &(u8, Vec<u8>)| *first == FIN | CLOSE;
                        assert!(answers.iter().all(ends), "{}: {answers:?}", case.what);
                    }
                }
            }
        }
    }
}
