use super::*;

fn env() -> Environment {
    Environment {
        machine_id: "0123456789abcdef0123456789abcdef\n".to_owned(),
        passwd:
            "root:x:0:0::/root:/bin/sh\nrvpn:x:990:991::/:/bin/false\nrvpn-helper:x:992:993::/:\n"
                .to_owned(),
    }
}

#[test]
fn an_empty_file_is_the_documented_default() {
    let c = parse("", &env()).unwrap();
    assert_eq!(c.pool4.to_string(), "10.64.0.0/10");
    assert_eq!(
        (c.gateway, c.helper),
        (User { uid: 990, gid: 991 }, User { uid: 992, gid: 993 })
    );
    assert_eq!(
        (c.slots, c.max_slots, c.nat.0, c.nat.1),
        (64, 4096, 16384, 32767)
    );
    assert_eq!(c.pool6, parse("", &env()).unwrap().pool6);
    assert_eq!(c.pool6.addr().octets()[0], 0xfd);
    assert_eq!(c.stream6, last_subnet(c.pool6, 112));
    assert_eq!(c.stream6.addr().octets()[..6], c.pool6.addr().octets()[..6]);
}

#[test]
fn the_example_says_what_the_defaults_are() {
    let uncommented: String = EXAMPLE
        .lines()
        .filter_map(|l| l.strip_prefix("#= "))
        .filter(|l| !l.starts_with("class."))
        .map(|l| format!("{l}\n"))
        .collect();
    let told = parse(&uncommented, &env()).unwrap();
    let silent = parse("", &env()).unwrap();
    assert_eq!(format!("{told:?}"), format!("{silent:?}"));
    assert_eq!(silent.socket, Path::new(rvpn_ipc::DEFAULT_SOCKET));
    assert_eq!(Values::new("").unwrap().defaults.len(), 25 + 3);
}

#[test]
fn classes_inherit_what_they_do_not_say() {
    let c = parse(
        "flow-cap = 10\nclass.2.allow = 192.168.5.0/24, fd00::/64\nclass.2.deny-ports =\n",
        &env(),
    )
    .unwrap();
    assert_eq!(c.classes.len(), 2);
    let two = &c.classes[1];
    assert_eq!(
        (
            two.number,
            two.flow_cap,
            two.allow.len(),
            two.deny_ports.len()
        ),
        (2, 10, 2, 0)
    );
    assert_eq!(
        c.classes[0].deny_ports,
        [DeniedPorts {
            proto: "tcp".to_owned(),
            low: 25,
            high: 25
        }]
    );
}

#[test]
fn refusals_name_value_reason_and_remedy() {
    for (text, expected) in [
        (
            "pol4 = 10.0.0.0/8",
            "line 1: unknown key 'pol4'; did you mean 'pool4'?",
        ),
        (
            "slots = 4\nslots = 5",
            "line 2: 'slots' was set on line 1 already",
        ),
        ("slots 4", "'slots 4' is not 'key = value'"),
        ("slots = many", "line 1: slots = 'many' is not a number"),
        ("slots = 5000", ""),
        (
            "slots = 10\nmax-slots = 5",
            "slots = 10 is not from 1 to max-slots = 5",
        ),
        (
            "pool4 = 10.64.0.1/10",
            "has bits set beyond its length of 10",
        ),
        ("pool4 = fd00::/48", "is not IPv4"),
        ("pool4 = 10.64.0.0/20", "does not fit"),
        (
            "stream4 = 10.64.0.0/18",
            "prefixes 10.64.0.0/10 and 10.64.0.0/18 overlap",
        ),
        ("stream6 = auto\npool6 = fd00::/64", "is not a /48"),
        ("allow = 10.0.0.0/8", "the clients' own range"),
        ("nat-range = 80-443", "is too small"),
        ("nat-range = 20000", "is not a range"),
        ("deny-ports = 25", "is not a port such as tcp/25"),
        ("gateway-user = nobody-here", "is no user here"),
        ("uplink = rv3", "cannot be an uplink"),
        ("mtu = 576", "below 1280"),
        ("socket = helper.sock", "is not an absolute path"),
        ("offload = maybe", "neither on nor off"),
        ("class.16.allow = 10.0.0.0/8", "unknown key"),
        ("link-group = 0", "every interface's own"),
    ] {
        match parse(text, &env()) {
            Err(e) => assert!(e.contains(expected) && !expected.is_empty(), "{text}: {e}"),
            Ok(_) => assert!(expected.is_empty(), "{text} was accepted"),
        }
    }
}
