//! The gateway and the clock on the wall.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use rvpn_lab::gateway::Gateway;
use rvpn_lab::helper::give;
use rvpn_lab::machine::Machine;
use rvpn_lab::scene::Scene;
use rvpn_lab::topology::{GW4, UP4};
use rvpn_lab::tunnel_client::{Event, Speech, on};
use rvpn_lab::{Helper, Lab};
use rvpn_proto::control::{Message as Control, Resolve, Stage};
use tokio_tungstenite::tungstenite::Message;

/// Moves the gateway's clock, and nobody else's, by so many seconds.
fn set(gateway: &Gateway, offset: i64) {
    fs::write(clock(gateway), format!("{offset:+}\n")).expect("clock");
}

/// Where the cage lets it be read.
fn clock(gateway: &Gateway) -> PathBuf {
    gateway.dir.join("state/clock")
}

fn library() -> String {
    let found = Command::new("find")
        .args(["/usr/lib", "-name", "libfaketime.so.1"])
        .output()
        .expect("find");
    let text = String::from_utf8(found.stdout).expect("text");
    let first = text.lines().next();
    first
        .expect("libfaketime: ./dev-bin/test installs it")
        .to_owned()
}

/// A year forward, a year back, 1970 and 2038. Who is here stays; who comes is
/// judged by the clock as it stands.
#[test]
fn aut_21_a_clock_that_jumps_ends_no_session() {
    const YEAR: i64 = 365 * 86_400;
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let mut gateway = Gateway::prepared(&lab, &helper, "");
    let state = gateway.dir.join("state");
    fs::create_dir(&state).expect("state");
    give(&state, helper.gateway_uid);
    set(&gateway, 0);
    gateway.environment(&[
        ("LD_PRELOAD", library().as_str()),
        (
            "FAKETIME_TIMESTAMP_FILE",
            &clock(&gateway).display().to_string(),
        ),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ]);
    gateway.launch_ready();
    let phone = Machine::joined(&lab, &gateway, "phone", 10);
    let up = phone.up(&["--no-dns"]);
    let now = rvpn_lab::token::now() as i64;
    for offset in [YEAR, -YEAR, -now + 1, 2_147_483_700 - now] {
        set(&gateway, offset);
        // Well into the second after the jump, in which timers would fire.
        phone
            .ns
            .sh("ping", &["-c", "8", "-i", "0.2", "-W", "2", UP4]);
        let refused = phone.rvpn(&["ping", UP4, "-c", "1"]);
        assert_eq!(refused.code, 2, "{offset}: {refused:?}");
        assert!(refused.err.contains("clock"), "{offset}: {}", refused.err);
    }
    set(&gateway, 0);
    assert_eq!(phone.status()["reconnects"], 0, "{}", up.log());
    up.down();
    let again = phone.rvpn(&["ping", UP4, "-c", "1"]);
    assert_eq!(again.code, 0, "{GW4} with its clock right again: {again:?}");
}

/// Names are looked up for clients, but neither ours nor our neighbours', and
/// not by the thousand.
#[test]
fn spf_27_names_give_public_addresses_only_and_not_too_many() {
    let scene = Scene::default();
    on(&scene.phone, async || {
        let native = Speech::Native { offload: false };
        let mut session = scene.session(native, "alice").await;
        let ask = |id: u32, name: &str| {
            let question = Control::Resolve(Resolve {
                id,
                name: name.to_owned(),
            });
            Message::text(question.to_text(Stage::Session).expect("a question"))
        };
        // What the gateway's own machine calls itself, and its loopback.
        for (id, name) in [(1, "localhost"), (2, "ip6-localhost"), (3, "127.0.0.1")] {
            session.tx.message(ask(id, name)).await;
            let Event::Text(text) = session.rx.event().await else {
                panic!("{name}: no answer");
            };
            let Ok(Control::Resolved(found)) = Control::parse(&text, Stage::Session) else {
                panic!("{name}: {text}");
            };
            assert_eq!(found.id, id);
            assert!(
                found.addresses.is_empty() && found.error.is_some(),
                "{name}: {text}"
            );
        }
        for id in 0..1000 {
            if session
                .tx
                .try_message(ask(id, "flood.example"))
                .await
                .is_err()
            {
                break;
            }
        }
        let closed = session.rx.closed().await;
        assert_eq!(closed.code, 1008, "{closed:?}");
        assert!(closed.reason.contains("too many"), "{closed:?}");
    });
}
