//! Packer v1 against the bytes of the clients that speak it.
//!
//! `packer/node.txt` was written by the clients' own library, see
//! `tests/packer-client/record.js`; `packer/others.txt` is what the other
//! clients send, written out from the format.

use std::collections::BTreeMap;

use proptest::prelude::*;
use rvpn_proto::packer::{
    Asked, Command, Decoder, Failure, Fault, Frame, Gauge, Grant, Heard, Limits, NO_STREAM,
    PAUSE_ABOVE, Piece, Profile, RESUME_BELOW, Token, Turn, Word, code, failed, hello, notice,
    succeeded,
};

const LIMITS: Limits = Limits {
    data: 1 << 20,
    word: 16 * 1024,
};

/// A frame with its body put together again.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Whole {
    id: String,
    word: String,
    length: usize,
    port: String,
    name: String,
    speaks: String,
    body: Vec<u8>,
}

/// Decodes bytes that come in these portions.
fn decode<'a>(portions: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Whole>, Fault> {
    let mut decoder = Decoder::new(LIMITS);
    let mut frames: Vec<Whole> = Vec::new();
    let mut open = false;
    for portion in portions {
        let mut rest = portion;
        while let Some(piece) = decoder.next(&mut rest)? {
            let (head, bytes, last, data) = match piece {
                Piece::Data { head, bytes, last } => (head, bytes, last, true),
                Piece::Word { head, body } => (head, body, true, false),
            };
            assert_eq!(data, matches!(head.word, Word::Data(_)));
            if !open {
                frames.push(Whole {
                    id: head.id.to_owned(),
                    word: head.word.as_str().to_owned(),
                    length: head.length,
                    port: head.service_port.to_owned(),
                    name: head.name.to_owned(),
                    speaks: head.speaks.to_owned(),
                    body: Vec::new(),
                });
            }
            let frame = frames.last_mut().expect("pushed above, or before");
            assert_eq!(frame.id, head.id);
            frame.body.extend_from_slice(bytes);
            open = !last;
        }
        assert!(rest.is_empty());
    }
    assert!(decoder.is_between() || !open || frames.last().is_some());
    Ok(frames)
}

fn one(bytes: &[u8]) -> Whole {
    let frames = decode([bytes]).unwrap_or_else(|e| panic!("{e}"));
    let [frame] = <[Whole; 1]>::try_from(frames).expect("one frame");
    assert_eq!(frame.length, frame.body.len());
    frame
}

fn recorded(text: &str) -> BTreeMap<String, Vec<u8>> {
    let of = |line: &str| {
        let (name, hex) = line.split_once(' ').expect("a name and bytes");
        let pairs = hex.as_bytes().chunks(2);
        let bytes = pairs.map(|p| {
            let pair = std::str::from_utf8(p).expect("ASCII");
            u8::from_str_radix(pair, 16).expect("hexadecimal")
        });
        (name.to_owned(), bytes.collect())
    };
    text.lines().map(of).collect()
}

fn node() -> BTreeMap<String, Vec<u8>> {
    recorded(include_str!("packer/node.txt"))
}

fn others() -> BTreeMap<String, Vec<u8>> {
    recorded(include_str!("packer/others.txt"))
}

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: app.a.example\r\n\r\n";
const VISITORS: [(&str, &str); 3] = [
    ("v4", "IPv4,192.0.2.7,50123"),
    ("mapped", "IPv6,::ffff:127.0.0.1,1024"),
    ("v6", "IPv6,2001:db8::7,65535"),
];

#[test]
fn recorded_frames_are_read() {
    let recorded = node();
    for (key, id) in VISITORS {
        let get = |what: &str| one(&recorded[&format!("{key}-{what}")]);
        let http = get("http");
        assert_eq!((&*http.id, &*http.word), (id, "http"));
        assert_eq!(http.body, REQUEST);
        let https = get("https-named");
        assert_eq!(
            (&*https.word, &*https.port, &*https.name),
            ("https", "443", "app.a.example")
        );
        assert_eq!(get("end-space").body, b" ");
        assert_eq!(get("end-empty").body, b"");
        assert_eq!(get("pause").body, b"1048577");
        assert_eq!(get("resume").word, "resume");
        let error = get("error");
        assert_eq!((&*error.id, &*error.word), (id, "error"));
        let connection = get("connection");
        assert_eq!(
            (&*connection.word, &*connection.speaks),
            ("connection", "https")
        );
    }
    let control = one(&recorded["control-add-token"]);
    assert_eq!((&*control.id, &*control.word), (NO_STREAM, "control"));
    let answer = one(&recorded["control-hello-answer"]);
    assert_eq!(
        Heard::parse(&answer.body),
        Ok(Heard::Reply { id: 1, good: true })
    );
    assert_eq!(recorded.len(), 3 * 9 + 4);
}

#[test]
fn frames_of_the_others_are_read() {
    let recorded = others();
    let go = one(&recorded["go-2020-http"]);
    assert_eq!(go.id, "tun,192.0.2.7,50123");
    // What that client puts behind the name is nobody's.
    assert_eq!((&*go.name, &*go.speaks), ("app.a.example", ""));
    assert_eq!(one(&recorded["go-2020-end"]).word, "end");
    for name in ["node-2017-http", "go-2017-http"] {
        let five = one(&recorded[name]);
        assert_eq!((&*five.word, &*five.name), ("http", ""));
        assert_eq!(five.body, REQUEST);
    }
    let refused = one(&recorded["node-2017-hello-refused"]);
    assert_eq!((&*refused.id, &*refused.word), (NO_STREAM, "error"));
    assert_eq!(one(&recorded["go-2017-end"]).body, b"");
    assert_eq!(one(&recorded["node-2017-end"]).body, b" ");
    assert_eq!(recorded.len(), 7);
}

fn encoded(profile: Profile, frame: Frame<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    frame.encode(profile, &mut out).expect("it fits");
    out
}

fn to(word: Word<'static>, body: &'static [u8]) -> Frame<'static> {
    Frame {
        id: "IPv4,192.0.2.7,50123",
        word,
        service_port: 443,
        name: "app.a.example",
        speaks: "https",
        body,
    }
}

#[test]
fn frames_are_written_as_each_client_wants_them() {
    let (node, others) = (node(), others());
    let data = |profile, word| encoded(profile, to(Word::Data(word), REQUEST));
    assert_eq!(data(Profile::Node2018, "https"), node["v4-https-named"]);
    assert_eq!(data(Profile::Node2017, "http"), others["node-2017-http"]);
    assert_eq!(data(Profile::Go2017, "http"), others["go-2017-http"]);
    assert_eq!(data(Profile::Go2020, "https"), node["v4-https-named"]);
    let word = |profile, word, body| encoded(profile, to(word, body));
    assert_eq!(
        word(Profile::Node2018, Word::End, b""),
        node["v4-end-empty"]
    );
    assert_eq!(
        word(Profile::Node2017, Word::End, b" "),
        others["node-2017-end"]
    );
    assert_eq!(word(Profile::Go2017, Word::End, b""), others["go-2017-end"]);
    assert_eq!(
        word(Profile::Node2018, Word::Connection, b""),
        node["v4-connection"]
    );
    assert_eq!(
        word(Profile::Node2018, Word::Pause, b"1048577"),
        node["v4-pause"]
    );
    let command = encoded(Profile::Node2018, Frame::control(b"[-1,null]"));
    assert_eq!(command, node["control-hello-answer"]);
}

#[test]
fn the_frame_of_the_first_description_is_made_the_same() {
    let body = [b'x'; 413];
    let frame = Frame {
        id: "IPv4,127.0.0.1,8080",
        word: Word::Data("http"),
        service_port: 0,
        name: "",
        speaks: "",
        body: &body,
    };
    let mut out = Vec::new();
    frame.encode(Profile::Go2017, &mut out).expect("it fits");
    assert_eq!(&out[..2], [0xfe, 0x1c]);
    assert_eq!(&out[2..30], b"IPv4,127.0.0.1,8080,413,http");
    assert_eq!(out.len(), 2 + 28 + 413);
}

#[test]
fn a_name_that_does_not_fit_is_left_out_and_never_cut() {
    let long = "a".repeat(250);
    let frame = Frame {
        name: &long,
        ..to(Word::Data("https"), b"x")
    };
    let read = one(&encoded(Profile::Node2018, frame));
    assert_eq!(
        (&*read.name, &*read.port, &read.body[..]),
        ("", "443", &b"x"[..])
    );
    let id = "9".repeat(256);
    let frame = Frame {
        id: &id,
        ..to(Word::End, b"")
    };
    assert!(frame.encode(Profile::Node2017, &mut Vec::new()).is_err());
}

fn fault(header: &str) -> Fault {
    let mut bytes = vec![0xfe, u8::try_from(header.len()).expect("short")];
    bytes.extend_from_slice(header.as_bytes());
    decode([&bytes[..]]).expect_err(header)
}

#[test]
fn what_is_no_frame_is_refused_for_good() {
    assert_eq!(
        decode([&[0xfd, 0][..]]),
        Err(Fault::Version { first: 0xfd })
    );
    assert_eq!(decode([&b"GET /"[..]]), Err(Fault::Version { first: b'G' }));
    assert_eq!(fault(""), Fault::Fields { fields: 1 });
    assert_eq!(fault("IPv4,1.2.3.4,80,0"), Fault::Fields { fields: 4 });
    for length in ["", "-1", "+1", "0x1", "1.0", "99999999999", "1 2"] {
        let header = format!("IPv4,1.2.3.4,80,{length},http");
        assert_eq!(fault(&header), Fault::Length, "{length:?}");
    }
    assert_eq!(fault("IPv4,\0,80,0,http"), Fault::NotText);
    assert_eq!(fault("IPv4,ü,80,0,http"), Fault::NotText);
    let (length, limit) = (LIMITS.data + 1, LIMITS.data);
    let header = format!("IPv4,1.2.3.4,80,{length},http");
    assert_eq!(fault(&header), Fault::TooLong { length, limit });
    let (length, limit) = (LIMITS.word + 1, LIMITS.word);
    let header = format!(",,,{length},control");
    assert_eq!(fault(&header), Fault::TooLong { length, limit });

    let mut decoder = Decoder::new(LIMITS);
    let broken = Fault::Version { first: 0 };
    assert_eq!(decoder.next(&mut &b"\0"[..]), Err(broken));
    let good = &others()["go-2017-http"];
    assert_eq!(decoder.next(&mut &good[..]), Err(broken));
}

#[test]
fn a_header_may_have_every_length_and_more_fields_than_are_known() {
    let longest = format!("IPv4,1.2.3.4,80,2,http,443,{},x,y", "n".repeat(224));
    assert_eq!(longest.len(), 255);
    let mut bytes = vec![0xfe, 255];
    bytes.extend_from_slice(longest.as_bytes());
    bytes.extend_from_slice(b"ok");
    let read = one(&bytes);
    assert_eq!(
        (read.name.len(), &*read.speaks, &read.body[..]),
        (224, "x", &b"ok"[..])
    );
}

#[test]
fn r_06_each_of_the_five_clients_is_known_by_its_request() {
    let ask = |path, query, agent, token| {
        let asked = Asked {
            path,
            query,
            agent,
            token,
        };
        asked.profile()
    };
    let go = "Go-http-client/1.1";
    let query = "access_token=a.b.c";
    // Of 2017, before and after it learned commands: told the same.
    assert_eq!(ask("/", query, "", Token::Query), Profile::Node2017);
    assert_eq!(ask("/", "", "", Token::None), Profile::Node2018);
    assert_eq!(ask("/", query, go, Token::Query), Profile::Go2017);
    let both = "access_token=a.b.c&versions=v1";
    assert_eq!(ask("/", both, go, Token::Header), Profile::Go2020);
    // A proxy may have changed who it says it is.
    assert_eq!(ask("/", both, "proxy/1", Token::Query), Profile::Go2020);
    assert_eq!(ask("/ws", query, go, Token::Query), Profile::Go2020);
    assert_eq!(ask("/api/ws/", query, "", Token::Query), Profile::Go2020);
    assert_eq!(ask("/", "", "", Token::Header), Profile::Node2018);
    for profile in Profile::ALL {
        assert_eq!(profile.to_string().parse(), Ok(profile));
        // What knows no commands knows no frame that is one.
        assert!(profile.commands() || !(profile.announces() || profile.takes_grants()));
    }
    assert!("node".parse::<Profile>().is_err());
}

#[test]
fn commands_are_understood() {
    let heard = |text: &str| Heard::parse(text.as_bytes());
    let request = |text: &str| match heard(text) {
        Ok(Heard::Request { id, command }) => (id, command),
        other => panic!("{text}: {other:?}"),
    };
    let token = |t: &str| Command::AddToken(t.to_owned());
    assert_eq!(
        request(r#"[812345678,"add_token","a.b.c"]"#),
        (812_345_678, token("a.b.c"))
    );
    for name in ["auth", "authn", "authz"] {
        assert_eq!(
            request(&format!(r#"[5,"{name}","a.b.c"]"#)).1,
            token("a.b.c")
        );
    }
    assert_eq!(request(r#"[5.0,"auth",{"token":"t"}]"#), (5, token("t")));
    let pair = r#"[5,"auth",{"subject":"a@b","subject_scheme":"mailto","otp":"1"}]"#;
    assert_eq!(request(pair).1, Command::Pair);
    assert_eq!(
        request(r#"[6,"delete_token","*"]"#).1,
        Command::DeleteToken(None)
    );
    assert_eq!(
        request(r#"[6,"delete_token","a.b.c"]"#).1,
        Command::DeleteToken(Some("a.b.c".to_owned()))
    );
    assert_eq!(request(r#"[6,"delete_token"]"#).1, Command::Malformed);
    assert_eq!(request(r#"[6,"add_token",{}]"#).1, Command::Malformed);
    assert_eq!(request(r#"[6,"format",1]"#).1, Command::Unknown);
    assert_eq!(heard("[-1,null]"), Ok(Heard::Reply { id: 1, good: true }));
    assert_eq!(
        heard(r#"[-1,{"message":"no"}]"#),
        Ok(Heard::Reply { id: 1, good: false })
    );
    assert_eq!(heard(r#"[0,{"message":"x"}]"#), Ok(Heard::Notice));
    for text in [
        "",
        "{}",
        "[]",
        "[null]",
        "[1]",
        "[1,2]",
        "[1.5,\"hello\"]",
        "[\"1\",\"hello\"]",
        "[1e300,\"x\"]",
        "[1,\"add_token\",\"a\"",
        "\u{feff}[1,\"hello\"]",
    ] {
        let failure = heard(text).expect_err(text);
        assert_eq!(failure.code, code::BAD_COMMAND);
    }
    let deep = format!("[1,\"x\",{}1{}]", "[".repeat(2000), "]".repeat(2000));
    assert!(heard(&deep).is_err());
    // A token is not shown by accident.
    let shown = format!("{:?}", heard(r#"[1,"add_token","se.cr.et"]"#));
    assert!(!shown.contains("cr"), "{shown}");
}

#[test]
fn commands_are_said_as_they_are_understood() {
    assert_eq!(
        hello(Profile::Node2017),
        r#"[1,"hello",[1],["add_token","delete_token"]]"#
    );
    assert_eq!(
        hello(Profile::Node2018),
        r#"[1,"hello",[1],["add_token","delete_token","auth","authn","authz"]]"#
    );
    let no = Failure {
        code: code::INVALID_TOKEN,
        message: "no",
    };
    assert_eq!(succeeded(7), "[-7,null]");
    let parts = |text: &str| -> serde_json::Value { serde_json::from_str(text).expect("JSON") };
    let error = serde_json::json!({"message": "no", "code": "E_INVALID_TOKEN"});
    assert_eq!(parts(&failed(7, no)), serde_json::json!([-7, error]));
    assert_eq!(parts(&notice(no)), serde_json::json!([0, error]));
    assert_eq!(parts(&no.body()), error);
    let grant = Grant {
        host: "gw.example".into(),
        names: vec!["a.ex".into()],
        port: 443,
        ports: vec![2222],
    };
    assert_eq!(
        parts(&grant.command()),
        serde_json::json!([
            2,
            "grant",
            [
                ["ssh+https", "a.ex", 443],
                ["https", "a.ex"],
                ["ssh", "gw.example", [2222]],
                ["tcp", "gw.example", [2222]],
            ]
        ])
    );
}

#[test]
fn r_23_a_slow_visitor_pauses_its_server_once_and_lets_it_go_on_once() {
    let mut gauge = Gauge::default();
    gauge.fill(PAUSE_ABOVE);
    assert_eq!(gauge.turn(), None);
    gauge.fill(1);
    let read = PAUSE_ABOVE as u64 + 1;
    assert_eq!(gauge.turn(), Some(Turn::Pause(read)));
    assert_eq!(gauge.turn(), None);
    gauge.fill(1000);
    assert_eq!(gauge.turn(), None);
    gauge.drain(PAUSE_ABOVE + 1001 - RESUME_BELOW);
    assert_eq!(gauge.turn(), None);
    gauge.drain(1);
    assert_eq!(gauge.turn(), Some(Turn::Resume(read + 1000)));
    assert_eq!((gauge.turn(), gauge.waiting()), (None, RESUME_BELOW - 1));
}

fn frames() -> impl Strategy<Value = Vec<(usize, Word<'static>, Vec<u8>)>> {
    let word = prop_oneof![
        Just(Word::Data("http")),
        Just(Word::Data("https")),
        Just(Word::Data("tcp")),
        Just(Word::Control),
        Just(Word::Connection),
        Just(Word::End),
        Just(Word::Error),
        Just(Word::Pause),
    ];
    let body = prop::collection::vec(any::<u8>(), 0..600);
    prop::collection::vec((0..VISITORS.len(), word, body), 1..12)
}

proptest! {
    #[test]
    fn any_split_of_the_bytes_reads_the_same(
        frames in frames(),
        profile in prop::sample::select(&Profile::ALL[..]),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let mut bytes = Vec::new();
        let mut expected = Vec::new();
        for (visitor, word, body) in &frames {
            let control = *word == Word::Control;
            let id = if control { NO_STREAM } else { VISITORS[*visitor].1 };
            let frame = Frame {
                id,
                word: *word,
                service_port: 443,
                name: "app.a.example",
                speaks: "tcp",
                body,
            };
            frame.encode(profile, &mut bytes).expect("it fits");
            let named = *word == Word::Connection || !control && profile.names_visitors();
            expected.push(Whole {
                id: id.to_owned(),
                word: word.as_str().to_owned(),
                length: body.len(),
                port: if named { "443" } else { "" }.to_owned(),
                name: if named { "app.a.example" } else { "" }.to_owned(),
                speaks: if *word == Word::Connection { "tcp" } else { "" }.to_owned(),
                body: body.clone(),
            });
        }
        prop_assert_eq!(&decode([&bytes[..]]), &Ok(expected.clone()));
        let mut cuts: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let portions = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]);
        prop_assert_eq!(&decode(portions), &Ok(expected.clone()));
        prop_assert_eq!(&decode(bytes.chunks(1)), &Ok(expected));
    }

    #[test]
    fn header_and_body_may_come_apart(body in prop::collection::vec(any::<u8>(), 1..300)) {
        let frame = Frame { body: &body, ..to(Word::Data("tcp"), b"") };
        let bytes = encoded(Profile::Node2018, frame);
        let (header, rest) = bytes.split_at(bytes.len() - body.len());
        let frames = decode([header, rest]).expect("a frame");
        prop_assert_eq!(&frames[0].body, &body);
    }

    #[test]
    fn a_gauge_never_says_the_same_twice(steps in prop::collection::vec((any::<bool>(), 0..200_000_usize), 0..200)) {
        let mut gauge = Gauge::default();
        let mut paused = false;
        for (fill, bytes) in steps {
            match fill {
                true if bytes <= gauge.room() => gauge.fill(bytes),
                true => {}
                false => gauge.drain(bytes.min(gauge.waiting())),
            }
            match gauge.turn() {
                Some(Turn::Pause(_)) => prop_assert!(!std::mem::replace(&mut paused, true)),
                Some(Turn::Resume(_)) => prop_assert!(std::mem::replace(&mut paused, false)),
                None => {}
            }
            prop_assert_eq!(paused, if paused { gauge.waiting() >= RESUME_BELOW } else { gauge.waiting() > PAUSE_ABOVE });
        }
    }
}

#[test]
fn damaged_frames_never_panic_and_read_the_same_in_any_portions() {
    let seeds: Vec<Vec<u8>> = node().into_values().chain(others().into_values()).collect();
    let random = &mut Random(7);
    let (mut good, mut bad) = (0_u64, 0_u64);
    for _ in 0..1_000_000 {
        let mut bytes = seeds[random.below(seeds.len())].clone();
        bytes.extend_from_slice(&seeds[random.below(seeds.len())]);
        for _ in 0..=random.below(3) {
            let at = random.below(bytes.len());
            match random.below(4) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes[at] = random.next() as u8,
                2 => bytes.truncate(at + 1),
                _ => drop(bytes.remove(at)),
            }
            if bytes.is_empty() {
                bytes.push(0xfe);
            }
        }
        let whole = decode([&bytes[..]]);
        let cut = random.below(bytes.len());
        let (a, b) = bytes.split_at(cut);
        match (&whole, decode([a, b])) {
            (Err(fault), Err(again)) => assert_eq!(*fault, again),
            (Ok(frames), Ok(again)) => assert_eq!(*frames, again),
            (_, again) => panic!("{bytes:x?} cut at {cut}: {whole:?} and {again:?}"),
        }
        if let Ok(frames) = &whole {
            for frame in frames {
                drop(Heard::parse(&frame.body));
            }
        }
        *if whole.is_ok() { &mut good } else { &mut bad } += 1;
    }
    assert!(good > 100_000 && bad > 100_000, "{good} {bad}");
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}
