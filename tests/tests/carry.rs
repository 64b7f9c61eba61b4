//! Long transfers through `rvpn up`, and what happens around them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rvpn_lab::bulk::{Way, size, start};
use rvpn_lab::gateway::Gateway;
use rvpn_lab::machine::{Machine, operator};
use rvpn_lab::topology::{UP4, UP6};
use rvpn_lab::tunnel_client::{Target, on};
use rvpn_lab::{Helper, Lab, wait_until};
use serde_json::Value;

/// Both ways in both families; the hashes at both ends are the same.
fn files_are_whole(words: &[&str]) {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    let all = [&["--no-dns"], words].concat();
    let up = phone.up(&all);
    let mut port = 9000;
    for address in [UP4, UP6] {
        for way in [Way::Upload, Way::Download] {
            port += 1;
            start(&phone.ns, &lab.up, address, port, way, size()).whole(size());
        }
    }
    // Reported once a second.
    wait_until("all of it went through the tunnel", || {
        let status = phone.status();
        let carried = |way: &str| status[way]["payload"].as_u64().expect("a number");
        carried("outbound") > 2 * size() && carried("inbound") > 2 * size()
    });
    up.down();
}

#[test]
fn a_file_is_whole_with_super_packets() {
    files_are_whole(&[]);
}

#[test]
fn a_file_is_whole_without_offload() {
    files_are_whole(&["--no-offload"]);
}

#[test]
fn a_file_is_whole_with_an_mtu_of_1280() {
    files_are_whole(&["--mtu", "1280"]);
}

#[test]
fn a_file_is_whole_with_an_mtu_of_1400_without_offload() {
    files_are_whole(&["--mtu", "1400", "--no-offload"]);
}

/// On such a road super-packets go in parts: four streams each way fill it.
#[test]
fn files_are_whole_through_a_narrow_road() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    for end in [&phone.ns, &lab.gw] {
        let words = "qdisc add dev wan0 root tbf rate 100mbit burst 64k limit 4000000";
        end.sh("tc", &words.split(' ').collect::<Vec<_>>());
    }
    let up = phone.up(&["--no-dns"]);
    let bytes = 3 << 20;
    for (address, first) in [(UP4, 9000), (UP6, 9100)] {
        for (way, port) in [(Way::Upload, first), (Way::Download, first + 50)] {
            let all: Vec<_> = (port..port + 4)
                .map(|port| start(&phone.ns, &lab.up, address, port, way, bytes))
                .collect();
            for transfer in all {
                transfer.whole(bytes);
            }
        }
    }
    up.down();
}

/// The client's cable is pulled and another plugged in, with other addresses.
#[test]
fn a_network_change_keeps_lease_and_flow() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    let up = phone.up(&["--no-dns"]);
    let before = sessions(&lab, &gateway);
    let bytes = 4 * size();
    let transfer = start(&phone.ns, &lab.up, UP4, 9000, Way::Download, bytes);
    wait_until("the download runs", || transfer.progress.bytes() > 1 << 20);

    lab.unplug(&phone.ns);
    // Nothing moves while there is no network.
    let mut seen = transfer.progress.bytes();
    wait_until("the download stands", || {
        let now = transfer.progress.bytes();
        std::mem::replace(&mut seen, now) == now
    });
    lab.plug(&phone.ns, 11);
    let back = Instant::now();
    wait_until("the download goes on", || transfer.progress.bytes() > seen);
    let pause = back.elapsed();
    assert!(
        pause < Duration::from_secs(2),
        "{pause:?} after the network was back"
    );
    transfer.whole(bytes);

    let after = sessions(&lab, &gateway);
    assert_eq!(after["slot"], before["slot"], "the same lease");
    assert!(
        after["peer"]
            .as_str()
            .is_some_and(|p| p.contains("1.1.1.11")),
        "{after}"
    );
    assert_eq!(phone.status()["reconnects"], 1);
    assert!(up.log().contains("on the same lease"), "{}", up.log());
    up.down();
}

fn sessions(lab: &Lab, gateway: &Gateway) -> Value {
    let mut found = operator(lab, gateway, &["session", "ls", "--json"]).json();
    found["sessions"][0].take()
}

/// FLT-01 with a client: nobody asks the gateway whether this is a good moment.
#[test]
fn a_killed_gateway_costs_a_download_three_seconds() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "linger = 60\n");
    let mut gateway = Gateway::start(&lab, &helper, "");
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    let up = phone.up(&["--no-dns"]);
    let slot = sessions(&lab, &gateway)["slot"].clone();
    let bytes = 8 * size();
    let transfer = start(&phone.ns, &lab.up, UP4, 9000, Way::Download, bytes);
    wait_until("the download runs", || {
        transfer.progress.bytes() > bytes / 8
    });

    gateway.kill();
    let dead = Instant::now();
    gateway.restart();
    let listening = dead.elapsed();
    let stood = transfer.progress.bytes();
    wait_until("the client is back", || phone.status()["reconnects"] == 1);
    let resumed = dead.elapsed();
    wait_until("the download goes on", || transfer.progress.bytes() > stood);
    assert!(
        listening < Duration::from_secs(1),
        "listening after {listening:?}"
    );
    assert!(
        resumed < listening + Duration::from_secs(3),
        "resumed after {resumed:?}"
    );
    assert!(up.log().contains("on the same lease"), "{}", up.log());
    transfer.whole(bytes);
    assert_eq!(sessions(&lab, &gateway)["slot"], slot);
    up.down();

    // Whatever was carried is billed, but for what one message can hold, and
    // never more. The client's own count is of whole seconds, so it is asked
    // for the ledger's two rows and the bytes that arrived.
    let mut billed = 0;
    wait_until("both sessions are in the ledger, ended", || {
        let usage = operator(&lab, &gateway, &["usage", "--sessions", "--json"]).json();
        let rows = usage["usage"].as_array().cloned().unwrap_or_default();
        billed = rows
            .iter()
            .filter_map(|r| r["inbound"]["payload"].as_u64())
            .sum();
        rows.len() == 2 && rows.iter().all(|r| r["ended-ms"].is_u64())
    });
    assert!(billed > bytes, "{billed} of {bytes} and headers");
}

/// A planned restart, with the port held by the service manager: whoever comes
/// meanwhile waits for an answer, and gets one.
#[test]
fn a_planned_restart_keeps_the_lease_and_refuses_nobody() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "linger = 60\n");
    let mut gateway = Gateway::prepared(&lab, &helper, "");
    gateway.hold_port(&lab);
    gateway.launch_ready();
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    let up = phone.up(&["--no-dns"]);
    let slot = sessions(&lab, &gateway)["slot"].clone();
    let bytes = 4 * size();
    let transfer = start(&phone.ns, &lab.up, UP6, 9000, Way::Upload, bytes);
    wait_until("the upload runs", || transfer.progress.bytes() > bytes / 8);
    let other = lab.client("other", 20);
    let over = AtomicBool::new(false);
    let (over, target) = (&over, Target::of(&gateway));
    let (came, left) = std::thread::scope(|s| {
        let visitors = s.spawn(|| {
            let (mut came, mut left) = (0, Vec::new());
            // From before the restart until after it.
            while !over.load(Ordering::Relaxed) || came < 10 {
                let answered = on(&other, async || target.connect().await.map(drop));
                left.extend(answered.err().map(|e| (came, e)));
                came += 1;
            }
            (came, left)
        });
        gateway.restart();
        wait_until("the client is back", || phone.status()["reconnects"] == 1);
        over.store(true, Ordering::Relaxed);
        visitors.join().expect("visitors")
    });
    assert!(left.is_empty(), "of {came} visitors, unanswered: {left:?}");
    transfer.whole(bytes);
    assert_eq!(sessions(&lab, &gateway)["slot"], slot);
    assert!(
        up.log().contains("(1012)"),
        "the client was told: {}",
        up.log()
    );
    up.down();
}
