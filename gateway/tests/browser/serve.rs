//! a tab that serves, as everybody else sees it.

use std::process::Command;

use rvpn_lab::gateway::Gateway;
use rvpn_lab::token::claims;
use rvpn_lab::topology::GW4;
use rvpn_lab::{Helper, Lab, wait_until};
use serde_json::json;

use crate::driver::Browser;
use crate::page;

const NAME: &str = "tab.alice.example";
const STATE: &str = "document.getElementById('serve-status').dataset.state";

/// What somebody on the internet gets.
fn curl(lab: &Lab, words: &[&str]) -> String {
    let mut curl = Command::new("curl");
    curl.args(["-sSk", "--max-time", "20", "--resolve"])
        .arg(format!("{NAME}:443:{GW4}"))
        .args(words);
    let output = lab.up.output(&mut curl);
    let said = String::from_utf8_lossy(&output.stderr);
    format!("{}{said}", String::from_utf8_lossy(&output.stdout))
}

#[test]
fn r_30_a_tab_serves_a_text_and_files_under_a_name() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let mut gateway = Gateway::start(&lab, &helper, "");
    let laptop = lab.client("laptop", 10);
    let browser = Browser::start(&lab, &laptop);
    browser.open(&page());
    let mut says = claims("alice");
    says["domains"] = json!(["*.alice.example"]);
    let token = gateway.token_with(&says);
    browser.enter("token", &token);
    // A name that is somebody else's is refused in words.
    browser.enter("serve-name", "tab.bob.example");
    browser.click("serve-begin");
    browser.until(&format!("{STATE} === 'failed'"));
    let status = browser.text("serve-status");
    assert!(status.contains("*.alice.example"), "{status}");

    browser.enter("serve-name", "tab");
    browser.enter("serve-text", "words of a tab");
    // Two files, one of them large, chosen as a person would.
    let big = lab.dir.join("big.bin");
    let bytes: Vec<u8> = (0..5_000_000_u32).map(|i| (i / 13) as u8).collect();
    std::fs::write(&big, &bytes).unwrap();
    let small = lab.dir.join("small file.txt");
    std::fs::write(&small, "a small one").unwrap();
    let files = format!("{}\n{}", big.display(), small.display());
    browser.choose("serve-files", &files);
    browser.click("serve-begin");
    browser.until(&format!("{STATE} === 'on'"));
    assert_eq!(browser.text("serve-url"), format!("https://{NAME}"));

    let root = format!("https://{NAME}/");
    assert_eq!(curl(&lab, &[&root]), "words of a tab");
    assert_eq!(
        curl(&lab, &[&format!("http://{NAME}:443/")]),
        "words of a tab"
    );
    assert_eq!(
        curl(&lab, &[&format!("{root}small%20file.txt")]),
        "a small one"
    );
    let saved = lab.dir.join("saved");
    let saved_at = saved.display().to_string();
    assert_eq!(
        curl(&lab, &["-o", &saved_at, &format!("{root}big.bin")]),
        ""
    );
    assert!(std::fs::read(&saved).unwrap() == bytes, "another file");
    let status = ["-o", "/dev/null", "-w", "%{http_code}"];
    let code = |more: &[&str]| curl(&lab, &[&status[..], more].concat());
    assert_eq!(code(&[&format!("{root}nothing")]), "404");
    assert_eq!(code(&["-d", "x=1", &root]), "405");
    assert_eq!(code(&["-I", &root]), "200");
    browser.until("Number(document.getElementById('serve-requests').textContent) === 7");
    assert!(browser.number("serve-visitors") >= 1);
    assert!(browser.text("serve-last").starts_with("1.1.1.1:"));
    // Listed as what it is.
    let row = gateway.sessions().remove(0);
    assert_eq!(row["service"], "streams");

    // The gateway comes back, and so does the tab.
    gateway.restart();
    browser.until(&format!("{STATE} === 'on'"));
    wait_until("the name is served again", || {
        curl(&lab, &[&root]) == "words of a tab"
    });
    browser.click("serve-end");
    browser.until(&format!("{STATE} === 'off'"));
    wait_until("the name is free", || code(&[&root]) != "200");
    let complaints = browser.complaints();
    let others = complaints
        .iter()
        .filter(|c| !c.to_string().contains("v1/packets"));
    assert_eq!(others.count(), 0, "{complaints:?}");
}
