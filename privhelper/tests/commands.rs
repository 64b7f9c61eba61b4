//! What an administrator types, and what is there afterwards.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use rvpn_ipc::{ClientError, Key, Kind, Status};
use rvpn_lab::helper::{bin, give};
use rvpn_lab::read_back::devices;
use rvpn_lab::topology::many_uids;
use rvpn_lab::{Helper, Lab, Tunnel, wait_until};
use serde_json::{Value, json};

/// Everything the helper may change, as tools other than ours show it, line by line,
/// once the kernel has seen addresses and carriers settle.
fn host(lab: &Lab) -> BTreeSet<String> {
    wait_until("the links have settled", || {
        let (addresses, links) = (lab.gw.ip("-o addr"), lab.gw.ip("-o link"));
        let pool = |l: &str| l.contains(": rv") && !l.contains("NO-CARRIER");
        !addresses.contains("tentative") && !links.lines().any(pool)
    });
    let mut lines = BTreeSet::new();
    lab.gw
        .run(|| settings(Path::new("/proc/sys/net"), &mut lines));
    for words in [
        "-o addr",
        "-o link",
        "-4 route show table all",
        "-6 route show table all",
    ] {
        lines.extend(lab.gw.ip(words).lines().map(str::to_owned));
    }
    let rules = lab.gw.sh("nft", &["-a", "list", "ruleset"]);
    lines.extend(rules.lines().map(str::to_owned));
    lines
}

fn settings(dir: &Path, into: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        // This one counts; nobody sets it.
        if path.is_dir() {
            settings(&path, into);
        } else if let Ok(value) = fs::read_to_string(&path)
            && !path.ends_with("nf_conntrack_count")
        {
            into.insert(format!("{} = {}", path.display(), value.trim_end()));
        }
    }
}

#[track_caller]
fn same(now: &BTreeSet<String>, then: &BTreeSet<String>) {
    let differences: Vec<_> = now.symmetric_difference(then).collect();
    assert!(differences.is_empty(), "{differences:#?}");
}

fn status(lab: &Lab, helper: &Helper) -> Value {
    let out = lab.gw.output(helper.command("status").arg("--json"));
    assert!(out.status.success(), "{out:?}");
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {out:?}"))
}

#[test]
fn help_version_and_usage() {
    let run = |words: &[&str]| {
        let out = Command::new(bin("rvpn-privhelper"))
            .args(words)
            .output()
            .unwrap();
        (
            out.status.code(),
            String::from_utf8(out.stdout).unwrap(),
            String::from_utf8(out.stderr).unwrap(),
        )
    };
    for words in [["--help"], ["-h"]] {
        let (code, out, _) = run(&words);
        assert_eq!(code, Some(0));
        for verb in ["provision", "serve", "status", "check", "teardown"] {
            assert!(out.contains(verb), "{verb} is not in {out}");
        }
    }
    let (code, out, _) = run(&["--version"]);
    assert_eq!(
        (code, out.as_str()),
        (
            Some(0),
            concat!("rvpn-privhelper ", env!("CARGO_PKG_VERSION"), "\n")
        )
    );
    for wrong in [
        &["remove"][..],
        &["check", "serve"],
        &["check", "--json"],
        &["--config"],
    ] {
        let (code, out, err) = run(wrong);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{wrong:?}");
        assert!(err.contains("usage: rvpn-privhelper"), "{wrong:?}: {err}");
    }
    let binary = std::ffi::OsStr::from_bytes(b"\xff\xfe");
    let out = Command::new(bin("rvpn-privhelper"))
        .arg(binary)
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    let (code, _, err) = run(&["check", "--config", "/nonexistent/privhelper.conf"]);
    assert_eq!(code, Some(78));
    assert!(
        err.contains("/nonexistent/privhelper.conf") && err.contains("--config"),
        "{err}"
    );
}

#[test]
fn provision_twice_and_teardown_leaves_the_host_as_found() {
    let lab = Lab::new();
    let helper = Helper::prepared(&lab, "");
    let found = host(&lab);
    let (code, text) = helper.run(&lab.gw, "provision");
    assert!(
        code == 0 && text.contains("4 devices (4 new)"),
        "{code} {text}"
    );
    let made = host(&lab);
    assert_ne!(made, found);
    let (code, text) = helper.run(&lab.gw, "provision");
    assert!(
        code == 0 && text.contains("4 devices (0 new)"),
        "{code} {text}"
    );
    same(&host(&lab), &made);

    let (code, text) = helper.run(&lab.gw, "teardown");
    assert!(
        code == 0 && text.contains("removed 4 devices"),
        "{code} {text}"
    );
    same(&host(&lab), &found);
    assert!(!helper.socket.exists());
    let (code, text) = helper.run(&lab.gw, "teardown");
    assert!(
        code == 0 && text.contains("removed 0 devices"),
        "{code} {text}"
    );
    same(&host(&lab), &found);
}

#[test]
fn a_value_changed_after_us_is_not_put_back() {
    let lab = Lab::new();
    let helper = Helper::prepared(&lab, "");
    let name = "net/ipv4/conf/wan0/arp_announce";
    assert_eq!(helper.run(&lab.gw, "provision").0, 0);
    assert_eq!(lab.gw.sysctl_get(name), "2");
    lab.gw.sysctl(name, "1");
    assert_eq!(helper.run(&lab.gw, "teardown").0, 0);
    assert_eq!(lab.gw.sysctl_get(name), "1");
    assert_eq!(lab.gw.sysctl_get("net/ipv4/conf/wan0/forwarding"), "0");
}

#[test]
fn status_tells_what_the_kernel_holds() {
    let lab = Lab::new();
    let mut helper = Helper::prepared(&lab, "linger = 60\n");
    let before = status(&lab, &helper);
    assert_eq!(
        before,
        json!({"devices": 0, "free": 0, "leased": 0, "unsound": 0, "foreign": 0,
               "rules": 0, "uplinks": ["wan0"], "serving": false})
    );
    helper.start(&lab.gw);
    let mut client = helper.connect();
    let lease = Tunnel::acquire(&mut client, 1);
    let log = helper.log();
    let now = status(&lab, &helper);
    for (field, value) in [
        ("devices", json!(4)),
        ("free", json!(3)),
        ("leased", json!(1)),
        ("unsound", json!(0)),
        ("serving", json!(true)),
    ] {
        assert_eq!(now[field], value, "{field}");
    }
    assert!(now["rules"].as_u64() > Some(0), "{now}");
    assert_eq!(helper.log(), log, "to look is not to disturb");
    // The helper's death changes only that nobody serves.
    helper.kill();
    lab.gw.ip("link set rv3 mtu 1400");
    let after = status(&lab, &helper);
    for (field, value) in [
        ("leased", json!(1)),
        ("unsound", json!(1)),
        ("serving", json!(false)),
    ] {
        assert_eq!(after[field], value, "{field}");
    }
    let (code, text) = helper.run(&lab.gw, "status");
    assert_eq!(code, 0);
    for part in [
        "4 devices: 3 free, 1 with a lease, 1 not as made",
        "uplinks: wan0",
        "no helper is serving",
    ] {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
    drop(lease);
}

#[test]
fn check_names_every_finding_and_changes_nothing() {
    let lab = Lab::new();
    let helper = Helper::prepared(&lab, "");
    let found = host(&lab);
    let (code, text) = helper.run(&lab.gw, "check");
    assert_eq!(code, 0, "{text}");
    let good = text.lines().filter(|l| l.starts_with("good ")).count();
    assert!(good >= 5 && !text.contains("wrong "), "{text}");
    assert!(text.contains("16 clients x 1024 flows = 16384"), "{text}");

    let busy = lab.gw.tcp("0.0.0.0:20443");
    lab.gw.ip("route add 10.77.0.0/16 dev lo");
    lab.gw.sysctl("net/ipv4/conf/wan0/route_localnet", "1");
    let (code, text) = helper.run(&lab.gw, "check");
    assert_eq!(code, 78, "{text}");
    for part in [
        "wrong    nat-range = 16384-32767 contains port 20443",
        "wrong    10.64.0.0/10 overlaps 10.77.0.0/16",
        "wrong    net/ipv4/conf/wan0/route_localnet = 1",
        "3 of these must be mended first",
    ] {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
    let (code, _) = helper.run(&lab.gw, "serve");
    assert_eq!(code, 78);
    drop(busy);
    lab.gw.ip("route del 10.77.0.0/16 dev lo");
    lab.gw.sysctl("net/ipv4/conf/wan0/route_localnet", "0");
    same(&host(&lab), &found);
}

#[test]
fn a_configuration_that_is_not_roots_alone_is_refused() {
    let lab = Lab::new();
    let helper = Helper::prepared(&lab, "");
    let refused = |part: &str| {
        let (code, text) = helper.run(&lab.gw, "check");
        assert!(
            code == 78 && text.contains(part),
            "'{part}' is not in: {code} {text}"
        );
    };
    fs::set_permissions(&helper.config, fs::Permissions::from_mode(0o664)).unwrap();
    refused("others may write it: chmod go-w");
    fs::set_permissions(&helper.config, fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(helper.run(&lab.gw, "check").0, 0);
    if many_uids() {
        give(&helper.config, 65_030);
        refused("owned by uid 65030, must be root's");
        give(&helper.config, 0);
        // One user for both would undo the split, and root is nobody's own.
        let text = fs::read_to_string(&helper.config).unwrap();
        for uid in ["65020", "0"] {
            let wrong = text.replace("helper-user = 65010", &format!("helper-user = {uid}"));
            fs::write(&helper.config, wrong).unwrap();
            let expected = format!("helper-user is uid {uid} and gateway-user is uid 65020");
            refused(&expected);
            let (code, text) = helper.run(&lab.gw, "serve");
            assert!(code == 78 && text.contains(&expected), "{code} {text}");
        }
    }
    fs::write(&helper.config, "linger = 60\nslots 4\n").unwrap();
    refused("line 2: 'slots 4' is not 'key = value'");
    fs::remove_file(&helper.config).unwrap();
    refused("privhelper.conf.example");
}

#[test]
fn the_pool_grows_ahead_of_demand_and_ends_at_its_limit() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "slots = 4\ngrow = 4\nmax-slots = 12\n");
    let mut client = helper.connect();
    let mut held = Vec::new();
    for key in 1..=12 {
        let key = Key([key; 16]);
        wait_until("a slot is free", || {
            match client.acquire(key, Kind::Both, 0) {
                Ok(lease) => held.push(Tunnel::new(key, lease)),
                Err(ClientError::Refused(r)) if r.status == Status::NoCapacity => return false,
                Err(e) => panic!("{e}"),
            }
            true
        });
        // Four more are on their way as soon as fewer than two are free.
        wait_until("the pool has grown", || {
            let d = client.describe().unwrap();
            d.free >= 2 || d.slots == 12
        });
    }
    assert_eq!(devices(&lab.gw).len(), 12);
    let Err(ClientError::Refused(full)) = client.acquire(Key([13; 16]), Kind::Both, 0) else {
        panic!("a thirteenth lease of twelve");
    };
    assert_eq!(full.status, Status::NoCapacity);
    assert!(full.retry_after_ms > 0);
    let mut slots: Vec<u32> = held.iter().map(|t| t.reply.slot).collect();
    slots.sort_unstable();
    assert_eq!(slots, (0..12).collect::<Vec<_>>());
}

#[test]
fn spf_28_two_owners_of_one_address_are_refused_at_start() {
    let lab = Lab::new();
    for extra in ["stream4 = 10.64.0.0/18\n", "stream6 = fd52:5650:1::/64\n"] {
        let helper = Helper::prepared(&lab, extra);
        let found = host(&lab);
        let (code, text) = helper.run(&lab.gw, "serve");
        assert_eq!(code, 78, "{extra}: {text}");
        assert!(text.contains("overlap"), "{extra}: {text}");
        same(&host(&lab), &found);
    }
}
