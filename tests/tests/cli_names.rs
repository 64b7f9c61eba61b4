//! IPv6 and names while the gateway has IPv4 only, and the list of resolvers.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::mount::{MsFlags, mount};
use rvpn_lab::fake_gateway::{FakeGateway, Identity, welcome_with};
use rvpn_lab::machine::Machine;
use rvpn_lab::outside::{Chatter, Outside, network, try_send};
use rvpn_lab::topology::{FAR4, GW4, UP4, UP6, at};
use rvpn_lab::{Lab, wait_until};
use serde_json::json;

const LIST: &str = "/etc/resolv.conf";
/// The tunnel's resolvers.
const OURS: [&str; 2] = ["10.64.0.1", "9.9.9.9"];

struct Scene {
    lab: Lab,
    fake: FakeGateway,
    phone: Machine,
}

/// A gateway that knows no IPv6.
fn scene() -> Scene {
    let lab = Lab::new();
    let phone = Machine::new(&lab, "phone", 10);
    let said = welcome_with(&json!({"dns": OURS}));
    let fake = FakeGateway::start(&lab.gw, &at(GW4, 443), Identity::alone(GW4), said);
    Scene { lab, fake, phone }
}

fn names_ours() -> bool {
    let text = fs::read_to_string(LIST).unwrap_or_default();
    let servers = text.lines().filter_map(|l| l.strip_prefix("nameserver "));
    servers.eq(OURS)
}

/// Looks a name up as every program does, for as long as the closure runs.
fn look_up(phone: &Machine, name: &str, during: impl FnOnce()) {
    let mut command = Command::new("getent");
    command.args(["ahosts", name]).stdout(Stdio::null());
    let _asking = phone.ns.daemon(&mut command);
    during();
}

#[test]
fn cli_06_ipv6_and_names_stay_inside_an_ipv4_tunnel() {
    let Scene { lab, fake, phone } = &scene();
    let mut outside = Outside::of(lab, &phone.ns);
    assert!(outside.probe(&phone.ns, &[UP6]) > 0);
    // Before, a name is asked on the wire.
    look_up(phone, "canary-before.test", || {
        wait_until("the question is seen on the wire", || {
            outside.holding(b"canary-before") > 0
        });
    });
    for more in [&[][..], &["--kill-switch"]] {
        let up = phone.up_with(&fake.words(phone), more);
        let chatter = Chatter::start(&phone.ns, &[UP6, UP4]);
        let canary = chatter.change();
        assert!(names_ours());
        let name = format!("canary-inside-{}", more.len());
        look_up(phone, &format!("{name}.test"), || {
            let question = fake.expect(name.as_bytes());
            // To the tunnel's first resolver, by way of the tunnel.
            assert_eq!(question[16..20], [10, 64, 0, 1]);
        });
        let targets = [UP6, "2001:4860:4860::8888", UP4, FAR4];
        assert_eq!(outside.probe(&phone.ns, &targets), 0);
        assert_eq!(outside.holding(name.as_bytes()), 0);
        assert_eq!(outside.leaked(canary), 0);
        // A program learns at once that there is no IPv6.
        let ping = ["-c", "1", "-W", "5", "2001:4860:4860::8888"];
        let said = phone.ns.output(Command::new("ping").args(ping));
        assert_eq!(said.status.code(), Some(2), "{said:?}");
        drop(chatter);
        up.down();
    }
}

/// What is at the path: a link's target, or content and mode.
fn what(path: &Path) -> String {
    match fs::read_link(path) {
        Ok(to) => format!("link to {}", to.display()),
        Err(_) => match fs::read(path) {
            Ok(content) => match fs::metadata(path) {
                Ok(meta) => {
                    let mode = meta.permissions().mode();
                    format!("{mode:o} {}", String::from_utf8_lossy(&content))
                }
                Err(error) => format!("{:?}", error.kind()),
            },
            Err(error) => format!("{:?}", error.kind()),
        },
    }
}

#[test]
fn cli_06_the_list_of_resolvers_comes_back_whatever_it_was() {
    let Scene { lab, fake, phone } = &scene();
    let list = Path::new(LIST);
    let other = lab.dir.join("stub.conf");
    let put = |how: &str| {
        let _old = fs::remove_file(list);
        match how {
            "nothing" => {}
            "a closed file" => {
                fs::write(list, b"nameserver 1.1.1.1\n\xfe\xff").expect("file");
                fs::set_permissions(list, fs::Permissions::from_mode(0o640)).expect("mode");
            }
            "a link" => {
                fs::write(&other, "nameserver 1.1.1.3\n").expect("file");
                symlink(&other, list).expect("link");
            }
            "a link to nothing" => {
                fs::remove_file(&other).expect("file");
                symlink(&other, list).expect("link");
            }
            _ => {
                fs::write(list, "").expect("file");
                fs::write(&other, "nameserver 1.1.1.3\nsearch lan\n").expect("file");
                let none = None::<&str>;
                mount(Some(&other), list, none, MsFlags::MS_BIND, none).expect("mount");
            }
        }
    };
    for how in [
        "nothing",
        "a closed file",
        "a link",
        "a link to nothing",
        "a mount point",
    ] {
        put(how);
        let (before, others) = (what(list), what(&other));
        let up = phone.up_with(&fake.words(phone), &[]);
        assert!(names_ours(), "{how}");
        if how.starts_with("a link") {
            assert_eq!(what(&other), others, "what the link leads to is another's");
        }
        up.down();
        assert_eq!(what(list), before, "{how}");
        assert_eq!(what(&other), others, "{how}");
        // And after a death.
        let mut up = phone.up_with(&fake.words(phone), &[]);
        up.kill();
        eprintln!("{how}");
        wait_until("it is as before", || what(list) == before);
        wait_until("nothing is left to mend", || {
            phone.status()["left-behind"] == false
        });
        assert_eq!(what(&other), others, "{how}");
    }
}

/// A list that somebody changed in the meantime is theirs.
#[test]
fn cli_06_a_newer_list_of_resolvers_is_left_alone() {
    let Scene { fake, phone, .. } = &scene();
    let before = network(&phone.ns);
    let up = phone.up_with(&fake.words(phone), &[]);
    fs::write(LIST, "nameserver 1.1.1.3\n").expect("list");
    up.down();
    assert_eq!(fs::read(LIST).expect("list"), b"nameserver 1.1.1.3\n");
    assert_eq!(network(&phone.ns), before);
}

/// Where IPv6 is switched off, a gateway that has it changes nothing.
#[test]
fn cli_06_a_machine_without_ipv6_stays_without() {
    let Scene { lab, fake, phone } = &scene();
    for device in ["all", "default"] {
        let name = format!("net/ipv6/conf/{device}/disable_ipv6");
        phone.ns.sysctl(&name, "1");
    }
    let before = network(&phone.ns);
    let mut outside = Outside::of(lab, &phone.ns);
    let six = json!({"address": "fd52:5650:1::1", "peer": "fd52:5650:1::"});
    fake.greet(welcome_with(&json!({"dns": OURS, "v6": six})));
    for more in [&[][..], &["--kill-switch"]] {
        let up = phone.up_with(&fake.words(phone), more);
        let inside = try_send(&phone.ns, FAR4);
        fake.expect(&inside.0);
        // Switched on later, by whomever, it has nowhere to go.
        phone.ns.sysctl("net/ipv6/conf/wan0/disable_ipv6", "0");
        phone.ns.ip("addr add 2606:4700:4700::10/64 dev wan0 nodad");
        let targets = [FAR4, UP6];
        assert_eq!(outside.probe_over(&phone.ns, &targets, &[UP4]), 0);
        phone.ns.sysctl("net/ipv6/conf/wan0/disable_ipv6", "1");
        up.down();
        assert_eq!(network(&phone.ns), before);
    }
}

/// Where a service manages the list, it is told of the tunnel and its file is
/// left alone. The service is played by a program that writes down what it is asked.
#[test]
fn cli_06_a_service_that_manages_the_list_is_told() {
    let Scene { lab, fake, phone } = &scene();
    let service = Path::new("/run/systemd/resolve");
    fs::create_dir_all(service).expect("directory");
    fs::write(service.join("io.systemd.Resolve"), "").expect("its socket");
    fs::write(service.join("stub-resolv.conf"), "nameserver 127.0.0.53\n").expect("its list");
    fs::remove_file(LIST).expect("list");
    symlink("../run/systemd/resolve/stub-resolv.conf", LIST).expect("link");
    let programs = lab.dir.join("programs");
    fs::create_dir(&programs).expect("directory");
    let program = programs.join("resolvectl");
    let script = format!("#!/bin/sh\necho \"$@\" >>{}/asked\n", service.display());
    fs::write(&program, script).expect("program");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("mode");
    let layers = format!("lowerdir={}:/usr/bin", programs.display());
    let overlay = Some("overlay");
    mount(
        overlay,
        "/usr/bin",
        overlay,
        MsFlags::empty(),
        Some(layers.as_str()),
    )
    .expect("overlay");

    let before = network(&phone.ns);
    let up = phone.up_with(&fake.words(phone), &[]);
    let asked = fs::read_to_string(service.join("asked")).expect("it was asked");
    let servers = OURS.join(" ");
    assert_eq!(
        asked,
        format!("dns rvpn0 {servers}\ndomain rvpn0 ~.\ndefault-route rvpn0 yes\n")
    );
    up.down();
    assert_eq!(network(&phone.ns), before);
    let link = fs::read_link(LIST).expect("still a link");
    assert!(
        link.ends_with("systemd/resolve/stub-resolv.conf"),
        "{link:?}"
    );
}
