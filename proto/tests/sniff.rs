//! What connections are taken for, however their first bytes arrive.

mod greeting;

use greeting::{Greeting, list8, list16, names, protocols, records};
use rvpn_proto::sniff::alert::Alert;
use rvpn_proto::sniff::{ClientHello, HELLO_LIMIT, HelloReader, Reading, classify};

/// All at once.
fn read(bytes: &[u8]) -> Reading {
    HelloReader::new().read(bytes)
}

fn hello(greeting: &Greeting) -> ClientHello {
    match read(&greeting.bytes()) {
        Reading::Hello(hello) => hello,
        other => panic!("{other:?}"),
    }
}

fn bad(greeting: &Greeting) -> Alert {
    match read(&greeting.bytes()) {
        Reading::Bad(alert) => alert,
        other => panic!("{other:?}"),
    }
}

fn name(greeting: &Greeting) -> Option<String> {
    hello(greeting).name.map(|n| n.to_string())
}

/// The answer as it comes up when bytes arrive in pieces that end here, and
/// after how many.
fn dripped(bytes: &[u8], ends: impl Iterator<Item = usize>) -> (Reading, usize) {
    let mut reader = HelloReader::new();
    for end in ends.chain([bytes.len()]) {
        match reader.read(&bytes[..end]) {
            Reading::More => {}
            done => return (done, end),
        }
    }
    (Reading::More, bytes.len())
}

#[test]
fn pro_02_a_greeting_split_anywhere_reads_the_same() {
    let greeting = Greeting::of(b"a.example").with(16, protocols(&[b"h2", b"http/1.1"]));
    let whole = read(&greeting.bytes());
    assert!(matches!(whole, Reading::Hello(_)));
    let message = greeting.message();
    // Segments: two, cut anywhere, and of one byte each.
    let bytes = greeting.bytes();
    for cut in 0..bytes.len() {
        let (reading, at) = dripped(&bytes, [cut].into_iter());
        assert_eq!((reading, at), (whole.clone(), bytes.len()), "cut at {cut}");
    }
    assert_eq!(
        dripped(&bytes, 0..bytes.len()),
        (whole.clone(), bytes.len())
    );
    // Records: two, cut anywhere, and of every small length; each in segments of one byte.
    for cut in 1..message.len() {
        let mut bytes = records(&message[..cut], usize::MAX);
        bytes.extend(records(&message[cut..], usize::MAX));
        assert_eq!(read(&bytes), whole, "records cut at {cut}");
        assert_eq!(dripped(&bytes, 0..bytes.len()).0, whole);
    }
    for most in 1..40 {
        let bytes = records(&message, most);
        assert_eq!(read(&bytes), whole);
        assert_eq!(
            dripped(&bytes, 0..bytes.len()),
            (whole.clone(), bytes.len())
        );
    }
    // What follows it does not matter.
    let mut more = bytes.clone();
    more.extend(b"\x14\x03\x03\0\x01\x01whatever");
    assert_eq!(read(&more), whole);
}

#[test]
fn pro_02_greetings_are_long_to_a_point() {
    let longest = Greeting::of(b"a.example").long(HELLO_LIMIT);
    assert_eq!(longest.message().len(), HELLO_LIMIT);
    assert_eq!(name(&longest).as_deref(), Some("a.example"));
    // Known as soon as its length is.
    let longer = Greeting::of(b"a.example").long(HELLO_LIMIT + 1).bytes();
    assert_eq!(
        dripped(&longer, 0..longer.len()),
        (Reading::Bad(Alert::Decode), 9)
    );
    // In records of one byte each the headers count too.
    let fits = Greeting::of(b"a.example").long(4000).message();
    assert!(matches!(read(&records(&fits, 1)), Reading::Hello(_)));
    let bytes = records(&longest.message(), 1);
    assert_eq!(read(&bytes), Reading::Bad(Alert::Decode));
    assert_eq!(
        dripped(&bytes, 0..bytes.len()).0,
        Reading::Bad(Alert::Decode)
    );
    let mut many = Greeting::of(b"a.example");
    for n in 0..100 {
        many = many.with(0x5000 + n, vec![1, 2, 3]);
    }
    assert_eq!(name(&many).as_deref(), Some("a.example"));
}

#[test]
fn pro_05_names_are_canonical_or_refused() {
    assert_eq!(name(&Greeting::new()), None);
    for (sent, canonical) in [
        (&b"a.example"[..], "a.example"),
        (b"A.ExAmPlE", "a.example"),
        (b"a.example.", "a.example"),
        (b"xn--bcher-kva.example", "xn--bcher-kva.example"),
        (b"127.0.0.1", "127.0.0.1"),
        (b"[::1]", "::1"),
        (b"0:0:0:0:0:0:0:1", "::1"),
    ] {
        assert_eq!(name(&Greeting::of(sent)).as_deref(), Some(canonical));
    }
    let label = [b'a'; 63];
    let longest = [&label[..], &label, &label, &label[..61]].join(&b'.');
    assert_eq!(longest.len(), 253);
    assert!(name(&Greeting::of(&longest)).is_some());
    let dotted = [&longest[..], b"."].concat();
    assert_eq!(name(&Greeting::of(&dotted)), name(&Greeting::of(&longest)));
    let long = |n: usize| vec![b'a'; n];
    for wrong in [
        &b""[..],
        b".",
        b"a..example",
        b"a.example..",
        b"a.exam\0ple",
        b"a.example\0",
        b"a.example:443",
        b"a.example/",
        b"*.example",
        b"b\xc3\xbccher.example",
        b"\xff\xfe",
        b" a.example",
        b"-a.example",
        b"1.2",
        &[&longest[..], b"a"].concat(),
        &long(64),
        &long(254),
        &long(255),
        &long(256),
        &long(4000),
    ] {
        assert_eq!(
            bad(&Greeting::of(wrong)),
            Alert::UnrecognizedName,
            "{wrong:?}"
        );
    }
}

#[test]
fn pro_05_there_is_one_name_or_none() {
    for entries in [
        &[&b"a.example"[..], b"b.example"][..],
        &[b"a.example", b"a.example"],
    ] {
        let two = Greeting::new().with(0, names(entries));
        assert_eq!(bad(&two), Alert::IllegalParameter);
    }
    let twice = Greeting::of(b"a.example").with(0, names(&[b"a.example"]));
    assert_eq!(bad(&twice), Alert::IllegalParameter);
    assert_eq!(bad(&Greeting::new().with(0, names(&[]))), Alert::Decode);
    assert_eq!(bad(&Greeting::new().with(0, Vec::new())), Alert::Decode);
    let mut other = names(&[b"a.example"]);
    other[2] = 1;
    assert_eq!(
        bad(&Greeting::new().with(0, other)),
        Alert::IllegalParameter
    );
    let mut trailing = names(&[b"a.example"]);
    trailing.push(0);
    assert_eq!(bad(&Greeting::new().with(0, trailing)), Alert::Decode);
}

#[test]
fn pro_05_grease_and_hidden_names_change_nothing() {
    let plain = Greeting::of(b"outer.example");
    let mut greased = plain
        .clone()
        .without(43)
        .with(0x0a0a, Vec::new())
        .with(43, list8(&[0x1a, 0x1a, 3, 4, 3, 3]))
        .with(16, protocols(&[b"\x2a\x2a", b"h2", b"http/1.1"]))
        .with(0xfafa, vec![0]);
    // An encrypted hello: what is inside is nobody's business; the name outside counts.
    greased = greased.with(0xfe0d, vec![7; 200]);
    let found = hello(&greased);
    assert_eq!(found.name.expect("the outer one").as_str(), "outer.example");
    assert!(found.tls12 && found.tls13);
    let offered = found.protocols;
    assert_eq!(
        (offered.count, offered.http11, offered.http2, offered.acme),
        (3, true, true, false)
    );
    let check = Greeting::of(b"a.example").with(16, protocols(&[b"acme-tls/1"]));
    let offered = hello(&check).protocols;
    assert_eq!((offered.count, offered.acme), (1, true));
    for wrong in [list16(b""), vec![], list16(&[0]), list16(&[5, b'h'])] {
        assert_eq!(bad(&Greeting::new().with(16, wrong)), Alert::Decode);
    }
}

#[test]
fn pro_06_versions_that_are_not_safe_are_refused() {
    let old = |version| Greeting {
        version,
        extensions: Vec::new(),
        ..Greeting::new()
    };
    for version in [0x0300, 0x0301, 0x0302] {
        assert_eq!(bad(&old(version)), Alert::ProtocolVersion);
    }
    let found = hello(&old(0x0303));
    assert!(found.tls12 && !found.tls13);
    // What the extension says counts, and nothing else.
    for (versions, expected) in [
        (&[3, 4][..], Some((false, true))),
        (&[3, 3], Some((true, false))),
        (&[3, 2, 3, 1], None),
        (&[0x7f, 0x1c], None),
    ] {
        let greeting = old(0x0303).with(43, list8(versions));
        match expected {
            Some(both) => {
                let found = hello(&greeting);
                assert_eq!((found.tls12, found.tls13), both);
            }
            None => assert_eq!(bad(&greeting), Alert::ProtocolVersion),
        }
    }
    assert_eq!(bad(&old(0x0303).with(43, list8(&[3]))), Alert::Decode);
    assert_eq!(bad(&old(0x0303).with(43, list8(&[]))), Alert::Decode);
}

#[test]
fn what_is_no_greeting_is_refused_at_the_byte_that_says_so() {
    let bytes = Greeting::of(b"a.example").bytes();
    for (at, byte, alert) in [
        (0, 23, Alert::UnexpectedMessage),
        (1, 2, Alert::ProtocolVersion),
        (5, 2, Alert::UnexpectedMessage),
        (6, 1, Alert::Decode),
    ] {
        let mut wrong = bytes.clone();
        wrong[at] = byte;
        let seen = if at == 6 { 9 } else { at + 1 };
        assert_eq!(dripped(&wrong, 0..wrong.len()), (Reading::Bad(alert), seen));
        assert_eq!(read(&wrong), Reading::Bad(alert));
    }
    // Records without content, or with too much.
    for length in [[0, 0], [0x40, 1], [0xff, 0xff]] {
        let wrong = [22, 3, 1, length[0], length[1], 1, 0, 0, 9];
        assert_eq!(dripped(&wrong, 0..9), (Reading::Bad(Alert::Decode), 5));
    }
    // Something else between its parts.
    let mut broken = records(&Greeting::of(b"a.example").message()[..20], usize::MAX);
    broken.extend([21, 3, 1, 0, 2, 1, 0]);
    assert_eq!(read(&broken), Reading::Bad(Alert::UnexpectedMessage));
    // Lengths inside that do not fit.
    let message = Greeting::of(b"a.example").message();
    for at in [38, 72, 77, 80, 84] {
        let mut wrong = message.clone();
        wrong[at] ^= 0x41;
        let reading = read(&records(&wrong, usize::MAX));
        assert!(matches!(reading, Reading::Bad(_)), "{at}: {reading:?}");
    }
}

/// Random numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % below as u64) as usize
    }
}

/// A million beginnings, changed at random: nothing panics, and what is found
/// does not depend on how the bytes arrive.
#[test]
fn pro_04_a_million_changed_beginnings_mean_the_same_whole_and_in_pieces() {
    let seeds: Vec<Vec<u8>> = vec![
        Greeting::of(b"a.example").bytes(),
        records(
            &Greeting::of(b"b.example")
                .with(16, protocols(&[b"h2"]))
                .message(),
            7,
        ),
        records(&Greeting::new().message(), 1),
        b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n".to_vec(),
        b"PROPPATCH / HTTP/1.1\r\n".to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        b"SSH-2.0-OpenSSH_9.6\r\n".to_vec(),
        b"\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10".to_vec(),
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".to_vec(),
    ];
    let mut dice = Dice(0x5eed_0f7a_b1e5);
    let (mut hellos, mut bads) = (0, 0);
    for _ in 0..1_000_000 {
        let mut bytes = seeds[dice.roll(seeds.len())].clone();
        for _ in 0..dice.roll(4) {
            let at = dice.roll(bytes.len());
            match dice.roll(4) {
                0 => bytes[at] = dice.roll(256) as u8,
                1 => bytes[at] ^= 1 << dice.roll(8),
                2 => bytes.insert(at, dice.roll(256) as u8),
                _ => bytes.truncate(at + 1),
            }
        }
        let class = classify(&bytes);
        let cut = dice.roll(bytes.len() + 1);
        let early = classify(&bytes[..cut]);
        assert!(early.is_none() || early == class, "{bytes:x?} at {cut}");
        let whole = read(&bytes);
        let (pieces, at) = dripped(&bytes, [cut, (cut + bytes.len()) / 2].into_iter());
        assert_eq!(pieces, whole, "{bytes:x?} at {cut}");
        // An answer once given stays.
        if whole != Reading::More {
            assert_eq!(read(&bytes[..at]), whole);
        }
        hellos += u32::from(matches!(whole, Reading::Hello(_)));
        bads += u32::from(matches!(whole, Reading::Bad(_)));
    }
    // Both ways were gone often.
    assert!(hellos > 50_000 && bads > 50_000, "{hellos} {bads}");
}
