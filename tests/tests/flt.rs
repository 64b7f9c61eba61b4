//! Faults under the helper: killed, tampered with, refused by the kernel, started badly.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rvpn_ipc::{Client, ClientError, Key, Kind, Status};
use rvpn_lab::capture::{contains, drain_udp};
use rvpn_lab::probe::{Canary, Observers};
use rvpn_lab::read_back::{devices, elements, rules_alone};
use rvpn_lab::topology::{GW4, UP4};
use rvpn_lab::{Helper, Lab, Tunnel, packet, wait_until, wait_within};

fn setup(config: &str) -> (Lab, Helper, Client) {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, config);
    let client = helper.connect();
    (lab, helper, client)
}

/// A new flow of the tunnel reaches the internet from the gateway's address.
#[track_caller]
fn works(lab: &Lab, a: &Tunnel) {
    static PORT: AtomicUsize = AtomicUsize::new(20_000);
    let port = u16::try_from(PORT.fetch_add(1, Ordering::Relaxed)).unwrap();
    let server = lab.up.udp(&format!("{UP4}:{port}"));
    let canary = Canary::new();
    a.send(&packet::udp(&a.v4(2), 4000, UP4, port, &canary.0));
    let mut buf = [0; 64];
    let (n, from) = server.recv_from(&mut buf).expect("a new flow works");
    assert!(contains(&buf[..n], &canary.0));
    assert_eq!(from.ip().to_string(), GW4);
}

#[test]
fn flt_02_helper_killed_new_leases_within_a_second() {
    let (lab, mut helper, mut client) = setup("linger = 60\nslots = 8\n");
    let (a, b) = (
        Tunnel::acquire(&mut client, 1),
        Tunnel::acquire(&mut client, 2),
    );
    let (rules, names) = (rules_alone(&lab.gw), devices(&lab.gw));
    let links = |lab: &Lab| {
        let mut all = rvpn_lab::read_back::ip_json(&lab.gw, "-d addr show");
        for l in all.as_array_mut().unwrap() {
            l.as_object_mut().unwrap().retain(|k, _| {
                ["ifindex", "ifname", "ifalias", "mtu", "group", "addr_info"].contains(&k.as_str())
            });
        }
        all
    };
    let before = links(&lab);
    const PINGS: u16 = 10_000;
    let answered = AtomicUsize::new(0);
    std::thread::scope(|s| {
        let pinger = s.spawn(|| {
            for n in 0..PINGS {
                a.send(&packet::echo(&a.v4(2), UP4, 7, n, b"through it all"));
                while let Some(p) = a.recv(Duration::ZERO) {
                    answered.fetch_add(usize::from(p[9] == 1 && p[20] == 0), Ordering::Relaxed);
                }
                if n % 16 == 0 {
                    std::thread::park_timeout(Duration::from_micros(500));
                }
            }
            while answered.load(Ordering::Relaxed) < PINGS.into() {
                let p = a.recv(Duration::from_secs(2)).unwrap_or_else(|| {
                    panic!(
                        "{} pings answered {}",
                        answered.load(Ordering::Relaxed),
                        lab.gw.sh("nft", &["list", "counters"])
                    )
                });
                answered.fetch_add(usize::from(p[9] == 1 && p[20] == 0), Ordering::Relaxed);
            }
        });
        wait_until("pings flow", || answered.load(Ordering::Relaxed) > 1000);
        helper.kill();
        assert!(helper.try_connect(false).is_err(), "a lease from nobody");
        let start = Instant::now();
        helper.start(&lab.gw);
        let mut client = helper.connect();
        let c = Tunnel::acquire(&mut client, 3);
        let took = start.elapsed();
        assert!(took < Duration::from_secs(1), "a new lease after {took:?}");
        // The leases of before are known, and are whose they were.
        assert_eq!(client.describe().unwrap().lingering, 2);
        for t in [&a, &b] {
            client
                .confirm(t.reply.slot, t.reply.generation, t.key)
                .expect("confirm");
        }
        assert!(
            client
                .confirm(a.reply.slot, a.reply.generation + 1, a.key)
                .is_err()
        );
        assert!(
            client
                .confirm(a.reply.slot, a.reply.generation, b.key)
                .is_err()
        );
        assert_eq!(client.describe().unwrap().leased, 3);
        client.release(c.reply.slot, c.reply.generation).unwrap();
        drop(c);
        wait_until("the third is clean", || {
            client.describe().unwrap().leased == 2 && client.describe().unwrap().cleaning == 0
        });
        pinger.join().unwrap();
        works(&lab, &a);
        works(&lab, &b);
    });
    assert_eq!(answered.load(Ordering::Relaxed), usize::from(PINGS));
    assert_eq!(devices(&lab.gw), names, "devices were doubled or lost");
    assert_eq!(rules_alone(&lab.gw), rules, "the rules differ from before");
    for (set, n) in [
        ("lease4", 2),
        ("lease6", 2),
        ("back4", 2),
        ("back6", 2),
        ("marks", 2),
        ("stream4", 2),
        ("uplinks", 1),
    ] {
        assert_eq!(elements(&lab.gw, set), n, "{set}");
    }
    // The third lease left its slot's generation behind, and nothing else.
    let strip = |v: serde_json::Value| v.to_string().replace("rvpn1 1\"", "rvpn1 0\"");
    assert_eq!(strip(links(&lab)), strip(before));
}

#[test]
fn flt_11_the_kernel_refuses_now_and_then() {
    let program = rvpn_lab::helper::faulty();
    for error in [libc::ENOBUFS, libc::EBUSY, libc::EEXIST, libc::EPERM] {
        let lab = Lab::new();
        let mut helper = Helper::prepared(&lab, "");
        // Not while it starts: from then on one message of thirty-one.
        helper.program(
            program.clone(),
            &[("RVPN_FAULT", &format!("send:{error}:70+31"))],
        );
        helper.start(&lab.gw);
        let mut client = helper.connect();
        let (mut granted, mut refused) = (0, 0);
        for n in 0..60_u8 {
            match client.acquire(Key([n + 1; 16]), Kind::Both, 0) {
                Ok(lease) => {
                    granted += 1;
                    client
                        .release(lease.reply.slot, lease.reply.generation)
                        .unwrap();
                }
                Err(ClientError::Refused(r)) => {
                    refused += 1;
                    assert!(
                        matches!(r.status, Status::Failed | Status::NoCapacity),
                        "{error}: {:?}",
                        r.status
                    );
                }
                Err(e) => panic!("{error}: {e}; {:?} {}", helper.exited(), helper.log()),
            }
            let d = client.describe().unwrap();
            assert_eq!(
                d.free + d.leased + d.lingering + d.cleaning,
                d.slots,
                "{error}"
            );
        }
        assert!(granted > 0, "{error}: {refused} refused");
        assert!(helper.exited().is_none(), "{error}: {}", helper.log());
        wait_until("everything is clean again", || {
            let d = client.describe().unwrap();
            d.free == d.slots
        });
    }
}

fn rules_come_back(change: &[&str]) {
    let (lab, helper, mut client) = setup("");
    let (a, b) = (
        Tunnel::acquire(&mut client, 1),
        Tunnel::acquire(&mut client, 2),
    );
    let rules = rules_alone(&lab.gw);
    works(&lab, &a);
    lab.gw.sh("nft", change);
    let mut told = Vec::new();
    wait_within(
        Duration::from_secs(5),
        "the table is back and everybody was told",
        || {
            client.describe().unwrap();
            told.extend(std::iter::from_fn(|| client.take_notice()).map(|n| n.status));
            told.contains(&Status::RulesLost) && told.contains(&Status::RulesRestored)
        },
    );
    assert_eq!(rules_alone(&lab.gw), rules);
    assert!(
        helper
            .log()
            .contains("inet rvpn was changed or removed by somebody else"),
        "no alarm"
    );
    // As before, spoofing included.
    works(&lab, &a);
    works(&lab, &b);
    let mut watch = Observers::new(&lab);
    let canary = Canary::new();
    a.send(&packet::udp(&b.v4(2), 1, UP4, 1, &canary.0));
    a.send(&packet::udp(
        &b.v6(1),
        1,
        rvpn_lab::topology::UP6,
        1,
        &canary.0,
    ));
    watch.fence(&a);
    assert_eq!(watch.seen(canary), 0);
    a.send(&packet::echo(
        &a.v6(1),
        rvpn_lab::topology::UP6,
        1,
        1,
        &canary.0,
    ));
    a.expect(&canary.0);
}

#[test]
fn flt_12_an_administrator_flushes_the_ruleset() {
    rules_come_back(&["flush ruleset"]);
}

#[test]
fn flt_12_the_table_is_replaced() {
    rules_come_back(&["delete table inet rvpn; add table inet rvpn"]);
}

#[test]
fn flt_12_one_chain_is_emptied() {
    rules_come_back(&["flush chain inet rvpn everyone"]);
}

#[test]
fn flt_12_a_set_is_widened() {
    rules_come_back(&["delete element inet rvpn special4 { 10.0.0.0/8 }"]);
}

#[test]
fn flt_12_while_the_table_cannot_come_back_nothing_passes() {
    let lab = Lab::new();
    let mut helper = Helper::prepared(&lab, "");
    // The first table is taken, no later one.
    helper.program(
        rvpn_lab::helper::faulty(),
        &[("RVPN_FAULT", "install:105:2+1")],
    );
    helper.start(&lab.gw);
    let mut client = helper.connect();
    let a = Tunnel::acquire(&mut client, 1);
    works(&lab, &a);
    lab.gw.sh("nft", &["flush ruleset"]);
    wait_within(Duration::from_secs(5), "an alarm", || {
        helper.log().contains("could not be") && helper.exited().is_none()
    });
    client.describe().expect("it goes on answering");
    // Forwarding is closed for as long as there are no rules.
    let mut watch = rvpn_lab::capture::Capture::on(&lab.up);
    for n in 0..100 {
        let _ = a.try_send(&packet::udp(&a.v4(2), 1, UP4, 6000 + n, b"closed"));
        let _ = a.try_send(&packet::udp(
            &a.v6(1),
            1,
            rvpn_lab::topology::UP6,
            6000 + n,
            b"closed",
        ));
    }
    let fence = lab.gw.udp(&format!("{GW4}:0"));
    fence.send_to(b"fence", (UP4, 9)).unwrap();
    wait_until("a later datagram of the gateway's own arrives", || {
        watch.count(b"fence") > 0
    });
    assert_eq!(watch.count(b"closed"), 0);
}

#[test]
fn flt_13_a_device_is_deleted_under_a_client() {
    let (lab, _helper, mut client) = setup("");
    let (a, b) = (
        Tunnel::acquire(&mut client, 1),
        Tunnel::acquire(&mut client, 2),
    );
    lab.gw.ip(&format!("link del {}", a.name()));
    let notice = client.wait_notice().expect("a notice");
    assert_eq!(
        (notice.status, notice.slot, notice.generation),
        (Status::DeviceLost, a.reply.slot, a.reply.generation)
    );
    assert_eq!(
        a.try_send(b"x").unwrap_err().raw_os_error(),
        Some(libc::EBADFD)
    );
    assert_eq!(a.try_read().unwrap_err().raw_os_error(), Some(libc::EBADFD));
    assert!(
        client.release(a.reply.slot, a.reply.generation).is_err(),
        "the lease ended with the device"
    );
    works(&lab, &b);
    wait_until("the slot has a new device", || {
        devices(&lab.gw).len() == 4 && client.describe().unwrap().free == 3
    });
    let again = Tunnel::acquire(&mut client, 1);
    works(&lab, &again);
}

fn changed_underneath(change: impl Fn(&Lab, &str)) {
    let (lab, _helper, mut client) = setup("");
    let (a, b) = (
        Tunnel::acquire(&mut client, 1),
        Tunnel::acquire(&mut client, 2),
    );
    change(&lab, &a.name());
    let notice = client.wait_notice().expect("a notice");
    assert_eq!(
        (notice.status, notice.slot),
        (Status::DeviceLost, a.reply.slot)
    );
    // The descriptor of the former device is worth nothing, whoever gets the slot next.
    wait_until("the device is made again", || {
        a.try_send(b"x")
            .is_err_and(|e| e.raw_os_error() == Some(libc::EBADFD))
    });
    wait_until("the slot is free", || client.describe().unwrap().free == 3);
    works(&lab, &b);
    let mut again = Tunnel::acquire(&mut client, 3);
    while again.reply.slot != a.reply.slot {
        client
            .release(again.reply.slot, again.reply.generation)
            .unwrap();
        again = Tunnel::acquire(&mut client, 3);
    }
    works(&lab, &again);
}

#[test]
fn flt_14_set_down() {
    changed_underneath(|lab, name| drop(lab.gw.ip(&format!("link set {name} down"))));
}

#[test]
fn flt_14_address_removed() {
    changed_underneath(|lab, name| drop(lab.gw.ip(&format!("-4 addr flush dev {name}"))));
}

#[test]
fn flt_14_second_address_removed() {
    changed_underneath(|lab, name| drop(lab.gw.ip(&format!("-6 addr flush dev {name}"))));
}

#[test]
fn flt_14_mtu_changed() {
    changed_underneath(|lab, name| drop(lab.gw.ip(&format!("link set {name} mtu 9000"))));
}

#[test]
fn flt_14_moved_to_another_group() {
    changed_underneath(|lab, name| drop(lab.gw.ip(&format!("link set {name} group 7"))));
}

#[test]
fn flt_20_order_of_starting() {
    let lab = Lab::new();
    let mut helper = Helper::prepared(&lab, "");
    assert!(
        matches!(helper.try_connect(false), Err(ClientError::Io(_))),
        "nobody serves yet"
    );
    // What a helper leaves that was killed: a socket nobody serves, devices, rules, changed sysctls.
    helper.start(&lab.gw);
    let old = devices(&lab.gw);
    helper.kill();
    assert!(helper.socket.exists());
    assert!(
        matches!(helper.try_connect(false), Err(ClientError::Io(_))),
        "a stale socket serves nobody"
    );
    helper.start(&lab.gw);
    assert_eq!(devices(&lab.gw), old);
    // A second instance says so in one line and changes nothing.
    let (code, text) = helper.run(&lab.gw, "serve");
    assert_eq!((code, text.lines().count()), (78, 1), "{text}");
    assert!(
        text.contains("another rvpn-privhelper is running"),
        "{text}"
    );
    let (code, text) = helper.run(&lab.gw, "teardown");
    assert_eq!(code, 78, "{text}");
    let mut client = helper.connect();
    works(&lab, &Tunnel::acquire(&mut client, 1));
    // A larger pool grows, a smaller one keeps what is there.
    helper.kill();
    let text = fs::read_to_string(&helper.config)
        .unwrap()
        .replace("slots = 4", "slots = 6");
    fs::write(&helper.config, text).unwrap();
    helper.start(&lab.gw);
    assert_eq!(devices(&lab.gw).len(), 6);
}

#[test]
fn flt_21_a_host_that_cannot_carry_it() {
    let lab = Lab::new();
    let refused = |extra: &str, expected: &[&str]| {
        let before = devices(&lab.gw);
        let helper = Helper::prepared(&lab, extra);
        let (code, text) = helper.run(&lab.gw, "serve");
        assert_eq!(code, 78, "{extra}: {text}");
        for e in expected {
            assert!(text.contains(e), "{extra}: '{e}' is not in: {text}");
        }
        assert_eq!(devices(&lab.gw), before, "{extra}: devices were made");
    };
    refused(
        "uplink = wan7\n",
        &["uplink 'wan7' does not exist", "name an interface"],
    );
    lab.gw.ip("route add 10.77.0.0/16 dev lo");
    refused(
        "",
        &[
            "10.64.0.0/10 overlaps 10.77.0.0/16",
            "choose another prefix",
        ],
    );
    lab.gw.ip("route del 10.77.0.0/16 dev lo");
    lab.gw.ip("addr add fd52:5650:1:5::1/64 dev lo");
    refused("", &["fd52:5650:1::/48 overlaps fd52:5650:1:5::"]);
    lab.gw.ip("addr del fd52:5650:1:5::1/64 dev lo");
    lab.gw.sysctl("net/ipv4/ip_local_port_range", "20000 60999");
    refused(
        "",
        &[
            "nat-range = 16384-32767 overlaps ip_local_port_range 20000-60999",
            "move one",
        ],
    );
    lab.gw.sysctl("net/ipv4/ip_local_port_range", "32768 60999");
    let busy = (lab.gw.tcp("0.0.0.0:20443"), lab.gw.udp("[::]:20053"));
    refused("", &["contains port 20443", "contains port 20053"]);
    drop(busy);
    lab.gw.ip("link add rv2 type veth peer name other0");
    refused(
        "",
        &[
            "interface 'rv2' was not made by this helper",
            "it is not touched",
        ],
    );
    lab.gw.ip("link del rv2");
    refused(
        "pol4 = 10.0.0.0/8\n",
        &["unknown key 'pol4'; did you mean 'pool4'?"],
    );
    refused(
        "allow = 10.70.0.0/16\n",
        &["allow = '10.70.0.0/16' opens 10.64.0.0/10"],
    );
    // No default route is no failure, but it is said.
    lab.gw.ip("route del default");
    lab.gw.ip("-6 route del default");
    let mut helper = Helper::prepared(&lab, "");
    helper.start(&lab.gw);
    assert!(
        helper.log().contains("there is no default route"),
        "{}",
        helper.log()
    );
    // It is followed as soon as it comes.
    let mut client = helper.connect();
    let a = Tunnel::acquire(&mut client, 1);
    lab.gw.ip(&format!("route add default via {UP4}"));
    wait_until("the uplink is known", || elements(&lab.gw, "uplinks") == 1);
    works(&lab, &a);
    drop(client);
    helper.kill();
    let (code, text) = helper.run(&lab.gw, "teardown");
    assert_eq!(code, 0, "{text}");
    assert_eq!(devices(&lab.gw), [""; 0]);
    assert_eq!(lab.gw.sh("nft", &["list", "ruleset"]), "");
    for (name, value) in [
        ("net/ipv4/conf/wan0/forwarding", "0"),
        ("net/ipv4/conf/wan0/arp_ignore", "0"),
        ("net/ipv4/ip_forward", "0"),
    ] {
        assert_eq!(lab.gw.sysctl_get(name), value, "{name}");
    }
    let there = drain_udp(&lab.up.udp("[::]:1"));
    assert_eq!(there.len(), 0);
}

#[test]
fn flt_21_no_tun_device() {
    let lab = Lab::new();
    let helper = Helper::prepared(&lab, "");
    nix::mount::umount("/dev/net/tun").ok();
    nix::mount::mount(
        Some("tmpfs"),
        "/dev/net",
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .expect("an empty /dev/net");
    let (code, text) = helper.run(&lab.gw, "serve");
    assert_eq!(code, 78, "{text}");
    assert!(
        text.contains("/dev/net/tun is missing") && text.contains("modprobe tun"),
        "{text}"
    );
}

#[test]
fn flt_21_forwarding_that_cannot_be_switched_on() {
    use nix::mount::{MsFlags, mount};
    let lab = Lab::new();
    let helper = Helper::prepared(&lab, "");
    let none = None::<&str>;
    let sys = Some("/proc/sys");
    mount(sys, "/proc/sys", none, MsFlags::MS_BIND, none).expect("bind");
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(sys, "/proc/sys", none, read_only, none).expect("read-only");
    for verb in ["serve", "provision"] {
        let (code, text) = helper.run(&lab.gw, verb);
        assert_eq!(code, 78, "{verb}: {text}");
        let told = "net/ipv4/conf/wan0/forwarding cannot be switched on: mount /proc/sys writable";
        assert!(text.contains(told), "{verb}: {text}");
        assert_eq!(devices(&lab.gw), [""; 0], "{verb}: devices were left");
        assert_eq!(lab.gw.sh("nft", &["list", "ruleset"]), "", "{verb}");
    }
}
