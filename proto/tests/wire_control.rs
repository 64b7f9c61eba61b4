//! Control messages: what both sides may say, and what a client believes.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use rvpn_proto::control::{
    ControlError, Counters, ErrorNotice, Goodbye, Hello, Limits, MAX_DEPTH, Message, Pair, Policy,
    Prefix, Quota, Refusal, Resolve, Resolved, RouteFault, Stage, Stats, Ticket, Welcome, What,
    close, negotiate, patience,
};

fn hello() -> Hello {
    Hello {
        versions: vec![1],
        name: "rvpn 0.1.0".into(),
        instance: "laptop-5f3a".into(),
        capabilities: vec!["offload".into()],
        mtu: Some(1500),
        keepalive_s: Some(12),
        ticket: Some("v1.abc".into()),
    }
}

fn welcome() -> Welcome {
    Welcome {
        version: 1,
        name: "rvpn-gateway 0.1.0".into(),
        session: "a1b2".into(),
        resumed: false,
        capabilities: vec!["offload".into()],
        v4: Pair {
            address: Ipv4Addr::new(10, 64, 0, 2),
            peer: Ipv4Addr::new(10, 64, 0, 1),
        },
        v6: Some(Pair {
            address: Ipv6Addr::new(0xfd12, 0, 0, 0, 0, 0, 0, 1),
            peer: Ipv6Addr::new(0xfd12, 0, 0, 0, 0, 0, 0, 0),
        }),
        mtu: 1500,
        dns: vec![],
        routes: vec![],
        ticket: Some(Ticket {
            ticket: "v1.def".into(),
            valid_s: 3600,
        }),
        keepalive_s: 12,
        limits: Limits {
            max_message: 192 * 1024,
            max_control: 16 * 1024,
            outbound_rate: None,
            inbound_rate: Some(1_000_000),
            flows: Some(1024),
        },
    }
}

fn all_kinds() -> Vec<Message> {
    vec![
        Message::Hello(hello()),
        Message::Welcome(Box::new(welcome())),
        Message::Ticket(Ticket {
            ticket: "v1.x".into(),
            valid_s: 60,
        }),
        Message::Stats(Stats::default()),
        Message::Stats(Stats {
            outbound: Some(Counters {
                packets: 1,
                payload: 60,
                wire: 100,
                dropped: 0,
            }),
            inbound: Some(Counters {
                payload: u64::MAX,
                ..Counters::default()
            }),
        }),
        Message::Quota(Quota {
            used: 9,
            limit: 10,
            resets_in_s: 60,
            throttled: true,
        }),
        Message::Resolve(Resolve {
            id: 7,
            name: "example.org".into(),
        }),
        Message::Resolved(Resolved {
            id: 7,
            addresses: vec![Ipv4Addr::new(1, 1, 1, 1).into()],
            error: None,
        }),
        Message::Goodbye(Goodbye {
            code: close::RESTART,
            text: "restarting".into(),
            retry_after_ms: Some(1500),
        }),
        Message::Error(ErrorNotice {
            code: "unknown-kind".into(),
            text: "no".into(),
        }),
    ]
}

fn parse(text: &str) -> Result<Message, ControlError> {
    Message::parse(text, Stage::Session)
}

#[test]
fn every_kind_survives_the_way_out_and_back() {
    for message in all_kinds() {
        let text = message.to_text(Stage::Session).unwrap();
        assert_eq!(parse(&text), Ok(message), "{text}");
    }
}

#[test]
fn the_kind_comes_with_the_fields_and_unknown_fields_are_ignored() {
    let text = r#"{"future":{"a":[1]},"versions":[3,1],"name":"x","instance":"i","kind":"hello"}"#;
    let expected = Hello {
        versions: vec![3, 1],
        name: "x".into(),
        instance: "i".into(),
        ..Hello::default()
    };
    assert_eq!(parse(text), Ok(Message::Hello(expected)));
}

#[test]
fn an_unknown_kind_is_named() {
    let error = parse(r#"{"kind":"dance\u001b[2J","with":1}"#).unwrap_err();
    let ControlError::Unknown { kind } = &error else {
        panic!("{error}");
    };
    assert_eq!(&**kind, "dance\u{fffd}[2J");
}

#[test]
fn malformed_messages_are_refused() {
    for text in [
        "",
        "null",
        "[]",
        "\"hello\"",
        "{}",
        r#"{"kind":1}"#,
        r#"{"kind":"hello"}"#,
        r#"{"kind":"hello","kind":"hello","versions":[1],"name":"","instance":"i"}"#,
        r#"{"kind":"resolve","id":1,"id":2,"name":"a"}"#,
        r#"{"kind":"resolve","id":-1,"name":"a"}"#,
        r#"{"kind":"resolve","id":4294967296,"name":"a"}"#,
        r#"{"kind":"resolve","id":1,"name":null}"#,
        r#"{"kind":"resolve","id":1,"name":"a"} x"#,
        r#"{"kind":"resolve","id":1,"name":"a""#,
        r#"{"kind":"resolved","id":1,"addresses":["1.1.1.256"]}"#,
    ] {
        let error = parse(text).unwrap_err();
        assert!(
            matches!(error, ControlError::Malformed { .. }),
            "{text}: {error}"
        );
    }
}

#[test]
fn length_is_bounded_by_stage() {
    let padded = |length: usize| {
        let text = r#"{"kind":"stats"}"#;
        format!("{text}{}", " ".repeat(length - text.len()))
    };
    for (stage, limit) in [(Stage::BeforeLogin, 4 * 1024), (Stage::Session, 16 * 1024)] {
        assert!(Message::parse(&padded(limit), stage).is_ok());
        assert_eq!(
            Message::parse(&padded(limit + 1), stage),
            Err(ControlError::TooLong {
                length: limit + 1,
                limit
            })
        );
    }
}

/// PRO-22: JSON 10,000 deep, closed and not, inside and outside unknown fields.
#[test]
fn depth_is_bounded_without_recursion() {
    let deep = "[".repeat(10_000);
    assert_eq!(parse(&deep), Err(ControlError::TooDeep));
    let field = format!(r#"{{"kind":"stats","x":{}"#, "{\"a\":".repeat(3_000));
    assert_eq!(parse(&field), Err(ControlError::TooDeep));
    let closed = format!(
        r#"{{"kind":"stats","x":{}{}}}"#,
        "[".repeat(8_000),
        "]".repeat(8_000)
    );
    assert_eq!(parse(&closed), Err(ControlError::TooDeep));

    let nested = |levels: usize| {
        format!(
            r#"{{"kind":"stats","x":{}{}}}"#,
            "[".repeat(levels),
            "]".repeat(levels)
        )
    };
    assert!(parse(&nested(MAX_DEPTH - 1)).is_ok());
    assert_eq!(parse(&nested(MAX_DEPTH)), Err(ControlError::TooDeep));
    // Brackets inside a text are no depth, nor does an escaped quote end it.
    let quoted = format!(r#"{{"kind":"stats","x":"\"{}"}}"#, "[".repeat(1000));
    assert!(parse(&quoted).is_ok());
}

#[test]
fn texts_and_lists_are_bounded() {
    let field = |message: Message| match message.to_text(Stage::Session) {
        Err(ControlError::Field { field, what }) => (field, what),
        other => panic!("{other:?}"),
    };
    let with = |change: fn(&mut Hello)| {
        let mut hello = hello();
        change(&mut hello);
        field(Message::Hello(hello))
    };
    assert_eq!(with(|h| h.versions.clear()), ("versions", What::Empty));
    assert_eq!(
        with(|h| h.versions = vec![1; 17]),
        ("versions", What::Many { limit: 16 })
    );
    assert_eq!(
        with(|h| h.name = "n".repeat(129)),
        ("name", What::Long { limit: 128 })
    );
    assert_eq!(with(|h| h.name = "a\nb".into()), ("name", What::Characters));
    assert_eq!(with(|h| h.instance.clear()), ("instance", What::Empty));
    assert_eq!(
        with(|h| h.instance = "../x".into()),
        ("instance", What::Characters)
    );
    assert_eq!(
        with(|h| h.ticket = Some("t".repeat(513))),
        ("ticket", What::Long { limit: 512 })
    );
    assert_eq!(
        with(|h| h.capabilities = vec!["c".into(); 33]),
        ("capabilities", What::Many { limit: 32 })
    );
    assert_eq!(
        with(|h| h.mtu = Some(575)),
        (
            "mtu",
            What::Range {
                value: 575,
                min: 576,
                max: 65_535
            }
        )
    );
    // What we would not write we do not read either.
    let text = r#"{"kind":"goodbye","code":1000,"text":"\u001b[31m"}"#;
    assert_eq!(
        parse(text),
        Err(ControlError::Field {
            field: "text",
            what: What::Characters
        })
    );
    let name = "n".repeat(254);
    assert_eq!(
        parse(&format!(r#"{{"kind":"resolve","id":1,"name":"{name}"}}"#)),
        Err(ControlError::Field {
            field: "name",
            what: What::Long { limit: 253 }
        })
    );
}

#[test]
fn versions_are_negotiated() {
    assert_eq!(negotiate(&[9, 1]), Some(1));
    assert_eq!(negotiate(&[2, 3]), None);
    assert_eq!(negotiate(&[]), None);
    let secs = std::time::Duration::from_secs;
    assert_eq!(patience(secs(12)), secs(30));
}

#[test]
fn prefixes_are_strict() {
    for good in ["0.0.0.0/0", "10.0.0.0/8", "1.2.3.4/32", "::/0", "fd00::/8"] {
        assert_eq!(good.parse::<Prefix>().unwrap().to_string(), good);
    }
    for bad in [
        "10.0.0.0",
        "10.0.0.1/8",
        "10.0.0.0/33",
        "::1/127",
        "::/129",
        "/8",
        "10.0.0.0/",
        "x/8",
        "10.0.0.0/+8",
        "10.0.0.0/256",
    ] {
        assert!(bad.parse::<Prefix>().is_err(), "{bad}");
    }
    let around = Prefix::around("192.168.7.9".parse().unwrap(), 24).unwrap();
    assert_eq!(around.to_string(), "192.168.7.0/24");
    let around6 = Prefix::around("2001:db8::7:9".parse().unwrap(), 112).unwrap();
    assert_eq!(around6.to_string(), "2001:db8::7:0/112");
    let mapped: Prefix = "::/0".parse().unwrap();
    assert!(!mapped.contains("10.0.0.0/8".parse().unwrap()));
}

const NOTHING: Policy<'static> = Policy {
    routes: false,
    default_route: false,
    over_local: false,
    local: &[],
};

fn prefix(text: &str) -> Prefix {
    text.parse().expect("a prefix in a test")
}

fn with_routes(routes: &[&str], policy: &Policy<'_>) -> Result<(), Refusal> {
    let mut welcome = welcome();
    welcome.routes = routes.iter().map(|r| prefix(r)).collect();
    welcome.validate(policy)
}

#[test]
fn an_honest_welcome_is_accepted() {
    assert_eq!(welcome().validate(&NOTHING), Ok(()));
    // Routes that the client does not use are no reason to stay away.
    assert_eq!(with_routes(&["0.0.0.0/0"], &NOTHING), Ok(()));
    let local = [prefix("192.168.1.0/24")];
    let narrow = Policy {
        routes: true,
        local: &local,
        ..NOTHING
    };
    let routes = ["10.0.0.0/8", "172.16.0.0/12", "fd00::/8", "2001:db8::/32"];
    assert_eq!(with_routes(&routes, &narrow), Ok(()));
    let all = Policy {
        default_route: true,
        ..narrow
    };
    assert_eq!(with_routes(&["0.0.0.0/0", "::/0"], &all), Ok(()));
    let halves = ["0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1", "2000::/3"];
    assert_eq!(with_routes(&halves, &all), Ok(()));
}

/// CLI-08
#[test]
fn hostile_routes_are_refused_by_name() {
    let local = [prefix("192.168.1.0/24"), prefix("2001:db8:1::/64")];
    let narrow = Policy {
        routes: true,
        local: &local,
        ..NOTHING
    };
    let fault = |route: &str, policy: &Policy<'_>| match with_routes(&[route], policy) {
        Err(Refusal::Route(named, fault)) => {
            assert_eq!(named, prefix(route));
            fault
        }
        other => panic!("{route}: {other:?}"),
    };
    for route in [
        "0.0.0.0/0",
        "0.0.0.0/1",
        "128.0.0.0/1",
        "8.0.0.0/7",
        "::/0",
        "2000::/3",
        "2a00::/12",
    ] {
        assert_eq!(fault(route, &narrow), RouteFault::Whole, "{route}");
    }
    let all = Policy {
        default_route: true,
        over_local: true,
        ..narrow
    };
    for (route, special) in [
        ("127.0.0.0/8", "127.0.0.0/8"),
        ("127.0.0.1/32", "127.0.0.0/8"),
        ("0.0.0.0/8", "0.0.0.0/8"),
        ("169.254.169.254/32", "169.254.0.0/16"),
        ("169.0.0.0/8", "169.254.0.0/16"),
        ("224.0.0.0/4", "224.0.0.0/4"),
        ("224.0.0.0/3", "224.0.0.0/4"),
        ("255.255.255.255/32", "240.0.0.0/4"),
        ("::1/128", "::/64"),
        ("::ffff:10.0.0.0/104", "::/64"),
        ("fe80::/64", "fe80::/10"),
        ("ff02::1/128", "ff00::/8"),
        ("fe00::/7", "fe80::/10"),
    ] {
        assert_eq!(
            fault(route, &all),
            RouteFault::Special(prefix(special)),
            "{route}"
        );
    }
    for (route, lan) in [
        ("192.168.1.0/24", 0),
        ("192.168.1.128/25", 0),
        ("192.168.1.7/32", 0),
        ("192.168.0.0/16", 0),
        ("2001:db8:1::/64", 1),
        ("2001:db8::/32", 1),
    ] {
        assert_eq!(
            fault(route, &narrow),
            RouteFault::Local(local[lan]),
            "{route}"
        );
        assert_eq!(with_routes(&[route], &all), Ok(()), "{route}");
    }
    let error = with_routes(&["127.0.0.0/8"], &all).unwrap_err().to_string();
    assert!(error.contains("127.0.0.0/8"), "{error}");
}

#[test]
fn the_whole_is_not_smuggled_in_by_pieces() {
    let narrow = Policy {
        routes: true,
        ..NOTHING
    };
    let quarter: Vec<String> = (32..96).map(|n| format!("{n}.0.0.0/8")).collect();
    let mut routes: Vec<&str> = quarter.iter().map(String::as_str).collect();
    assert_eq!(with_routes(&routes, &narrow), Ok(()));
    routes.push("96.0.0.0/32");
    assert_eq!(
        with_routes(&routes, &narrow),
        Err(Refusal::TooMuch(prefix("96.0.0.0/32")))
    );
    let all = Policy {
        default_route: true,
        ..narrow
    };
    assert_eq!(with_routes(&routes, &all), Ok(()));
}

/// CLI-08
#[test]
fn other_hostile_values_are_refused_by_name() {
    let refusal = |change: &dyn Fn(&mut Welcome), policy: &Policy<'_>| {
        let mut welcome = welcome();
        change(&mut welcome);
        let refusal = welcome.validate(policy).expect_err("hostile");
        (refusal, refusal.to_string())
    };
    for mtu in [0, 1, 575, 65_536, 70_000, u32::MAX] {
        let (refused, text) = refusal(&|w| w.mtu = mtu, &NOTHING);
        assert_eq!(refused, Refusal::Mtu(mtu));
        assert!(text.contains(&mtu.to_string()), "{text}");
    }
    for dns in [
        "127.0.0.1",
        "127.0.0.53",
        "0.0.0.0",
        "::1",
        "::",
        "fe80::1",
        "224.0.0.251",
        "ff02::fb",
        "169.254.169.253",
        "255.255.255.255",
        "::ffff:127.0.0.1",
    ] {
        let dns = dns.parse().unwrap();
        let (refused, text) = refusal(&|w| w.dns = vec![dns], &NOTHING);
        assert_eq!(refused, Refusal::Dns(dns));
        assert!(text.contains(&dns.to_string()), "{text}");
    }
    let loopback = Ipv4Addr::LOCALHOST;
    assert_eq!(
        refusal(&|w| w.v4.address = loopback, &NOTHING).0,
        Refusal::Address(loopback.into())
    );
    let link_local: Ipv6Addr = "fe80::1".parse().unwrap();
    let set_v6 = |w: &mut Welcome| {
        w.v6 = Some(Pair {
            address: link_local,
            peer: link_local,
        });
    };
    assert_eq!(
        refusal(&set_v6, &NOTHING).0,
        Refusal::Address(link_local.into())
    );
    assert_eq!(
        refusal(&|w| w.v4.peer = w.v4.address, &NOTHING).0,
        Refusal::SameAddress(Ipv4Addr::new(10, 64, 0, 2).into())
    );
    let local = [prefix("10.64.0.0/16")];
    let at_home = Policy {
        local: &local,
        ..NOTHING
    };
    assert_eq!(
        refusal(&|_| {}, &at_home).0,
        Refusal::Address(Ipv4Addr::new(10, 64, 0, 2).into())
    );
    assert_eq!(refusal(&|w| w.version = 2, &NOTHING).0, Refusal::Version(2));
    for seconds in [0, 51, u16::MAX] {
        assert_eq!(
            refusal(&|w| w.keepalive_s = seconds, &NOTHING).0,
            Refusal::Keepalive(seconds)
        );
    }
    assert_eq!(
        refusal(&|w| w.limits.max_message = 1507, &NOTHING).0,
        Refusal::MaxMessage(1507)
    );
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,400}") {
        drop(parse(&text));
    }

    #[test]
    fn whatever_is_read_can_be_written_and_read_again(
        which in 0_usize..10,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let mut bytes = all_kinds()[which]
            .to_text(Stage::Session)
            .map_err(|e| TestCaseError::fail(e.to_string()))?
            .into_bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let text = String::from_utf8_lossy(&bytes);
        if let Ok(message) = parse(&text) {
            let again = message.to_text(Stage::Session).map(|t| parse(&t));
            prop_assert_eq!(again, Ok(Ok(message)));
        }
    }
}
