//! WebSocket frames that no client of ours would send, after a valid login.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use rvpn_lab::helper::field;
use rvpn_lab::scene::{Scene, round_trip};
use rvpn_lab::topology::GW4;
use rvpn_lab::tunnel_client::{DIALECTS, Speech, on};
use rvpn_lab::{PATIENCE, wait_until};
use rvpn_proto::control::{Hello, Message as Control, PATH, SUBPROTOCOL, Stage};
use rvpn_proto::record::{Offload, append};

const PORT: u16 = 8080;
const PLAIN: &str = "[[listener]]\naddress = \"[::]:443\"\n[[listener]]\naddress = \"0.0.0.0:8080\"\nmode = \"plain\"\n";
/// Largest message after a login.
const LIMIT: usize = 192 * 1024;

const FIN: u8 = 0x80;
const CONTINUED: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;

fn scene() -> Scene {
    Scene::new("", &format!("{PLAIN}{DIALECTS}"))
}

/// A frame as a client sends it: masked, with a mask that changes nothing.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = announced(first, payload.len() as u64);
    bytes.extend_from_slice(payload);
    bytes
}

/// Its header, which may promise anything.
fn announced(first: u8, len: u64) -> Vec<u8> {
    let mut bytes = vec![first];
    match len {
        0..126 => bytes.push(0x80 | len as u8),
        126..=0xffff => {
            bytes.push(0x80 | 126);
            bytes.extend((len as u16).to_be_bytes());
        }
        _ => {
            bytes.push(0x80 | 127);
            bytes.extend(len.to_be_bytes());
        }
    }
    bytes.extend([0; 4]);
    bytes
}

/// A connection that is logged in, and below every library.
struct Raw(TcpStream);

impl Raw {
    fn login(scene: &Scene, account: &str) -> Raw {
        let token = scene.gateway.token(account);
        let tcp = scene
            .phone
            .run(|| TcpStream::connect((GW4, PORT)).expect("connection"));
        tcp.set_read_timeout(Some(PATIENCE)).expect("timeout");
        tcp.set_write_timeout(Some(PATIENCE)).expect("timeout");
        let mut raw = Raw(tcp);
        let request = format!(
            "GET {PATH} HTTP/1.1\r\nHost: vpn.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\
             Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\nAuthorization: Bearer {token}\r\n\r\n"
        );
        raw.send(request.as_bytes()).expect("request");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            raw.0.read_exact(&mut byte).expect("answer");
            head.push(byte[0]);
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{head:?}");
        let hello = Control::Hello(Hello {
            versions: vec![1],
            name: "frames".to_owned(),
            instance: account.to_owned(),
            capabilities: Vec::new(),
            mtu: None,
            keepalive_s: None,
            ticket: None,
        });
        let hello = hello.to_text(Stage::BeforeLogin).expect("hello");
        raw.send(&frame(FIN | TEXT, hello.as_bytes()))
            .expect("hello");
        let (first, welcome) = raw.frame().expect("welcome");
        assert_eq!(first, FIN | TEXT);
        assert!(String::from_utf8_lossy(&welcome).contains("welcome"));
        raw
    }

    fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.write_all(bytes)
    }

    /// The next frame of the gateway.
    fn frame(&mut self) -> std::io::Result<(u8, Vec<u8>)> {
        let mut head = [0; 2];
        self.0.read_exact(&mut head)?;
        let mut long = [0; 8];
        let len = match head[1] {
            126 => {
                self.0.read_exact(&mut long[6..])?;
                u64::from_be_bytes(long)
            }
            127 => {
                self.0.read_exact(&mut long)?;
                u64::from_be_bytes(long)
            }
            len => len.into(),
        };
        let mut payload = vec![0; len as usize];
        self.0.read_exact(&mut payload)?;
        Ok((head[0], payload))
    }

    /// The code of its close frame, whatever comes before it; none, if the
    /// connection ends without one.
    fn code(&mut self) -> Option<u16> {
        loop {
            match self.frame() {
                Ok((first, payload)) if first & 15 == CLOSE => {
                    return Some(u16::from_be_bytes([payload[0], payload[1]]));
                }
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    }
}

/// What the gateway's process holds, in KiB.
fn resident(scene: &Scene) -> u64 {
    let status = format!("/proc/{}/status", scene.gateway.pid());
    let size = field(&status, "VmRSS");
    let size = size.trim_end_matches(" kB").parse();
    size.expect("a size")
}

fn descriptors(scene: &Scene) -> usize {
    let dir = format!("/proc/{}/fd", scene.gateway.pid());
    std::fs::read_dir(dir).expect("descriptors").count()
}

/// CPU time of the gateway's process.
fn cpu(scene: &Scene) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", scene.gateway.pid()));
    let stat = stat.expect("stat");
    let (_, rest) = stat.rsplit_once(')').expect("stat");
    let ticks = |n: usize| {
        rest.split_whitespace()
            .nth(n)
            .and_then(|t| t.parse::<u64>().ok())
    };
    let all = ticks(11).expect("user") + ticks(12).expect("system");
    Duration::from_millis(all * 10)
}

#[test]
fn pro_14_frames_against_the_protocol_end_the_connection() {
    let scene = scene();
    let mut unmasked = frame(FIN | BINARY, b"abc");
    unmasked[1] &= 0x7f;
    unmasked.drain(2..6);
    let fragment = frame(PING, b"a");
    let long = frame(FIN | PING, &[0; 126]);
    let stray = frame(FIN | CONTINUED, b"a");
    let mixed = [frame(BINARY, b"a"), frame(FIN | BINARY, b"b")].concat();
    let mut cases = vec![
        ("not masked", unmasked),
        ("a fragmented ping", fragment),
        ("a ping of 126 bytes", long),
        ("a continuation of nothing", stray),
        ("a message inside another", mixed),
        ("text that is none", frame(FIN | TEXT, b"\xff\xfe")),
        ("a close code of one byte", frame(FIN | CLOSE, b"\x03")),
    ];
    for opcode in [3, 4, 5, 6, 7, 0xb, 0xc, 0xd, 0xe, 0xf] {
        cases.push(("a reserved opcode", frame(FIN | opcode, b"")));
    }
    for bit in [0x40, 0x20, 0x10] {
        cases.push(("a reserved bit", frame(FIN | bit | BINARY, b"abc")));
    }
    for (what, bytes) in cases {
        let mut raw = Raw::login(&scene, "mallory");
        raw.send(&bytes).expect("sent");
        assert_eq!(raw.code(), Some(1002), "{what}: {bytes:02x?}");
    }
    scene.deserted();
}

#[test]
fn pro_15_a_frame_that_announces_too_much_is_refused_at_once_and_costs_nothing() {
    let scene = scene();
    // One of each first: what a process takes once is not what is counted.
    drop(Raw::login(&scene, "warm"));
    scene.deserted();
    let mut open = Vec::new();
    for n in 0..8 {
        open.push(Raw::login(&scene, &format!("mallory{n}")));
    }
    let before = resident(&scene);
    for (raw, len) in open.iter_mut().zip(
        [LIMIT as u64 + 1, 1 << 24, 1 << 40, u64::MAX / 2]
            .iter()
            .cycle(),
    ) {
        let begun = Instant::now();
        raw.send(&announced(FIN | BINARY, *len)).expect("sent");
        assert_eq!(raw.code(), Some(1009), "{len}");
        assert!(
            begun.elapsed() < Duration::from_millis(100),
            "{:?}",
            begun.elapsed()
        );
    }
    let more = resident(&scene).saturating_sub(before);
    assert!(more <= 64 * open.len() as u64, "{more} KiB more");
}

#[test]
fn pro_16_a_message_without_an_end_is_cut_at_the_limit() {
    let scene = scene();
    let mut raw = Raw::login(&scene, "warm");
    raw.send(&frame(BINARY, &vec![0; LIMIT])).expect("sent");
    raw.send(&frame(CONTINUED, &[0; 1024])).expect("sent");
    assert_eq!(raw.code(), Some(1009));
    let before = resident(&scene);
    for n in 0..8 {
        let mut raw = Raw::login(&scene, &format!("mallory{n}"));
        let mut sent = 0;
        raw.send(&frame(BINARY, &[0; 1000])).expect("sent");
        // The farewell comes while we are sending, and then nobody listens.
        while sent < 4 * LIMIT && raw.send(&frame(CONTINUED, &[0; 1000])).is_ok() {
            sent += 1000;
        }
        raw.0.shutdown(Shutdown::Write).ok();
        assert!(matches!(raw.code(), Some(1009) | None));
    }
    scene.deserted();
    let more = resident(&scene).saturating_sub(before);
    assert!(more <= 1024, "{more} KiB more");
}

#[test]
fn pro_18_pings_whose_answers_nobody_reads_do_not_pile_up() {
    let scene = scene();
    let mut raw = Raw::login(&scene, "mallory");
    setsockopt(&raw.0, sockopt::RcvBuf, &4096).expect("option");
    let ping = frame(FIN | PING, &[7; 125]).repeat(64);
    let before = resident(&scene);
    let begun = Instant::now();
    raw.0
        .set_write_timeout(Some(Duration::from_millis(200)))
        .expect("timeout");
    let mut most = 0;
    while begun.elapsed() < Duration::from_secs(3) {
        match raw.send(&ping) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            // Sent away, which is as good.
            Err(_) => break,
        }
        most = most.max(resident(&scene).saturating_sub(before));
    }
    assert!(most <= 1024, "{most} KiB more");
    drop(raw);
    scene.deserted();
}

/// Sends the same again and again for a second, or until it is sent away, and
/// whether it was.
fn flood(scene: &Scene, small: &[u8]) -> bool {
    let mut raw = Raw::login(scene, "mallory");
    let begun = Instant::now();
    // It is listened to for a while after the farewell, so that this one arrives.
    while begun.elapsed() < Duration::from_secs(1) && raw.send(small).is_ok() {}
    raw.0.shutdown(Shutdown::Write).ok();
    raw.code() == Some(1008)
}

#[test]
fn pro_19_a_flood_of_small_frames_ends_its_sender_and_disturbs_nobody() {
    let scene = scene();
    let [server, _] = scene.servers();
    // A message that is in order, of a packet that goes nowhere.
    let mut message = Vec::new();
    append(&mut message, &[0; 400], Offload::NONE).expect("a record");
    let [first, middle @ .., last] = &message[..] else {
        panic!("a message has a beginning and an end");
    };
    let middle = middle.iter().flat_map(|byte| frame(CONTINUED, &[*byte]));
    let pieces: Vec<u8> = frame(BINARY, &[*first])
        .into_iter()
        .chain(middle)
        .chain(frame(FIN | CONTINUED, &[*last]))
        .collect();
    let kinds = [
        (
            "texts",
            frame(FIN | TEXT, br#"{"kind":"stats"}"#).repeat(500),
            true,
        ),
        (
            "empty messages",
            frame(FIN | BINARY, b"").repeat(2000),
            true,
        ),
        ("fragments of a byte", pieces.repeat(20), false),
    ];
    for (what, small, against_policy) in kinds {
        let (before, begun) = (cpu(&scene), Instant::now());
        let (slowest, ended) = std::thread::scope(|threads| {
            let sender = threads.spawn(|| flood(&scene, &small));
            let slowest = on(&scene.phone, async || {
                let speech = Speech::Native { offload: true };
                let mut other = scene.session(speech, "bystander").await;
                let mut slowest = Duration::ZERO;
                for n in 0..50 {
                    let sent = Instant::now();
                    round_trip(&mut other, &server, 4000 + n).await;
                    slowest = slowest.max(sent.elapsed());
                }
                slowest
            });
            (slowest, sender.join().expect("the flood"))
        });
        let (spent, elapsed) = (cpu(&scene) - before, begun.elapsed());
        // A core for the flood, and a little for everybody else.
        assert!(
            spent <= elapsed.mul_f64(1.25),
            "{what}: {spent:?} of CPU in {elapsed:?}"
        );
        assert!(slowest < Duration::from_millis(500), "{what}: {slowest:?}");
        assert_eq!(ended, against_policy, "{what}");
        scene.deserted();
    }
}

#[test]
fn pro_20_whoever_does_not_end_properly_leaves_nothing_behind() {
    let scene = scene();
    drop(Raw::login(&scene, "warm"));
    scene.deserted();
    let before = descriptors(&scene);
    let mut left = Vec::new();
    for n in 0..5 {
        let mut raw = Raw::login(&scene, &format!("mallory{n}"));
        match n {
            // Never answers the farewell that its frame is worth.
            0 => raw.send(&frame(FIN | 3, b"")).expect("sent"),
            // Says more behind its own.
            1 => raw
                .send(
                    &[
                        frame(FIN | CLOSE, b"\x03\xe8"),
                        frame(FIN | BINARY, &[0; 4000]),
                    ]
                    .concat(),
                )
                .expect("sent"),
            2 => raw.0.shutdown(Shutdown::Write).expect("shutdown"),
            // A reset, in the middle of a frame.
            3 => {
                raw.send(&announced(FIN | BINARY, 4000)).expect("sent");
                setsockopt(
                    &raw.0,
                    sockopt::Linger,
                    &libc::linger {
                        l_onoff: 1,
                        l_linger: 0,
                    },
                )
                .expect("option");
                continue;
            }
            _ => raw.send(&frame(FIN | CLOSE, b"")).expect("sent"),
        }
        left.push(raw);
    }
    let begun = Instant::now();
    scene.deserted();
    wait_until("every descriptor is closed", || {
        descriptors(&scene) <= before
    });
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    drop(left);
}
