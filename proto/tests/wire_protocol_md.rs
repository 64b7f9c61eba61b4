//! PROTOCOL.md against the code: every example in it is decoded, encoded again
//! and compared, and none may be missing or unknown.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use rvpn_proto::control::{
    BEARER_SUBPROTOCOL, KEEPALIVE, KEEPALIVE_MAX, MAX_DEPTH, Message, PATH, Policy, SUBPROTOCOL,
    Stage, close,
};
use rvpn_proto::dialect::{
    Body, DEFAULT_PATH, DecodeError, Decoded, Dialect, Hello, Incoming, Lease, POOL_FULL_REASON,
    Padding,
};
use rvpn_proto::packer::{self, Decoder, Frame, Piece, Profile, Word};
use rvpn_proto::record::{
    Fault, HEADER_LEN, MAX_PACKET, MAX_RECEIVED, MAX_SENT, MESSAGE_LIMIT, Offload, ReadError,
    Reader, Record, append, gso_type, header,
};

const DOCUMENT: &str = include_str!("../../PROTOCOL.md");

/// The fenced examples, by kind and name.
struct Examples(BTreeMap<(String, String), String>);

impl Examples {
    fn read() -> Self {
        let mut examples = BTreeMap::new();
        let mut lines = DOCUMENT.lines();
        while let Some(line) = lines.next() {
            let Some(fence) = line.strip_prefix("```") else {
                continue;
            };
            let (kind, name) = fence.split_once(' ').unwrap_or((fence, ""));
            let body: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            let key = (kind.to_owned(), name.to_owned());
            let former = examples.insert(key, body.join("\n"));
            assert!(former.is_none(), "{fence} is there twice");
        }
        Self(examples)
    }

    fn take(&mut self, kind: &str, name: &str) -> String {
        let key = (kind.to_owned(), name.to_owned());
        let found = self.0.remove(&key);
        found.unwrap_or_else(|| panic!("PROTOCOL.md has no example `{kind} {name}`"))
    }

    fn hex(&mut self, name: &str) -> Vec<u8> {
        bytes(name, &self.take("hex", name))
    }

    /// All that begin so, with the rest of their names.
    fn all(&mut self, kind: &str, prefix: &str) -> Vec<(String, String)> {
        let matching = |(k, name): &(String, String)| k == kind && name.starts_with(prefix);
        let keys: Vec<_> = self.0.keys().filter(|key| matching(key)).cloned().collect();
        keys.into_iter()
            .map(|key| {
                let body = self.take(kind, &key.1);
                (key.1[prefix.len()..].to_owned(), body)
            })
            .collect()
    }
}

fn bytes(name: &str, hex: &str) -> Vec<u8> {
    hex.split_whitespace()
        .map(|pair| {
            assert_eq!(pair.len(), 2, "{name}: {pair}");
            u8::from_str_radix(pair, 16).unwrap_or_else(|e| panic!("{name}: {pair}: {e}"))
        })
        .collect()
}

fn internet_sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| match pair {
        [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
        [high] => u32::from(*high) << 8,
        _ => 0,
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).expect("folded")
}

fn records(message: &[u8]) -> Vec<Record<'_>> {
    let read: Result<Vec<_>, _> = Reader::new(message).collect();
    let read = read.unwrap_or_else(|e| panic!("{e}"));
    let mut again = Vec::new();
    for record in &read {
        append(&mut again, record.packet, record.offload).expect("it was read");
    }
    assert_eq!(again, message);
    read
}

fn lease() -> Lease {
    let v6: Ipv6Addr = "fd3a:91c2:77e0:7::".parse().expect("an address");
    Lease::new(Ipv4Addr::new(10, 64, 7, 0), v6).expect("both end in zero")
}

/// Draws the least of each range with 0.0, the most with 1.0.
fn entropy(fraction: f64) -> impl FnMut() -> u64 {
    move || (fraction * u64::MAX as f64) as u64
}

fn greeting(dialect: Dialect, padding: Padding, fraction: f64) -> Hello {
    let hello = dialect.hello(&lease(), &padding, &mut entropy(fraction));
    hello.expect("this dialect has a greeting")
}

#[test]
fn every_example_is_known() {
    let mut examples = Examples::read();
    check_upgrades(&mut examples);
    check_limits(&mut examples);
    check_records(&mut examples);
    check_faults(&mut examples);
    check_control(&mut examples);
    check_greetings(&mut examples);
    check_dialect_packets(&mut examples);
    check_packer(&mut examples);
    check_streams(&mut examples);
    let left: Vec<_> = examples.0.keys().collect();
    assert!(left.is_empty(), "nothing checks {left:?}");
}

fn check_streams(examples: &mut Examples) {
    use rvpn_proto::streams::mux::{INITIAL_WINDOW, Limits};
    use rvpn_proto::streams::{self as streams, Message as Said};
    let stated = examples.take("limits", "streams");
    let expected = [
        ("largest-message", streams::MAX_RECEIVED),
        ("streams-of-a-connection", streams::STREAMS),
        ("offers-of-a-connection", streams::OFFERS),
        ("longest-opening", streams::OPENING_MAX),
        ("first-window", INITIAL_WINDOW as usize),
        ("largest-window", Limits::default().window as usize),
    ];
    let expected: Vec<String> = expected.iter().map(|(k, v)| format!("{k} = {v}")).collect();
    assert_eq!(stated, expected.join("\n"));
    assert!(DOCUMENT.contains(&format!("subprotocol is `{}`", streams::SUBPROTOCOL)));

    let mut kinds = BTreeMap::new();
    for (name, json) in examples.all("streams", "") {
        let message = Said::parse(&json, Stage::Session).unwrap_or_else(|e| panic!("{name}: {e}"));
        let again = message.to_text(Stage::Session).expect("it was read");
        let value = |text: &str| -> serde_json::Value {
            serde_json::from_str(text).unwrap_or_else(|e| panic!("{name}: {e}"))
        };
        assert_eq!(value(&again), value(&json), "{name}: nothing is ignored");
        // Exhaustive, so that a new kind is not forgotten in the document.
        let kind = match message {
            Said::Hello(_) => "hello",
            Said::Welcome(_) => "welcome",
            Said::Serve(_) => "serve",
            Said::Serving(_) => "serving",
            Said::Refused(_) => "refused",
            Said::Withdraw(_) => "withdraw",
            Said::Counts(_) => "counts",
            Said::Goodbye(_) => "goodbye",
            Said::Error(_) => "error",
        };
        assert!(name.starts_with(kind), "{name} is of kind {kind}");
        kinds.insert(kind, ());
    }
    assert_eq!(kinds.len(), 9, "{kinds:?}");
    check_stream(examples);
}

fn check_stream(examples: &mut Examples) {
    use rvpn_proto::streams::mux::{Limits, Mux, Side};
    use rvpn_proto::streams::{Opening, Status};
    use std::task::{Context, Poll, Waker};
    let visit = examples.take("streams-opening", "visit");
    let visit = Opening::read(visit.as_bytes()).expect("a visit");
    let again = visit.to_bytes().expect("it was read");
    assert_eq!(Opening::read(&again[2..]), Ok(visit));

    let (open, accepted) = (examples.hex("stream-open"), examples.hex("stream-accepted"));
    let mut cx = Context::from_waker(Waker::noop());
    let gateway = Mux::new(Side::Gateway, Limits::default());
    let client = Limits {
        accepted: 1,
        ..Limits::default()
    };
    let client = Mux::new(Side::Client, client);
    let mut visitor = gateway.open().expect("a stream");
    // All behind yamux's header is what was written.
    let written = visitor.poll_write(&mut cx, &open[12..]);
    assert_eq!(written, Poll::Ready(Ok(open.len() - 12)));
    let mut sent = Vec::new();
    assert!(gateway.poll_send(&mut cx, &mut sent, 65_536).is_ready());
    assert_eq!(sent, open);
    client.receive(&open).expect("no fault");
    let Poll::Ready(Some(mut stream)) = client.poll_accept(&mut cx) else {
        panic!("no stream");
    };
    let mut got = vec![0; 1000];
    let Poll::Ready(Ok(n)) = stream.poll_read(&mut cx, &mut got) else {
        panic!("nothing on it");
    };
    let length = Opening::length([got[0], got[1]]).expect("a length");
    let Opening::Visit(visit) = Opening::read(&got[2..2 + length]).expect("a visit");
    assert_eq!((visit.offer, &got[2 + length..n]), (1, &b"GET"[..]));
    let answer = stream.poll_write(&mut cx, &[Status::Accepted as u8]);
    assert_eq!(answer, Poll::Ready(Ok(1)));
    let mut sent = Vec::new();
    assert!(client.poll_send(&mut cx, &mut sent, 65_536).is_ready());
    assert_eq!(sent, accepted);
}

fn check_upgrades(examples: &mut Examples) {
    let program = examples.take("text", "upgrade-program");
    let browser = examples.take("text", "upgrade-browser");
    for request in [&program, &browser] {
        assert!(request.starts_with(&format!("GET {PATH} HTTP/1.1\n")));
    }
    assert!(program.contains(&format!("\nSec-WebSocket-Protocol: {SUBPROTOCOL}\n")));
    assert!(program.contains("\nAuthorization: Bearer "));
    let offered = format!("\nSec-WebSocket-Protocol: {SUBPROTOCOL}, {BEARER_SUBPROTOCOL}");
    assert!(browser.contains(&offered));
    assert!(!browser.contains("Authorization"));
}

fn check_limits(examples: &mut Examples) {
    let stated = examples.take("limits", "");
    let expected = [
        ("record-header", HEADER_LEN),
        ("largest-packet", MAX_PACKET),
        ("sent-message-of-several-records", MESSAGE_LIMIT),
        ("largest-sent-message", MAX_SENT),
        ("largest-accepted-message", MAX_RECEIVED),
        ("control-before-login", Stage::BeforeLogin.limit()),
        ("control-in-session", Stage::Session.limit()),
        ("control-depth", MAX_DEPTH),
        ("keepalive-seconds", KEEPALIVE.as_secs() as usize),
        ("keepalive-seconds-most", KEEPALIVE_MAX.as_secs() as usize),
    ];
    let expected: Vec<String> = expected.iter().map(|(k, v)| format!("{k} = {v}")).collect();
    assert_eq!(stated, expected.join("\n"));
}

fn check_records(examples: &mut Examples) {
    let one = examples.hex("record-packet");
    let read = records(&one);
    assert_eq!(read.len(), 1);
    assert_eq!(read[0].offload, Offload::NONE);
    let icmp = read[0].packet;
    assert_eq!(icmp.len(), 28);
    assert_eq!(internet_sum(&icmp[..20]), 0xffff);
    assert_eq!(internet_sum(&icmp[20..]), 0xffff);

    let two = examples.hex("record-two");
    let read = records(&two);
    assert_eq!(read.len(), 2);
    assert_eq!(read[0].packet, icmp);
    let udp = read[1].packet;
    let partial = Offload {
        partial: true,
        ..Offload::NONE
    };
    assert_eq!((read[1].offload, udp.len()), (partial, 29));
    assert_eq!(internet_sum(&udp[..20]), 0xffff);
    let pseudo = [&udp[12..20], &[0, udp[9]], &udp[24..26]].concat();
    let sum = internet_sum(&pseudo);
    assert_eq!(udp[26..28], sum.to_be_bytes());
    assert!(DOCUMENT.contains(&format!("holds `{sum:04x}`")));

    let tcp = Offload {
        partial: true,
        gso_type: gso_type::TCP_V4,
        gso_size: 1448,
    };
    assert_eq!(
        examples.hex("header-super-tcp"),
        header(MAX_PACKET, tcp).expect("valid")
    );
    let datagrams = Offload {
        partial: true,
        gso_type: gso_type::UDP_L4,
        gso_size: 1200,
    };
    assert_eq!(
        examples.hex("header-super-udp"),
        header(12_028, datagrams).expect("valid")
    );
}

fn check_faults(examples: &mut Examples) {
    let mut seen = Vec::new();
    for (name, hex) in examples.all("hex", "fault-") {
        let (name, offset) = name.rsplit_once("-at-").expect("an offset in the name");
        let message = bytes(name, &hex);
        let error = Reader::new(&message).find_map(Result::err);
        let ReadError { offset: at, fault } = error.unwrap_or_else(|| panic!("{name} is fine"));
        assert_eq!(at.to_string(), offset, "{name}");
        assert_eq!(fault_name(fault), name);
        seen.push(name.to_owned());
    }
    assert_eq!(seen.len(), 11, "{seen:?}");
}

/// Exhaustive, so that a new fault is not forgotten in the document.
fn fault_name(fault: Fault) -> &'static str {
    match fault {
        // A limit of its own, without an example of that size.
        Fault::MessageTooLong { .. } => "message-too-long",
        Fault::NoRecord => "no-record",
        Fault::ShortHeader { .. } => "trailing-bytes",
        Fault::UnknownKind { .. } => "kind",
        Fault::UnknownFlags { .. } => "flags",
        Fault::Reserved { .. } => "reserved",
        Fault::Empty => "length-zero",
        Fault::PastEnd { .. } => "past-end",
        Fault::UnknownGso { .. } => "super-type",
        Fault::NoSegmentSize => "super-without-size",
        Fault::StraySegmentSize { .. } => "size-without-super",
        Fault::FinishedSuperPacket => "super-finished",
    }
}

fn check_control(examples: &mut Examples) {
    let mut kinds = BTreeMap::new();
    for (name, json) in examples.all("json", "") {
        let stage = match name.starts_with("hello") {
            true => Stage::BeforeLogin,
            false => Stage::Session,
        };
        let message = Message::parse(&json, stage).unwrap_or_else(|e| panic!("{name}: {e}"));
        let again = message.to_text(stage).expect("it was read");
        let value = |text: &str| -> serde_json::Value {
            serde_json::from_str(text).unwrap_or_else(|e| panic!("{name}: {e}"))
        };
        assert_eq!(value(&again), value(&json), "{name}: nothing is ignored");
        if let Message::Welcome(welcome) = &message {
            let policy = Policy {
                routes: true,
                default_route: true,
                ..Policy::default()
            };
            assert_eq!(welcome.validate(&policy), Ok(()));
        }
        let kind = kind(&message);
        assert!(name.starts_with(kind), "{name} is of kind {kind}");
        kinds.insert(kind, ());
    }
    assert_eq!(kinds.len(), 9, "{kinds:?}");
}

/// Exhaustive, so that a new kind is not forgotten in the document.
fn kind(message: &Message) -> &'static str {
    match message {
        Message::Hello(_) => "hello",
        Message::Welcome(_) => "welcome",
        Message::Ticket(_) => "ticket",
        Message::Stats(_) => "stats",
        Message::Quota(_) => "quota",
        Message::Resolve(_) => "resolve",
        Message::Resolved(_) => "resolved",
        Message::Goodbye(_) => "goodbye",
        Message::Error(_) => "error",
    }
}

fn check_greetings(examples: &mut Examples) {
    for (name, dialect) in [
        ("greeting-text-v4", Dialect::TextV4),
        ("greeting-text-dual", Dialect::TextDual),
    ] {
        let stated = examples.take("text", name);
        let hello = greeting(dialect, Padding::NONE, 0.0);
        assert_eq!(hello.body, Body::Text(stated));
        assert!(hello.after.is_zero());
    }
    let stated = examples.hex("greeting-padded");
    let one_byte = Padding {
        bytes: (1, 1),
        noise: None,
    };
    let hello = greeting(Dialect::Padded, one_byte, 0.0);
    assert_eq!(hello.body, Body::Binary(stated.clone()));
    assert_eq!(hello.after.as_millis(), 100);
    let latest = greeting(Dialect::Padded, one_byte, 1.0).after;
    assert_eq!(latest.as_millis(), 1000);
    let announced = Dialect::Padded.read_hello(Incoming::Binary(&stated));
    let announced = announced.expect("a greeting").expect("not noise");
    assert_eq!(announced.added(), lease().client());
    assert_eq!(announced.overwritten(), lease().client());
}

fn decode(message: &[u8]) -> Result<Decoded<'_>, DecodeError> {
    Dialect::Padded.decode(Incoming::Binary(message))
}

fn check_dialect_packets(examples: &mut Examples) {
    let encode = |dialect: Dialect, packet: &[u8], padding: u16| {
        let padding = Padding {
            bytes: (padding, padding),
            noise: None,
        };
        let mut message = Vec::new();
        dialect
            .encode(packet, &padding, &mut entropy(0.0), &mut message)
            .expect("it fits");
        message
    };
    let raw = examples.hex("raw-packet");
    for dialect in [Dialect::SnatRaw, Dialect::TextV4, Dialect::TextDual] {
        let decoded = dialect.decode(Incoming::Binary(&raw));
        assert_eq!(decoded, Ok(Decoded::Packet(&raw)));
        assert_eq!(encode(dialect, &raw, 3), raw);
    }
    let padded = examples.hex("padded-packet");
    assert_eq!(decode(&padded), Ok(Decoded::Packet(&raw)));
    assert_eq!(encode(Dialect::Padded, &raw, 3), padded);
    for name in ["padded-noise-empty", "padded-noise"] {
        assert_eq!(decode(&examples.hex(name)), Ok(Decoded::Noise), "{name}");
    }
    let mut fault = |name| {
        let message = examples.hex(name);
        decode(&message).expect_err(name)
    };
    let short = |announced, length| DecodeError::Short { announced, length };
    assert_eq!(fault("padded-fault-short"), short(30, 3));
    assert_eq!(fault("padded-fault-one-byte"), short(2, 1));
    assert_eq!(
        fault("padded-fault-no-length-bit"),
        DecodeError::Prefix { first: 1 }
    );
    assert_eq!(fault("padded-fault-empty"), DecodeError::Empty);
}

fn check_packer(examples: &mut Examples) {
    let frames = [
        ("data-five", Profile::Go2017, Word::Data("http")),
        ("data-seven", Profile::Go2020, Word::Data("https")),
        ("connection", Profile::Node2018, Word::Connection),
        ("control", Profile::Node2017, Word::Control),
        ("end-space", Profile::Node2017, Word::End),
        ("error", Profile::Node2017, Word::Error),
    ];
    for (name, profile, word) in frames {
        let stated = examples.hex(&format!("packer-{name}"));
        let limits = packer::Limits {
            data: 1024,
            word: 1024,
        };
        let mut decoder = Decoder::new(limits);
        let mut rest = &stated[..];
        let piece = decoder
            .next(&mut rest)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let (head, body) = match piece.expect("whole") {
            Piece::Data { head, bytes, .. } => (head, bytes),
            Piece::Word { head, body } => (head, body),
        };
        assert_eq!((head.word, rest), (word, &[][..]), "{name}");
        let again = Frame {
            id: head.id,
            word,
            service_port: head.service_port.parse().unwrap_or(0),
            name: head.name,
            speaks: head.speaks,
            body,
        };
        let mut written = Vec::new();
        again.encode(profile, &mut written).expect("it was read");
        assert_eq!(written, stated, "{name}");
    }
    for profile in Profile::ALL {
        assert!(
            DOCUMENT.contains(&format!("\n| `{profile}` |")),
            "{profile}"
        );
    }
}

#[test]
fn names_and_codes_in_the_text_are_those_of_the_code() {
    for dialect in Dialect::ALL {
        assert!(
            DOCUMENT.contains(&format!("\n| `{dialect}` |")),
            "{dialect}"
        );
    }
    assert!(DOCUMENT.contains(&format!("`padded` at `{DEFAULT_PATH}`")));
    assert!(DOCUMENT.contains(&format!("`{POOL_FULL_REASON}`")));
    for code in [
        close::NORMAL,
        close::GOING_AWAY,
        close::PROTOCOL,
        close::POLICY,
        close::TOO_BIG,
        close::INTERNAL,
        close::RESTART,
        close::POOL_FULL,
    ] {
        assert!(DOCUMENT.contains(&format!("\n| {code} |")), "{code}");
    }
}
