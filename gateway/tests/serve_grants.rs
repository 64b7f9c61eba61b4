//! What a login may serve: by its token, its registration, and its name.

mod front_support;

use front_support::Lab;
use front_support::client::login;
use front_support::tokens::{Signer, claims, now, with};
use rvpn_gateway::auth::devices::id_of;
use rvpn_gateway::auth::rights::Rights;
use rvpn_gateway::serve::names::wished;
use rvpn_gateway::store::DeviceKey;
use serde_json::json;

const DOMAIN: &str = "[serve]\ndomain = \"t.test\"\n";

/// What whoever logs in with this token may serve.
async fn rights(lab: &Lab, token: &str) -> Rights {
    let _socket = lab.socket(&login(token)).await;
    (*lab.echo.last().rights).clone()
}

fn names(rights: &Rights) -> Vec<String> {
    rights.names.iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn an_account_has_a_name_of_its_own_below_the_domain() {
    let lab = Lab::and(DOMAIN).await;
    let alice = rights(&lab, &lab.ops.good()).await;
    assert_eq!(names(&alice), ["alice.t.test", "*.alice.t.test"]);
    let wish = |wish| wished(&alice, "alice", wish).map(|p| p.to_string());
    assert_eq!(wish(None).unwrap(), "alice.t.test");
    assert_eq!(wish(Some("app")).unwrap(), "app.alice.t.test");
    assert!(wish(Some("bob.t.test")).is_err());
    // Two accounts are never one name, and what is no label has none.
    for sub in [
        "Alice",
        "a.b",
        "a@b",
        "-x",
        "a:b",
        "*",
        "x".repeat(64).as_str(),
    ] {
        let token = lab.ops.claims(&claims(sub));
        assert_eq!(names(&rights(&lab, &token).await), [""; 0], "{sub}");
    }
}

#[tokio::test]
async fn a_token_says_names_and_ports_beside_it() {
    let lab = Lab::and(DOMAIN).await;
    let mut more = with("domains", json!(["App.ex.org", "*.x.ex.org"]));
    more["ports"] = json!([15432]);
    // A person's name is none of a host.
    more["name"] = json!("vpn.test");
    let alice = rights(&lab, &lab.ops.claims(&more)).await;
    assert_eq!(
        names(&alice),
        ["app.ex.org", "*.x.ex.org", "alice.t.test", "*.alice.t.test"]
    );
    assert_eq!(alice.ports, [15432]);
}

#[tokio::test]
async fn a_device_serves_what_it_was_registered_for_and_nothing_it_says_itself() {
    let lab = Lab::new().await;
    let device = Signer::ed25519();
    let id = id_of(&device.public).unwrap();
    lab.front.gate.device_joined(DeviceKey {
        id: id.clone(),
        account: "alice".into(),
        name: "nas".into(),
        public: device.public.clone(),
        created: now(),
        expires: None,
        class: 0,
        names: vec!["app.ex.org".into(), "*.x.ex.org".into()],
        ports: vec![15432],
    });
    let mut claims = claims("alice");
    claims["domains"] = json!(["evil.ex.org"]);
    claims["ports"] = json!([22]);
    let found = rights(&lab, &device.named(&id, &claims)).await;
    assert_eq!(names(&found), ["app.ex.org", "*.x.ex.org"]);
    assert_eq!(found.ports, [15432]);
}
