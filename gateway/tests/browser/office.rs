//! The operators' page in a real browser, on the gateway's own machine.

use std::fs;

use rvpn_lab::gateway::Gateway;
use rvpn_lab::machine::Machine;
use rvpn_lab::{Helper, Lab};
use serde_json::json;

use crate::driver::Browser;

const ADMIN: &str = "127.0.0.1:7980";
/// The rows of the table, as texts.
const ROWS: &str =
    "return Array.from(document.querySelectorAll('#rows tr'), (r) => r.cells[2].textContent)";

#[test]
fn r_17_the_page_lists_searches_sorts_and_ends() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let mut gateway = Gateway::prepared(&lab, &helper, "");
    gateway.environment(&[("RVPN_ADMIN", ADMIN)]);
    gateway.launch_ready();
    let phone = Machine::new(&lab, "phone", 10);
    let alice = phone.login(&gateway, "alice", &["shop.lab.test"], &[]);
    let bob = phone.login(&gateway, "bob", &["club.lab.test"], &[]);
    let _shop = phone.serving(&alice, &["tls://:8443"]);

    let browser = Browser::start(&lab, &lab.gw);
    browser.open(&format!("http://{ADMIN}/"));
    browser.until("location.pathname === '/admin/' && document.getElementById('view').hidden");
    browser.enter("token", "not the token");
    browser.script("document.querySelector('#login button').click()");
    browser.until("document.getElementById('state').textContent.startsWith('Not shown')");
    let token = fs::read_to_string(gateway.dir.join("state/admin.token")).unwrap();
    browser.enter("token", token.trim());
    browser.script("document.querySelector('#login button').click()");
    browser.until("document.querySelectorAll('#rows tr').length === 1");
    assert_eq!(browser.script(ROWS), json!(["shop.lab.test"]));

    let _club = phone.serving(&bob, &["tls://:8444"]);
    browser.click("refresh");
    browser.until("document.querySelectorAll('#rows tr').length === 2");
    let sort = |key: &str| {
        browser.script(&format!(
            "document.querySelector('[data-key={key}]').click()"
        ));
        browser.script(ROWS)
    };
    assert_eq!(sort("names"), json!(["club.lab.test", "shop.lab.test"]));
    assert_eq!(sort("names"), json!(["shop.lab.test", "club.lab.test"]));
    assert_eq!(sort("account"), json!(["shop.lab.test", "club.lab.test"]));
    browser.enter("search", "BOB");
    assert_eq!(browser.script(ROWS), json!(["club.lab.test"]));

    // Whoever says yes ends the connection; the other one stays.
    browser.script("window.confirm = () => true; document.querySelector('#rows button').click()");
    browser.until("document.querySelector('#rows tr').className === 'gone'");
    browser.enter("search", " ");
    let gone = "return Array.from(document.querySelectorAll('#rows tr.gone'), (r) => r.cells[1].textContent)";
    assert_eq!(browser.script(gone).as_array().unwrap()[0], "bob");
    // Only the wrong token was worth a complaint of the browser.
    let complaints = browser.complaints();
    assert!(
        complaints.iter().all(|c| c.to_string().contains("401")),
        "{complaints:?}"
    );
}
