//! What must not move a tunnel that is up.

use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use rvpn_lab::gateway::Gateway;
use rvpn_lab::helper::as_user;
use rvpn_lab::machine::Machine;
use rvpn_lab::topology::{UP4, UP6, many_uids};
use rvpn_lab::{Helper, Lab, wait_until};

fn scene() -> (Lab, Helper, Gateway, Machine) {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    (lab, helper, gateway, phone)
}

/// As a network service does that thinks all rules are its own.
#[test]
fn rules_that_somebody_removes_come_back() {
    let (_lab, _helper, _gateway, phone) = scene();
    for words in [&["--no-dns"][..], &["--no-dns", "--kill-switch"]] {
        let up = phone.up(words);
        let rules = || (phone.ns.ip("rule"), phone.ns.ip("-6 rule"));
        let count = |(v4, v6): (String, String)| (v4.lines().count(), v6.lines().count());
        let before = count(rules());
        for family in ["", "-6 "] {
            // It is told of what was not there any more: the client is at work as well.
            wait_until("the rules are gone", || {
                let mut flush = Command::new("ip");
                flush
                    .args(family.split_whitespace())
                    .args(["rule", "flush"]);
                phone.ns.output(&mut flush).status.success()
            });
            phone
                .ns
                .ip(&format!("{family}rule add pref 32766 lookup main"));
        }
        wait_until("the rules are back", || {
            // Without the one for the default table, which nobody put back.
            let (v4, v6) = count(rules());
            (v4 + 1, v6) == before || (v4, v6) == before
        });
        for host in [UP4, UP6] {
            phone
                .ns
                .sh("ping", &["-c", "2", "-i", "0.1", "-W", "2", host]);
        }
        let carried = || phone.status()["outbound"]["packets"].as_u64();
        wait_until("they went through the tunnel", || carried() >= Some(4));
        up.down();
        phone.ns.ip("rule add pref 32767 lookup default");
    }
}

/// Everybody may ask how things are.
#[test]
fn asking_too_much_ends_nothing() {
    let (_lab, _helper, _gateway, phone) = scene();
    let up = phone.up(&["--no-dns"]);
    let socket = phone.home.join("run/control.sock");
    let stranger = if many_uids() { 65_534 } else { 0 };
    let held: Vec<_> = as_user(stranger, || {
        // More than the process has descriptors for.
        let ask = |_| UnixStream::connect(&socket);
        (0..1100).map_while(|n| ask(n).ok()).collect()
    });
    assert!(held.len() > 16, "{} connections", held.len());
    phone
        .ns
        .sh("ping", &["-c", "3", "-i", "0.1", "-W", "2", UP4]);
    drop(held);
    assert_eq!(phone.status()["state"], "connected");
    assert_eq!(phone.status()["reconnects"], 0);
    up.down();
}

/// A key that is made where one is, by a name without a directory.
#[test]
fn a_key_is_made_in_the_directory_where_one_is() {
    let (_lab, _helper, _gateway, phone) = scene();
    let mut command = phone.command(&["token", "key", "--out", "ops.key"]);
    let made = phone.ns.output(command.current_dir(&phone.home));
    assert!(made.status.success(), "{made:?}");
    for name in ["ops.key", "ops.pub.pem"] {
        assert!(phone.home.join(name).exists(), "{name}");
    }
}

/// Under sudo the files of a home stay its owner's, and no directory that was
/// there becomes somebody else's.
#[test]
fn under_sudo_files_are_made_by_the_user_who_called_it() {
    use std::os::unix::fs::MetadataExt as _;
    if !many_uids() {
        // There is nobody else; the suite of root runs this.
        return;
    }
    let (lab, _helper, _gateway, phone) = scene();
    let shared = lab.dir.join("shared");
    std::fs::create_dir(&shared).expect("directory");
    let key = shared.join("ops.key").display().to_string();
    let mut command = phone.command(&["token", "key", "--out", &key]);
    command.env("SUDO_UID", "65534").env("SUDO_GID", "65534");
    let refused = phone.ns.output(&mut command);
    assert!(!refused.status.success(), "it is root's directory");
    let owner = std::fs::metadata(&shared).expect("directory").uid();
    assert_eq!(owner, 0, "and stays it");
    rvpn_lab::helper::give(&shared, 65_534);
    let mut command = phone.command(&["token", "key", "--out", &key]);
    command.env("SUDO_UID", "65534").env("SUDO_GID", "65534");
    command.stdout(Stdio::null());
    let made = phone.ns.output(&mut command);
    assert!(made.status.success(), "{made:?}");
    assert_eq!(std::fs::metadata(&key).expect("key").uid(), 65_534);
}
