//! The page's parts, each for itself: packets, the policy, the demonstration.

use std::fmt::Write as _;
use std::net::IpAddr;

use rvpn_lab::gateway::Gateway;
use rvpn_lab::{Helper, Lab, packet, wait_until};
use rvpn_proto::record::{Offload, append};
use serde_json::{Value, json};

use crate::driver::Browser;
use crate::{STATE, page};

const PROTOCOL_MD: &str = include_str!("../../../PROTOCOL.md");

/// With the page's packet module as `m`, and bytes as hexadecimal digits.
fn with_packets(browser: &Browser<'_>, body: &str) -> Value {
    browser.script(&format!(
        "const hex = (bytes) => Array.from(bytes, (b) => b.toString(16).padStart(2, '0')).join('');\n\
         const bytes = (text) => Uint8Array.from(text.match(/../g) ?? [], (b) => parseInt(b, 16));\n\
         return import('/rvpn/packet.js').then((m) => {{ {body} }});"
    ))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, b| {
        write!(text, "{b:02x}").unwrap();
        text
    })
}

/// The examples of PROTOCOL.md whose names begin so: name and digits.
fn examples(prefix: &str) -> Vec<(String, String)> {
    let fences = PROTOCOL_MD.split("```hex ").skip(1);
    let found: Vec<_> = fences
        .filter_map(|fence| fence.split("```").next()?.split_once('\n'))
        .filter(|(name, _)| name.starts_with(prefix))
        .map(|(name, text)| (name.to_owned(), text.split_whitespace().collect()))
        .collect();
    assert!(!found.is_empty(), "{prefix}");
    found
}

#[test]
fn packets_made_and_read_in_the_page_are_those_of_the_protocol() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let _gateway = Gateway::start(&lab, &helper, "");
    let laptop = lab.client("laptop", 10);
    let browser = Browser::start(&lab, &laptop);
    browser.open(&page());

    let record = with_packets(
        &browser,
        "return hex(m.record(m.echoRequest(m.parseAddress('10.64.0.2'), m.parseAddress('1.1.1.1'), 1, 1, new Uint8Array())))",
    );
    assert_eq!(record, json!(examples("record-packet")[0].1));
    for (name, digits) in examples("fault-") {
        let refused = with_packets(
            &browser,
            &format!(
                "try {{ m.packetsOf(bytes('{digits}').buffer); return false }} catch {{ return true }}"
            ),
        );
        assert_eq!(refused, true, "{name}");
    }

    // As another program makes them, with odd and even lengths.
    for (source, target) in [
        ("10.64.0.2", "8.8.8.8"),
        ("fd00:1234:5678::1", "2606:4700:4700::1111"),
    ] {
        for data in [&b""[..], b"odd", &[0xff; 56], &[0xa5; 1001]] {
            let ours = packet::echo(source, target, 0xbeef, 0xffff, data);
            let made = with_packets(
                &browser,
                &format!(
                    "return hex(m.echoRequest(m.parseAddress('{source}'), m.parseAddress('{target}'), 0xbeef, 0xffff, bytes('{}')))",
                    hex(data)
                ),
            );
            let mut ours_like_theirs = ours.clone();
            if source.contains('.') {
                // Theirs has a number of its own.
                ours_like_theirs[4..6].copy_from_slice(&[0xff, 0xff]);
                ours_like_theirs[6..8].copy_from_slice(&[0x40, 0]);
                packet::fix_header(&mut ours_like_theirs);
            }
            assert_eq!(made, hex(&ours_like_theirs));
            // Two records of the answer; a flipped bit is no answer.
            let mut answer = reply(target, source, 0xbeef, 0xffff, data);
            let mut message = Vec::new();
            append(&mut message, &answer, Offload::NONE).unwrap();
            append(&mut message, &ours, Offload::NONE).unwrap();
            let read = with_packets(
                &browser,
                &format!(
                    "return m.packetsOf(bytes('{}').buffer).map((p) => {{ const a = m.readAnswer(p);\n\
                     return a && [m.showAddress(a.from), a.id, a.sequence, hex(a.data)] }})",
                    hex(&message)
                ),
            );
            let wanted = json!([[target, 0xbeef, 0xffff, hex(data)], null]);
            assert_eq!(read, wanted);
            let last = answer.len() - 1;
            answer[last] ^= 1;
            let read = with_packets(
                &browser,
                &format!("return m.readAnswer(bytes('{}'))", hex(&answer)),
            );
            assert_eq!(read, Value::Null);
        }
    }
    // Whatever a network sends, the page only says that it is no answer.
    let whole = reply("1.1.1.1", "10.64.0.2", 1, 1, b"some data");
    for cut in 0..whole.len() {
        let read = with_packets(
            &browser,
            &format!("return m.readAnswer(bytes('{}'))", hex(&whole[..cut])),
        );
        assert_eq!(read, Value::Null, "{cut}");
    }

    // Addresses, as the standard library reads and writes them.
    let texts = [
        "1.1.1.1",
        "0.0.0.0",
        "255.255.255.255",
        "256.1.1.1",
        "1.1.1",
        "1.1.1.1.1",
        "01.1.1.1",
        "1.1.1.-1",
        "",
        ".",
        "a.b.c.d",
        "::",
        "::1",
        "1::",
        "fe80::1:2",
        "1:2:3:4:5:6:7:8",
        "1:2:3:4:5:6:7::",
        "::2:3:4:5:6:7:8",
        "1:2:3:4:5:6:7:8:9",
        "1:2:3:4:5:6:7",
        "1::2::3",
        ":::",
        ":",
        ":1",
        "1:",
        "12345::",
        "g::",
        "::1.2.3.4",
        "64:ff9b::8.8.8.8",
        "1.2.3.4::",
        "1:2:3:4:5:6:1.2.3.4",
        "1:2:3:4:5:6:7:1.2.3.4",
        "::1.2.3",
        "::1.2.3.4:5",
        "2001:db8:0:0:1:0:0:1",
        "2001:0:0:1:0:0:0:1",
        "2001:DB8::A",
        "1:0:1:0:1:0:1:0",
        "::ffff:0:0",
        " ::1",
        "fe80::1%eth0",
    ];
    let read = with_packets(
        &browser,
        &format!(
            "return {}.map((t) => {{ const a = m.parseAddress(t); return a && [hex(a), m.showAddress(a)] }})",
            json!(texts[..])
        ),
    );
    for (i, text) in texts.into_iter().enumerate() {
        let wanted = match text.parse::<IpAddr>() {
            Ok(IpAddr::V4(a)) => json!([hex(&a.octets()), a.to_string()]),
            Ok(IpAddr::V6(a)) => json!([hex(&a.octets()), plain(a)]),
            Err(_) => Value::Null,
        };
        assert_eq!(read[i], wanted, "{text}");
    }
}

/// Without the dotted form that the library gives to some.
fn plain(address: std::net::Ipv6Addr) -> String {
    match address.to_ipv4_mapped() {
        Some(v4) => {
            let [a, b, c, d] = v4.octets().map(u16::from);
            format!("::ffff:{:x}:{:x}", a << 8 | b, c << 8 | d)
        }
        None => address.to_string(),
    }
}

fn reply(source: &str, target: &str, id: u16, sequence: u16, data: &[u8]) -> Vec<u8> {
    let mut packet = packet::echo(source, target, id, sequence, data);
    let (at, kind) = match source.contains('.') {
        true => (20, 0_u8),
        false => (40, 129),
    };
    // The type goes from 8 to 0 or from 128 to 129, and the checksum with it.
    let old = u16::from_be_bytes([packet[at], packet[at + 1]]);
    let new = u16::from(kind) << 8;
    packet[at] = kind;
    let sum = u16::from_be_bytes([packet[at + 2], packet[at + 3]]);
    let sum = u32::from(!sum) + u32::from(!old) + u32::from(new);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[at + 2..at + 4].copy_from_slice(&sum.to_be_bytes());
    packet
}

#[test]
fn the_policy_lets_nothing_run_that_is_not_the_gateways() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let _gateway = Gateway::start(&lab, &helper, "");
    let laptop = lab.client("laptop", 10);
    let browser = Browser::start(&lab, &laptop);
    browser.open(&page());
    browser.until(&format!("{STATE} === 'off'"));
    browser.script(
        "window.refused = [];\n\
         document.addEventListener('securitypolicyviolation', (e) => window.refused.push(e.effectiveDirective));",
    );
    // What somebody who could write into the page would try.
    // From a timer, since what the driver runs itself is allowed more.
    browser.script(
        "const tries = [\n\
           () => { document.body.innerHTML = '<b>x</b>' },\n\
           () => { const s = document.createElement('script'); s.text = 'window.ran = 1'; document.body.append(s) },\n\
           () => { const s = document.createElement('script'); s.src = 'data:text/javascript,window.ran=1'; document.body.append(s) },\n\
           () => { document.body.setAttribute('onclick', 'window.ran = 1'); document.body.click() },\n\
           () => { const s = document.createElement('style'); s.textContent = 'body { color: red }'; document.head.append(s) },\n\
           () => { const i = document.createElement('img'); i.src = 'https://8.8.8.8/?leak'; document.body.append(i) },\n\
           () => { const f = document.createElement('iframe'); f.src = 'https://8.8.8.8/'; document.body.append(f) },\n\
           () => { const f = document.createElement('form'); f.action = 'https://8.8.8.8/'; document.body.append(f); f.submit() },\n\
           () => { new WebSocket('wss://8.8.8.8/') },\n\
           () => { window.eval('window.ran = 1') },\n\
           () => { fetch('https://8.8.8.8/').then(() => { window.ran = 1 }, () => { window.done = 1 }) },\n\
         ];\n\
         setTimeout(() => { for (const attempt of tries) { try { attempt() } catch {} } }, 0);",
    );
    browser.until("window.done === 1");
    for directive in [
        "require-trusted-types-for",
        "style-src-elem",
        "img-src",
        "frame-src",
        "form-action",
        "connect-src",
    ] {
        browser.until(&format!("window.refused.includes('{directive}')"));
    }
    assert_eq!(browser.script("return window.ran ?? null"), Value::Null);
    let colour = browser.script("return getComputedStyle(document.body).color");
    assert_ne!(colour, "rgb(255, 0, 0)");
}

#[test]
fn r_21_the_demonstration_sends_its_text_and_both_ends_count_alike() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "[demo]\necho = true\nevery-seconds = 1\n");
    let laptop = lab.client("laptop", 10);
    let browser = Browser::start(&lab, &laptop);
    browser.open(&page());
    let state = "document.getElementById('demo-status').dataset.state";
    browser.click("listen");
    browser.until(&format!("{state} === 'failed'"));
    assert_eq!(browser.text("demo-status"), "Enter a token above first.");
    browser.enter("token", &gateway.token("alice"));
    browser.click("listen");
    browser.until(&format!("{state} === 'on'"));
    browser.until("document.getElementById('demo-text').textContent === 'This is a test'");
    browser.enter("words", "gr\u{fc}n <b>");
    browser.click("send");
    browser.until("document.getElementById('demo-written').textContent === '9'");
    // Two texts and more, and always whole ones.
    browser.until("Number(document.getElementById('demo-read').textContent) >= 28");
    browser.click("leave");
    browser.until(&format!("{state} === 'off'"));
    wait_until("the listener left", || {
        gateway.log().contains("listener left")
    });
    let log = gateway.log();
    let read = browser.number("demo-read");
    assert_eq!(read % 14, 0);
    let line = |what: &str| log.lines().find(|l| l.contains(what)).unwrap().to_owned();
    let last = line("listener left");
    assert!(last.contains("bytes_read=9 "), "{last}");
    assert!(last.ends_with(&format!("bytes_written={read}")), "{last}");
    let message = line("bytes=");
    assert!(
        message.contains("bytes=[103, 114, 195, 188, 110, 32, 60, 98, 62]"),
        "{message}"
    );
    let complaints = browser.complaints();
    assert!(complaints.is_empty(), "{complaints:?}");
}
