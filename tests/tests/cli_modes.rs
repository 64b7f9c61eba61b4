//! What `rvpn up --help` says, done.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpStream, UdpSocket};

use rvpn_lab::fake_gateway::{FakeGateway, Identity, welcome_with};
use rvpn_lab::gateway::Gateway;
use rvpn_lab::machine::Machine;
use rvpn_lab::ns::{Ns, become_user};
use rvpn_lab::outside::{Outside, network};
use rvpn_lab::topology::{FAR4, GW4, NB4, UP4, UP6, at, many_uids};
use rvpn_lab::{Helper, Lab, wait_until};
use serde_json::{Value, json};

struct Scene {
    lab: Lab,
    fake: FakeGateway,
    phone: Machine,
}

const OWN6: &str = "fd52:5650:1::1";

fn scene(fields: &Value) -> Scene {
    let lab = Lab::new();
    let phone = Machine::new(&lab, "phone", 10);
    let mut said = welcome_with(fields);
    said["v6"] = json!({"address": OWN6, "peer": "fd52:5650:1::"});
    let fake = FakeGateway::start(&lab.gw, &at(GW4, 443), Identity::alone(GW4), said);
    Scene { lab, fake, phone }
}

/// Which of these go past the tunnel; the others must come through it.
#[track_caller]
fn sorted(scene: &Scene, words: &[&str], inside: &[&str], past: &[&str]) {
    let Scene { lab, fake, phone } = scene;
    let before = network(&phone.ns);
    let mut outside = Outside::of(lab, &phone.ns);
    let up = phone.up_with(&fake.words(phone), &[&["--no-dns"], words].concat());
    for to in inside {
        assert_eq!(outside.probe(&phone.ns, &[to]), 0, "{words:?} {to}");
        let canary = rvpn_lab::outside::try_send(&phone.ns, to);
        fake.expect(&canary.0);
    }
    for to in past {
        assert!(outside.probe(&phone.ns, &[to]) > 0, "{words:?} {to}");
    }
    up.down();
    assert_eq!(network(&phone.ns), before, "{words:?}");
}

/// Addresses beyond the wire, which the neighbours stand in for.
const BEYOND: &str = "9.9.9.9";

#[test]
fn cli_modes_which_destinations_go_through() {
    let scene = scene(&json!({"routes": ["0.0.0.0/0", "9.9.9.0/24", "2620:fe::/48"]}));
    let six = "2620:fe::9";
    sorted(&scene, &[], &[FAR4, UP4, UP6, BEYOND, six], &[]);
    sorted(&scene, &["--split"], &[BEYOND, six], &[FAR4, UP4, UP6]);
    let route = ["--route", "8.8.8.0/24", "--route", "2620:fe::/48"];
    sorted(&scene, &route, &[FAR4, six], &[BEYOND, UP4, UP6]);
    let both = [&["--split"], &route[..2]].concat();
    sorted(&scene, &both, &[FAR4, BEYOND, six], &[UP4, UP6]);
    let bypass = ["--bypass", "8.8.8.8/32", "--bypass", "2620:fe::/48"];
    sorted(&scene, &bypass, &[UP4, UP6, BEYOND], &[FAR4]);
    for words in [&route[..], &bypass, &["--split"]] {
        let words = [&["--kill-switch"], words].concat();
        let past: &[&str] = if words.contains(&"--bypass") {
            &[FAR4]
        } else {
            &[UP4, UP6]
        };
        sorted(&scene, &words, &[], past);
    }
}

#[test]
fn cli_modes_a_kill_switch_for_a_part_blocks_that_part() {
    let scene = scene(&json!({}));
    let Scene { lab, fake, phone } = &scene;
    let before = network(&phone.ns);
    let mut outside = Outside::of(lab, &phone.ns);
    let words = ["--no-dns", "--kill-switch", "--route", "8.8.8.0/24"];
    let mut up = phone.up_with(&fake.words(phone), &words);
    up.kill();
    wait_until("the device is gone", || {
        !phone.ns.ip("-br link").contains("rvpn0")
    });
    assert_eq!(outside.probe(&phone.ns, &[FAR4]), 0);
    assert!(outside.probe(&phone.ns, &[UP4]) > 0);
    phone.rvpn(&["down", "--repair"]).good();
    assert_eq!(network(&phone.ns), before);
}

#[test]
fn cli_modes_private_networks_next_door_only_where_allowed() {
    let scene = scene(&json!({}));
    scene.phone.ns.ip("addr add 192.168.7.5/24 dev wan0");
    scene.phone.ns.ip("addr add fd12::5/64 dev wan0 nodad");
    scene.lab.nb.ip("addr add 192.168.7.3/24 dev wan0");
    scene.lab.nb.ip("addr add fd12::3/64 dev wan0 nodad");
    let next_door = ["192.168.7.3", "fd12::3"];
    sorted(&scene, &[], &[&next_door[..], &[NB4]].concat(), &[]);
    // The wire's own addresses are public ones.
    sorted(&scene, &["--allow-lan"], &[NB4, FAR4, UP6], &next_door);
    let words = ["--allow-lan", "--kill-switch"];
    sorted(&scene, &words, &[NB4, FAR4, UP6], &next_door);
}

fn real() -> (Lab, Helper, Gateway, Machine) {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    (lab, helper, gateway, phone)
}

/// Sends a megabyte there and half of it back.
fn transfer(lab: &Lab, phone: &Ns, host: &str) {
    let listener = lab.up.tcp(&at(host, 7002));
    let server = std::thread::spawn(move || {
        let (mut tcp, _) = listener.accept().expect("a client");
        let mut all = vec![0; 1 << 20];
        tcp.read_exact(&mut all).expect("a megabyte");
        tcp.write_all(&all[..1 << 19]).expect("half of it");
    });
    let mut tcp = phone.run(|| TcpStream::connect(at(host, 7002)).expect("a connection"));
    let sent: Vec<u8> = (0..1 << 20).map(|n: u32| n.to_le_bytes()[1]).collect();
    tcp.write_all(&sent).expect("a megabyte");
    let mut back = Vec::new();
    tcp.read_to_end(&mut back).expect("half of it");
    assert!(back == sent[..1 << 19], "other bytes came back");
    server.join().expect("server");
}

#[test]
fn cli_modes_size_and_kind_of_packets() {
    let (lab, _helper, _gateway, phone) = real();
    for (words, mtu, offload) in [
        (&[][..], 1500, true),
        (&["--mtu", "1280"], 1280, true),
        (&["--no-offload"], 1500, false),
        (&["--mtu", "1400", "--no-offload"], 1400, false),
    ] {
        let up = phone.up(&[&["--no-dns"], words].concat());
        let status = phone.status();
        assert_eq!(status["mtu"], mtu, "{words:?}");
        assert_eq!(status["offload"], offload, "{words:?}");
        let link = phone.ns.ip("link show rvpn0");
        assert!(link.contains(&format!(" mtu {mtu} ")), "{link}");
        for host in [UP4, UP6] {
            transfer(&lab, &phone.ns, host);
        }
        // The kernel cuts nothing for us: it hands out fewer packets than are sent.
        let read = handed_out(&phone.ns);
        assert!(read < MEGABYTE_OF_PACKETS, "{read} packets: {words:?}");
        let sent = || phone.status()["outbound"]["packets"].as_u64();
        wait_until("the packets are counted", || {
            sent().is_some_and(|n| n > 2 * MEGABYTE_OF_PACKETS)
        });
        up.down();
    }
}

/// At least so many packets are a megabyte.
const MEGABYTE_OF_PACKETS: u64 = (1 << 20) / 1500;

/// Packets that the tunnel's device has given its reader.
fn handed_out(ns: &Ns) -> u64 {
    let text = ns.ip("-json -stats link show rvpn0");
    let links: Value = serde_json::from_str(&text).expect("JSON");
    let n = &links[0]["stats64"]["tx"]["packets"];
    n.as_u64().expect("a number")
}

#[test]
fn cli_modes_programs_may_bind_to_the_tunnels_addresses() {
    let (lab, _helper, _gateway, phone) = real();
    let before = network(&phone.ns);
    let up = phone.up(&["--no-dns"]);
    let status = phone.status();
    for (key, host) in [("v4", UP4), ("v6", UP6)] {
        let own = status[key].as_str().expect("address");
        let echo = lab.up.udp(&at(host, 7003));
        let socket = phone.ns.udp(&at(own, 0));
        socket.send_to(b"hello", at(host, 7003)).expect("send");
        let mut text = [0; 16];
        let (n, from) = echo.recv_from(&mut text).expect("it arrives");
        echo.send_to(&text[..n], from).expect("send");
        let (n, _) = socket.recv_from(&mut text).expect("and comes back");
        assert_eq!(&text[..n], b"hello");
    }
    // To one that is nobody's they may send nothing.
    let sent = phone.ns.run(|| {
        let socket = UdpSocket::bind("7.7.7.7:0")?;
        socket.send_to(b"hello", at(UP4, 7003))
    });
    assert!(sent.is_err());
    up.down();
    assert_eq!(network(&phone.ns), before);
}

#[test]
fn cli_modes_names_of_devices_and_resolvers() {
    let Scene { fake, phone, .. } = &scene(&json!({"dns": ["9.9.9.9"]}));
    let list = || fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let words = ["--interface", "tunnel.7"];
    let up = phone.up_with(&fake.words(phone), &words);
    assert!(phone.ns.ip("-br link").contains("tunnel.7"));
    assert_eq!(phone.status()["interface"], "tunnel.7");
    assert!(list().ends_with("nameserver 9.9.9.9\n"), "{}", list());
    up.down();
    let dns = ["--dns", "8.8.8.8", "--dns", UP6];
    let up = phone.up_with(&fake.words(phone), &dns);
    let ours = format!("nameserver 8.8.8.8\nnameserver {UP6}\n");
    assert!(list().ends_with(&ours), "{}", list());
    up.down();
    for words in [&["--no-dns"][..], &["--route", "8.8.8.0/24"]] {
        let before = fs::read("/etc/resolv.conf").expect("list");
        let up = phone.up_with(&fake.words(phone), words);
        assert_eq!(fs::read("/etc/resolv.conf").expect("list"), before);
        up.down();
    }
    // A name that is taken is not taken away.
    phone.ns.ip("link add mine type veth peer name mine-too");
    let mut up = phone.begin_with(&fake.words(phone), &["--interface", "mine"]);
    assert_eq!(up.ended(), 1);
    assert!(up.log().contains("mine exists already"), "{}", up.log());
    assert!(phone.ns.ip("-br link").contains("mine"));
}

#[test]
fn cli_modes_wrong_words_are_refused_by_name() {
    let Scene { fake, phone, .. } = &scene(&json!({}));
    let before = network(&phone.ns);
    for (words, value, remedy) in [
        (&["--mtu", "100"][..], "100", "1280..=65535"),
        (&["--mtu", "70000"], "70000", "1280..=65535"),
        (&["--route", "1.2.3.4/33"], "1.2.3.4/33", "--route"),
        (&["--route", "10.0.0.1/8"], "10.0.0.1/8", "--route"),
        (&["--bypass", "here"], "here", "--bypass"),
        (&["--dns", "dns.test"], "dns.test", "--dns"),
        (&["--dns", "9.9.9.9", "--no-dns"], "--no-dns", "--dns"),
        (
            &["--interface", "a-name-that-is-long"],
            "a-name-that-is-long",
            "15",
        ),
        (&["--interface", "lo"], "lo", "15"),
        (&["--interface", "a/b"], "a/b", "15"),
        (&["--everything"], "--everything", "--help"),
        (&["--ca-file", "x"], "--ca-file", "--fingerprint"),
    ] {
        let base = fake.words(phone);
        let mut up = phone.begin_with(&base, words);
        let code = up.ended();
        let log = up.log();
        assert_eq!(code, 1, "{words:?}: {log}");
        assert!(log.contains(value), "{words:?}: {log}");
        assert!(log.contains(remedy), "{words:?}: {log}");
    }
    for (words, value) in [
        (&["up", "--server", "vpn.test"][..], "--token-file"),
        (&["up", "--token-file", "/x"], "--server"),
        (&["up", "-g", "nobody"], "nobody"),
    ] {
        let said = phone.rvpn(words);
        assert_eq!(said.code, 1, "{said:?}");
        assert!(said.err.contains(value), "{said:?}");
    }
    let said = phone.rvpn(&["up"]);
    assert_eq!(said.code, 78, "{said:?}");
    assert!(said.err.contains("rvpn join"), "{said:?}");
    assert_eq!(fake.heard().connections, 0);
    assert_eq!(network(&phone.ns), before);
}

#[test]
fn cli_modes_one_at_a_time() {
    let Scene { fake, phone, .. } = &scene(&json!({}));
    // Down without up is fine, as often as one likes.
    for words in [&["down"][..], &["down", "--repair"], &["down"]] {
        assert_eq!(phone.rvpn(words).good(), "nothing was up\n");
    }
    assert_eq!(phone.status()["state"], "down");
    let up = phone.up_with(&fake.words(phone), &["--no-dns"]);
    let state = network(&phone.ns);
    let base = fake.words(phone);
    let words: Vec<&str> = base.iter().map(String::as_str).collect();
    for more in [&["up"][..], &["up", "-d"], &["up", "--kill-switch"]] {
        let said = phone.rvpn(&[more, &words[..], &["--no-dns"]].concat());
        assert_eq!(said.code, 1, "{said:?}");
        assert!(said.err.contains("up already"), "{said:?}");
        assert!(said.err.contains("rvpn down"), "{said:?}");
    }
    assert_eq!(network(&phone.ns), state);
    if many_uids() {
        // Everybody may look; root alone may end it.
        let ask = |word: &str| {
            let mut words = phone.command(&[word]);
            phone.ns.run(|| {
                become_user(65_030);
                let out = words.output().expect("rvpn");
                (
                    out.status.code(),
                    String::from_utf8_lossy(&out.stderr).into_owned(),
                )
            })
        };
        let (code, said) = ask("down");
        assert_eq!(code, Some(77), "{said}");
        assert_eq!(ask("status").0, Some(0));
    }
    up.down();
}

/// Two that begin at the same moment: one goes on, the other says why not.
#[test]
fn cli_modes_two_at_once() {
    let Scene { fake, phone, .. } = &scene(&json!({}));
    let before = network(&phone.ns);
    for _ in 0..5 {
        let mut words = vec!["up".to_owned(), "-d".to_owned(), "--no-dns".to_owned()];
        words.extend(fake.words(phone));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let codes = std::thread::scope(|s| {
            let both = [0, 1].map(|_| s.spawn(|| phone.rvpn(&words).code));
            both.map(|one| one.join().expect("thread"))
        });
        assert!(codes == [0, 1] || codes == [1, 0], "{codes:?}");
        assert_eq!(phone.status()["state"], "connected", "{codes:?}");
        let rules = phone.ns.ip("-4 rule");
        assert_eq!(rules.matches("lookup main proto").count(), 1, "{rules}");
        phone.rvpn(&["down"]).good();
        wait_until("everything is as before", || network(&phone.ns) == before);
    }
}

#[test]
fn cli_modes_in_the_background() {
    let (_lab, _helper, _gateway, phone) = real();
    let before = network(&phone.ns);
    for words in [
        &["up", "-d", "--no-dns"][..],
        &["up", "--no-dns", "--detach", "--kill-switch"],
        // Letters that stand together.
        &["up", "--no-dns", "-dg", "home"],
    ] {
        let said = phone.rvpn(words).good();
        assert!(said.contains("going on in the background"), "{said}");
        let status = phone.status();
        assert_eq!(status["state"], "connected", "{status}");
        phone.ns.sh("ping", &["-c", "1", "-W", "5", UP4]);
        // It has left the session that it was started in, and so its terminal.
        let pid = status["pid"].as_u64().expect("pid");
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
        let fields: Vec<&str> = stat
            .rsplit(") ")
            .next()
            .expect("fields")
            .split(' ')
            .collect();
        assert_eq!(fields[3], pid.to_string(), "its own session: {stat}");
        phone.rvpn(&["down"]).good();
        wait_until("everything is as before", || network(&phone.ns) == before);
    }
    // What fails at once fails in the foreground, with its status.
    fs::remove_file(phone.home.join("config/home.toml")).expect("profile");
    let said = phone.rvpn(&["up", "-d"]);
    assert_eq!(said.code, 78, "{said:?}");
}

#[test]
fn cli_modes_without_rights_nothing_is_tried() {
    if !many_uids() {
        // Root of a namespace of one's own is the only user here.
        return;
    }
    let Scene { fake, phone, .. } = &scene(&json!({}));
    let base = fake.words(phone);
    let words: Vec<&str> = base.iter().map(String::as_str).collect();
    let mut up = phone.command(&[&["up"], &words[..]].concat());
    let out = phone.ns.run(|| {
        become_user(65_030);
        up.output().expect("rvpn")
    });
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(77), "{said}");
    assert!(said.contains("sudo rvpn up"), "{said}");
    assert_eq!(fake.heard().connections, 0);
}
