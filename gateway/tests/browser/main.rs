//! The client page in a real browser, against the real gateway and helper,
//! through TLS and the tunnel to the laboratory's internet.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod driver;
mod office;
mod parts;
mod serve;

use std::fs;

use driver::Browser;
use nix::mount::{MsFlags, mount};
use rvpn_lab::gateway::Gateway;
use rvpn_lab::token::{Signer, claims};
use rvpn_lab::topology::{GW4, GW6};
use rvpn_lab::{Helper, Lab, wait_until};
use serde_json::json;

/// What `#status` shows, as an expression.
const STATE: &str = "document.getElementById('status').dataset.state";

fn page() -> String {
    format!("https://{GW4}/rvpn/")
}

fn connect(browser: &Browser<'_>, token: &str) {
    browser.enter("token", token);
    browser.click("connect");
}

/// Pings and waits for the end.
fn ping(browser: &Browser<'_>, target: &str, count: u32, every: &str) {
    browser.enter("target", target);
    browser.enter("count", &count.to_string());
    browser.enter("interval", every);
    browser.click("go");
    browser.until("document.getElementById('summary').dataset.done === 'true'");
}

#[test]
fn the_page_turns_green_pings_through_the_tunnel_and_counts() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "linger = 60\n");
    // A name that the gateway's machine knows.
    let hosts = lab.dir.join("hosts");
    fs::write(&hosts, "1.1.1.1 one.lab\n127.0.0.1 localhost\n").unwrap();
    mount(
        Some(&hosts),
        "/etc/hosts",
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();
    let gateway = Gateway::start(&lab, &helper, "");
    let laptop = lab.client("laptop", 10);
    let browser = Browser::start(&lab, &laptop);
    browser.open(&page());
    browser.until(&format!("{STATE} === 'off'"));
    assert_eq!(browser.number("bytes-read"), 0);
    connect(&browser, &gateway.token("alice"));
    browser.until(&format!("{STATE} === 'on'"));
    let colour = browser.script(
        "return getComputedStyle(document.querySelector('#status')).backgroundColor.match(/\\d+/g).map(Number)",
    );
    let [r, g, b] = [0, 1, 2].map(|i| colour[i].as_u64().unwrap());
    assert!(g > r && g > b, "{colour} is not green");

    for (target, from) in [
        ("1.1.1.1", "1.1.1.1"),
        ("2606:4700:4700::1111", "2606:4700:4700::1111"),
        ("[2606:4700:4700:0:0::1111]", "2606:4700:4700::1111"),
        ("one.lab", "1.1.1.1"),
    ] {
        let before = [
            browser.number("bytes-read"),
            browser.number("bytes-written"),
        ];
        ping(&browser, target, 3, "0.2");
        let summary = browser.text("summary");
        assert!(
            summary.starts_with("3 sent, 3 received, 0 % lost; least "),
            "{target}: {summary}"
        );
        let line =
            browser.script("return document.querySelector('#echoes').firstChild.textContent");
        let line = line.as_str().unwrap();
        assert!(
            line.starts_with(&format!("64 bytes from {from}: seq 3, ")),
            "{line}"
        );
        // Header, record and 64 bytes of ICMP, three times each way at least.
        let least = 3 * (8 + 20 + 64);
        for (id, before) in ["bytes-read", "bytes-written"].into_iter().zip(before) {
            let moved = browser.number(id) - before;
            assert!(moved >= least, "{id}: {moved}");
        }
    }
    // What the gateway counted: 12 echoes, six of either family, one answer each.
    let row = |name: &str| {
        let cells = browser.script(&format!(
            "return [...document.querySelectorAll('#{name} td')].map((c) => Number(c.textContent.replace(/\\D/g, '')))"
        ));
        [0, 1, 2, 3].map(|i| cells[i].as_u64().unwrap())
    };
    let payload = 6 * (20 + 64) + 6 * (40 + 64);
    browser.until("document.querySelector('#inbound td').textContent === '12'");
    for name in ["outbound", "inbound"] {
        let [packets, bytes, wire, dropped] = row(name);
        assert_eq!([packets, bytes, dropped], [12, payload, 0], "{name}");
        assert!(wire > payload, "{name}");
    }

    // What does not answer is lost, and says so; what is refused is told why.
    ping(&browser, "8.8.4.4", 1, "1");
    let summary = browser.text("summary");
    assert!(
        summary.starts_with("1 sent, 0 received, 100 % lost"),
        "{summary}"
    );
    let line = browser.text("echoes");
    assert_eq!(line, "seq 1: 1.1.1.1 says: the network cannot be reached");
    // A name must not lead to the gateway's machine itself.
    ping(&browser, "localhost", 1, "1");
    let summary = browser.text("summary");
    assert!(summary.contains("no public address"), "{summary}");

    // The token is nowhere but in memory.
    let traces = browser.script(
        "return [location.href, localStorage.length, sessionStorage.length, document.cookie, \
         document.getElementById('token').value]",
    );
    assert_eq!(traces, json!([page(), 0, 0, "", ""]));
    let complaints = browser.complaints();
    assert!(complaints.is_empty(), "{complaints:?}");

    // Leaving is a goodbye: the lease does not linger.
    browser.click("disconnect");
    browser.until(&format!("{STATE} === 'off'"));
    wait_until("the client left", || gateway.log().contains("client left"));
    connect(&browser, &gateway.token("alice"));
    browser.until(&format!("{STATE} === 'on'"));
    browser.open("about:blank");
    wait_until("the page was left", || {
        gateway.log().matches("client left").count() == 2
    });
}

#[test]
fn what_is_wrong_is_said_in_words() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let mut gateway = Gateway::start(&lab, &helper, "");
    let laptop = lab.client("laptop", 10);
    let browser = Browser::start(&lab, &laptop);
    browser.open(&page());
    let mut expired = claims("alice");
    expired["exp"] = json!(1);
    let stranger = Signer::new().sign("ops", &claims("alice"));
    for (token, words) in [
        (stranger, "does not accept this token"),
        (gateway.token_with(&expired), "does not accept this token"),
        ("<b>no\u{e9}</b>".to_owned(), "This is not a token"),
    ] {
        connect(&browser, &token);
        browser.until(&format!("{STATE} === 'failed'"));
        let status = browser.text("status");
        assert!(status.contains(words), "{status}");
        // The next one can be entered at once.
        browser.until("!document.getElementById('connect').disabled");
    }
    connect(&browser, &gateway.token("alice"));
    browser.until(&format!("{STATE} === 'on'"));
    // The gateway dies; the page waits and comes back by itself.
    gateway.kill();
    browser.until(&format!("{STATE} === 'waiting'"));
    let status = browser.text("status");
    assert!(
        status.contains("lost") || status.contains("reached"),
        "{status}"
    );
    gateway.restart();
    browser.until(&format!("{STATE} === 'on'"));
    ping(&browser, "1.1.1.1", 1, "1");
    let summary = browser.text("summary");
    assert!(summary.starts_with("1 sent, 1 received"), "{summary}");
}

#[test]
fn a_lost_connection_comes_back_to_its_lease_by_the_ticket() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "linger = 60\n");
    let mut gateway = Gateway::start(&lab, &helper, "");
    let laptop = lab.client("laptop", 10);
    let browser = Browser::start(&lab, &laptop);
    // Over IPv6 this time.
    browser.open(&format!("https://[{GW6}]/rvpn"));
    browser.until(&format!("{STATE} === 'off'"));
    connect(&browser, &gateway.token("alice"));
    browser.until(&format!("{STATE} === 'on'"));
    gateway.kill();
    browser.until(&format!("{STATE} === 'waiting'"));
    gateway.restart();
    browser.until("document.getElementById('status').textContent === 'Connected again.'");
    wait_until("the lease is the one of before", || {
        gateway.log().contains("resumed=true")
    });
    ping(&browser, "2606:4700:4700::1111", 2, "0.2");
    let summary = browser.text("summary");
    assert!(summary.starts_with("2 sent, 2 received"), "{summary}");
}

#[test]
fn a_goodbye_is_done_as_it_says() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "linger = 60\n");
    let mut gateway = Gateway::start(&lab, &helper, "");
    let laptop = lab.client("laptop", 10);
    let browser = Browser::start(&lab, &laptop);
    browser.open(&page());
    connect(&browser, &gateway.token("alice"));
    browser.until(&format!("{STATE} === 'on'"));
    // A planned restart says when to come back, and the page does.
    assert!(gateway.stop().success());
    browser.until(&format!("{STATE} === 'waiting'"));
    gateway.restart();
    browser.until("document.getElementById('status').textContent === 'Connected again.'");
    // Access that is taken back ends it for good.
    let alice = json!({"scope": "subject", "value": "alice"});
    gateway.api("POST", "/api/v1/revocations", &alice);
    browser.until(&format!("{STATE} === 'failed'"));
    let status = browser.text("status");
    assert_eq!(status, "The gateway ended the session: access was revoked.");
    connect(&browser, &gateway.token("alice"));
    browser.until(&format!("{STATE} === 'failed'"));
    browser
        .until("document.getElementById('status').textContent.includes('not accept this token')");
}
