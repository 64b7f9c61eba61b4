//! A page cannot send WebSocket pings. That it asks for its counters is life enough.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod session_support;

use std::time::Duration;

use rvpn_proto::control::{Hello, Message as Control, Stage, Stats};
use session_support::fake_helper::SlotState;
use session_support::lab::Lab;
use session_support::wire::Client;
use tokio_tungstenite::tungstenite::Message;

/// A client that is welcomed and promises to be heard every second.
async fn promise(lab: &Lab, instance: &str) -> Client {
    let mut client = lab.admit(lab.guest()).await;
    let hello = Control::Hello(Hello {
        versions: vec![1],
        name: "test".to_owned(),
        instance: instance.to_owned(),
        keepalive_s: Some(1),
        ..Hello::default()
    });
    say(&mut client, &hello, Stage::BeforeLogin).await;
    assert!(matches!(hear(&mut client).await, Control::Welcome(_)));
    client
}

async fn say(client: &mut Client, message: &Control, stage: Stage) {
    let text = message.to_text(stage).unwrap();
    client.send(Message::text(text)).await;
}

async fn hear(client: &mut Client) -> Control {
    Control::parse(&client.text().await, Stage::Session).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_asks_for_its_counters_is_alive() {
    let lab = Lab::new(2).await;
    let _silent = promise(&lab, "silent").await;
    let mut page = promise(&lab, "page").await;
    let mut clock = tokio::time::interval(Duration::from_millis(900));
    // Longer than two and a half times the second.
    for _ in 0..5 {
        clock.tick().await;
        say(&mut page, &Control::Stats(Stats::default()), Stage::Session).await;
        assert!(matches!(hear(&mut page).await, Control::Stats(_)));
    }
    lab.fake.await_slot(0, SlotState::Lingering);
    assert_eq!(lab.fake.slot(1).0, SlotState::Leased);
}
