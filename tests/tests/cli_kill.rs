//! Killed clients, and the moments before and after a tunnel.

use std::fs;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rvpn_lab::gateway::Gateway;
use rvpn_lab::machine::{Machine, RESOLVERS, operator};
use rvpn_lab::outside::{Chatter, Outside, network};
use rvpn_lab::topology::{FAR4, UP6};
use rvpn_lab::{Helper, Lab, wait_until};

const TARGETS: [&str; 2] = [FAR4, UP6];

struct Scene {
    lab: Lab,
    _helper: Helper,
    gateway: Gateway,
    phone: Machine,
}

fn scene() -> Scene {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "linger = 5\n");
    let gateway = Gateway::start(&lab, &helper, "[session]\ndns = [\"9.9.9.9\"]\n");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    phone.ns.sysctl("net/ipv4/conf/wan0/rp_filter", "1");
    Scene {
        lab,
        _helper: helper,
        gateway,
        phone,
    }
}

fn kill_9(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("pid"));
    kill(pid, Signal::SIGKILL).expect("kill");
}

/// All that a client changes on a machine.
fn machine(phone: &Machine) -> (String, Vec<u8>) {
    let resolvers = fs::read("/etc/resolv.conf").expect("resolv.conf");
    (network(&phone.ns), resolvers)
}

#[track_caller]
fn device_gone(phone: &Machine) {
    wait_until("the device is gone", || {
        !phone.ns.ip("-br link").contains("rvpn0")
    });
}

#[test]
fn cli_04_killed_with_a_kill_switch_nothing_leaves_until_it_is_repaired() {
    let Scene { lab, phone, .. } = &scene();
    let mut outside = Outside::of(lab, &phone.ns);
    let before = machine(phone);
    assert_eq!(before.1, RESOLVERS);
    let mut up = phone.up(&["--kill-switch"]);
    assert_ne!(before.1, machine(phone).1, "the tunnel's resolvers");
    let chatter = Chatter::start(&phone.ns, &TARGETS);
    let after = chatter.change();
    up.kill();
    device_gone(phone);
    // What the unprivileged half does last, it does now.
    assert_eq!(outside.probe(&phone.ns, &TARGETS), 0);
    assert_eq!(outside.leaked(after), 0);
    assert_eq!(phone.status()["left-behind"], true);
    let said = phone.rvpn(&["down"]);
    assert_eq!(said.code, 69, "{said:?}");
    assert!(said.err.contains("--repair"), "{said:?}");
    assert_eq!(outside.probe(&phone.ns, &TARGETS), 0);
    assert_eq!(outside.leaked(after), 0);
    drop(chatter);
    phone.rvpn(&["down", "--repair"]).good();
    assert_eq!(machine(phone), before);
    assert_eq!(phone.status()["left-behind"], false);
    assert!(outside.probe(&phone.ns, &TARGETS) > 0, "it is open again");
}

#[test]
fn cli_04_killed_without_a_kill_switch_everything_is_as_before() {
    let Scene { phone, .. } = &scene();
    let before = machine(phone);
    for _ in 0..3 {
        let mut up = phone.up(&[]);
        assert_ne!(machine(phone), before);
        up.kill();
        wait_until("everything is as before", || machine(phone) == before);
        wait_until("nothing is left to mend", || {
            phone.status()["left-behind"] == false
        });
    }
    // Together with its mender it cannot be mended, only repaired.
    let mut up = phone.up(&[]);
    kill_9(up.part("__mend"));
    up.kill();
    device_gone(phone);
    assert_ne!(machine(phone), before);
    phone.rvpn(&["down", "--repair"]).good();
    assert_eq!(machine(phone), before);
}

#[test]
fn cli_04_a_killed_half_is_started_again_on_the_same_lease() {
    let Scene {
        lab,
        gateway,
        phone,
        ..
    } = &scene();
    let mut outside = Outside::of(lab, &phone.ns);
    let up = phone.up(&["--no-dns"]);
    let index = phone.ns.ip("-o link show rvpn0");
    let slots = || -> Vec<serde_json::Value> {
        let sessions = gateway.sessions();
        sessions.iter().map(|s| s["slot"].clone()).collect()
    };
    let slot = slots();
    let chatter = Chatter::start(&phone.ns, &TARGETS);
    let canary = chatter.change();
    for round in 1..=5 {
        kill_9(up.half());
        wait_until("connected again", || {
            let status = phone.status();
            status["state"] == "connected" && status["reconnects"] == round
        });
        for host in TARGETS {
            phone.ns.sh("ping", &["-c", "1", "-W", "5", host]);
        }
        // Only ones that cannot even begin are given up.
        wait_until("it counts as well again", || {
            phone.status()["outbound"]["packets"].as_u64() > Some(0)
        });
        assert_eq!(phone.ns.ip("-o link show rvpn0"), index, "the device stays");
        wait_until("one session, on the same lease", || slots() == slot);
    }
    outside.fence(&phone.ns);
    assert_eq!(outside.leaked(canary), 0);
    drop(chatter);
    up.down();
}

#[test]
fn cli_04_the_next_up_takes_over_without_a_gap() {
    let Scene { lab, phone, .. } = &scene();
    let mut outside = Outside::of(lab, &phone.ns);
    let before = machine(phone);
    let chatter = Chatter::start(&phone.ns, &TARGETS);
    let mut up = phone.up(&["--kill-switch"]);
    let canary = chatter.change();
    for _ in 0..4 {
        up.kill();
        up = phone.up(&["--kill-switch"]);
    }
    // Also one of another kind: the old one's block ends where the new one's begins.
    up.kill();
    up = phone.up(&["--kill-switch", "--bypass", "8.8.4.0/24"]);
    outside.fence(&phone.ns);
    assert_eq!(outside.leaked(canary), 0);
    drop(chatter);
    for host in TARGETS {
        phone.ns.sh("ping", &["-c", "1", "-W", "5", host]);
    }
    up.down();
    assert_eq!(machine(phone), before);
}

#[test]
fn cli_04_old_rules_go_from_their_end() {
    let Scene { lab, phone, .. } = &scene();
    let mut up = phone.up(&["--kill-switch"]);
    let seen = lab.dir.join("rules");
    let mut watch = Command::new("ip");
    watch.args(["-6", "-o", "monitor", "rule"]);
    watch.stdin(Stdio::null());
    watch.stdout(fs::File::create(&seen).expect("a file"));
    let mut watch = phone.ns.daemon(&mut watch);
    let removed = || -> Vec<u32> {
        let text = fs::read_to_string(&seen).expect("what was seen");
        let gone = text.lines().filter_map(|l| l.strip_prefix("Deleted "));
        let first = gone.filter_map(|l| l.split(':').next());
        first.filter_map(|n| n.trim().parse().ok()).collect()
    };
    // It listens when it hears of this.
    wait_until("the monitor listens", || {
        let mark = "-6 rule add pref 99 table main";
        phone.ns.ip(mark);
        phone.ns.ip(&mark.replace("add", "del"));
        removed().contains(&99)
    });
    // From each of the two places to the other.
    for _ in 0..2 {
        let before = removed().len();
        up.kill();
        device_gone(phone);
        up = phone.up(&["--kill-switch"]);
        wait_until("the old rules are seen to go", || {
            removed().len() > before + 6
        });
        let order = removed().split_off(before);
        let order: Vec<_> = order.into_iter().filter(|n| *n != 99).collect();
        // What lets root see its neighbours is behind what hides them.
        assert!(order.is_sorted_by(|a, b| a > b), "{order:?}");
    }
    watch.kill();
    up.down();
}

#[test]
fn cli_04_the_next_up_and_the_mender_do_not_meet() {
    let Scene { phone, .. } = &scene();
    let before = machine(phone);
    let mut up = phone.up(&[]);
    for _ in 0..5 {
        up.kill();
        up = phone.up(&[]);
        for host in TARGETS {
            phone.ns.sh("ping", &["-c", "1", "-W", "5", host]);
        }
    }
    up.down();
    assert_eq!(machine(phone), before);
}

/// What has begun to block: the last rule of each family is there.
fn blocks(phone: &Machine) -> bool {
    ["-4 rule", "-6 rule"]
        .iter()
        .all(|words| phone.ns.ip(words).contains("uidrange"))
}

#[test]
fn cli_05_nothing_leaves_between_the_first_rule_and_down() {
    let Scene { lab, phone, .. } = &scene();
    let mut outside = Outside::of(lab, &phone.ns);
    let before = machine(phone);
    let chatter = Chatter::start(&phone.ns, &TARGETS);
    for cycle in 0..20 {
        let open = chatter.change();
        wait_until("it is seen while nothing is up", || {
            outside.leaked(open) > 0
        });
        let mut up = phone.begin(&["--kill-switch"]);
        wait_until("it blocks", || blocks(phone));
        let blocked = chatter.change();
        up.until_connected();
        let mut inside = chatter.change();
        if cycle % 4 == 0 {
            for host in TARGETS {
                phone.ns.sh("ping", &["-c", "1", "-W", "5", host]);
            }
            outside.fence(&phone.ns);
            assert_eq!(outside.leaked(inside), 0);
            inside = chatter.change();
        }
        let _ending = chatter.change();
        up.down();
        outside.fence(&phone.ns);
        let leaked = [outside.leaked(blocked), outside.leaked(inside)];
        assert_eq!(leaked, [0, 0], "cycle {cycle}");
        outside.forget();
    }
    assert_eq!(machine(phone), before);
}

/// Without a kill switch nothing leaves while it is connected, and whatever
/// happens to the connection in the meantime.
#[test]
fn cli_05_a_lost_gateway_opens_nothing() {
    let Scene {
        lab,
        _helper,
        mut gateway,
        phone,
    } = scene();
    let mut outside = Outside::of(&lab, &phone.ns);
    let up = phone.up(&["--no-dns"]);
    let chatter = Chatter::start(&phone.ns, &TARGETS);
    let canary = chatter.change();
    gateway.kill();
    wait_until("it sees that the gateway is gone", || {
        phone.status()["state"] == "reconnecting"
    });
    assert_eq!(outside.probe(&phone.ns, &TARGETS), 0);
    gateway.restart();
    wait_until("it is connected again", || {
        phone.status()["state"] == "connected"
    });
    assert_eq!(outside.probe(&phone.ns, &TARGETS), 0);
    assert_eq!(outside.leaked(canary), 0);
    drop(chatter);
    up.down();
}

/// Sent away for good while a kill switch is on: what was protected until then
/// stays so, also from a next attempt that fails.
#[test]
fn cli_05_a_refusal_opens_nothing() {
    let Scene {
        lab,
        _helper,
        gateway,
        phone,
    } = &scene();
    let mut outside = Outside::of(lab, &phone.ns);
    let before = machine(phone);
    let mut up = phone.up(&["--kill-switch"]);
    let chatter = Chatter::start(&phone.ns, &TARGETS);
    let canary = chatter.change();
    let revoke = ["token", "revoke", "--account", "phone"];
    operator(lab, gateway, &revoke).good();
    assert_eq!(up.ended(), 77, "{}", up.log());
    assert!(up.log().contains("stays blocked"), "{}", up.log());
    assert_eq!(outside.probe(&phone.ns, &TARGETS), 0);
    let mut again = phone.begin(&["--kill-switch"]);
    assert_eq!(again.ended(), 77, "{}", again.log());
    assert!(again.log().contains("--repair"), "{}", again.log());
    assert_eq!(outside.probe(&phone.ns, &TARGETS), 0);
    assert_eq!(outside.leaked(canary), 0);
    drop(chatter);
    phone.rvpn(&["down", "--repair"]).good();
    assert_eq!(machine(phone), before);
    // One that was refused at once has protected nothing, and leaves nothing.
    let mut never = phone.begin(&["--kill-switch"]);
    assert_eq!(never.ended(), 77, "{}", never.log());
    assert_eq!(machine(phone), before);
}
