//! Who is let in among the older reverse tunnel clients, and how.

mod packer_support;

use std::time::{Duration, Instant};

use packer_support::go::{self, connect, frame};
use packer_support::tokens::{b64, b64_standard, now};
use packer_support::{Lab, OTHER, SECRET, domains, token};
use rvpn_gateway::serve::Service::{Http, Https};
use serde_json::{Value, json};

async fn refused(lab: &Lab, token: &str) -> u16 {
    let target = format!("/?access_token={token}");
    match connect(lab, &target, &[]).await {
        Ok(_) => 101,
        Err(status) => status,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_07_only_a_good_token_for_something_of_its_block_is_accepted() {
    let lab = Lab::new().await;
    let good = domains(SECRET, &["a.example"]);
    let client = go::of_2017(&lab, &good).await;
    let chosen = lab.served("a.example", Https).await;
    assert_eq!(&*chosen.server.account, "legacy:old");
    drop(client);
    lab.unserved("a.example", Https).await;

    let none = json!({"alg": "none", "typ": "JWT"}).to_string();
    let body = json!({"domains": ["a.example"]}).to_string();
    let unsigned = format!("{}.{}.", b64(none.as_bytes()), b64(body.as_bytes()));
    let expired = token(
        SECRET,
        &json!({"domains": ["a.example"], "exp": now() - 60}),
    );
    for (bad, why) in [
        (domains("wrong", &["a.example"]), "wrong secret"),
        (unsigned, "alg none"),
        (expired, "expired"),
        (token(SECRET, &json!({"iat": now()})), "no domains"),
        (domains(SECRET, &[]), "no domains in the list"),
        (domains(SECRET, &["b.example"]), "of another block"),
        (domains(SECRET, &["vpn.test"]), "the gateway's own"),
        (domains(SECRET, &["*.example"]), "all there is"),
        ("x.y.z".to_owned(), "no token"),
        (good.replace('.', ".."), "malformed"),
    ] {
        let lab = Lab::new().await;
        assert_eq!(refused(&lab, &bad).await, 403, "{why}");
        assert_eq!(lab.shared.hub.count(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_07_claims_of_the_old_clients_are_no_offence() {
    let lab = Lab::new().await;
    for claims in [
        json!({"domains": ["a.example", "127.0.0.1"], "aud": "vpn.test:443", "iat": now()}),
        json!({"domains": ["a.example"], "iss": now(), "aud": "https://vpn.test", "ports": [2222],
               "device": {"id": "x", "hostname": "y"}}),
        json!({"name": "a.example"}),
    ] {
        let client = go::of_2017(&lab, &token(SECRET, &claims)).await;
        lab.served("a.example", Http).await;
        drop(client);
        lab.unserved("a.example", Http).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_is_good_for_its_own_block_only_and_a_strict_token_is_strict() {
    let lab = Lab::new().await;
    let _b = go::of_2017(&lab, &domains(OTHER, &["b.example"])).await;
    let chosen = lab.served("b.example", Https).await;
    assert_eq!(&*chosen.server.account, "legacy:other");
    assert_eq!(refused(&lab, &domains(OTHER, &["a.example"])).await, 403);

    let strict = |claims: &Value| lab.ops.claims(claims);
    let good = strict(&json!({"sub": "alice", "exp": now() + 60, "domains": ["c.example"]}));
    let _c = go::of_2017(&lab, &good).await;
    let chosen = lab.served("c.example", Https).await;
    assert_eq!(&*chosen.server.account, "alice");
    // What strict tokens must have, these must have too.
    let lasting = strict(&json!({"sub": "alice", "domains": ["c.example"]}));
    assert_eq!(refused(&lab, &lasting).await, 403);
    let nameless = strict(&json!({"exp": now() + 60, "domains": ["c.example"]}));
    assert_eq!(refused(&lab, &nameless).await, 403);
    let legacy = strict(&json!({"sub": "legacy:old", "exp": now() + 60, "domains": ["a.example"]}));
    assert_eq!(refused(&lab, &legacy).await, 403);
    let nothing = strict(&json!({"sub": "alice", "exp": now() + 60}));
    assert_eq!(refused(&lab, &nothing).await, 403);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_08_a_token_may_be_presented_in_each_of_the_old_ways() {
    let lab = Lab::new().await;
    let good = domains(SECRET, &["a.example"]);
    let basic = format!("Basic {}", b64_standard(format!("x:{good}").as_bytes()));
    let bearer = format!("Bearer {good}");
    for header in [&basic, &bearer] {
        let mut client = connect(&lab, "/", &[("Authorization", header)])
            .await
            .unwrap();
        assert_eq!(client.command().await[1], "hello");
        lab.served("a.example", Https).await;
        drop(client);
        lab.unserved("a.example", Https).await;
    }
    for name in ["add_token", "auth", "authn", "authz"] {
        let mut client = go::stranger(&lab).await;
        let hello = client.command().await;
        assert_eq!((&hello[0], &hello[1]), (&json!(1), &json!("hello")));
        assert!(hello[3].as_array().unwrap().contains(&json!(name)));
        client.say(&json!([-1, null])).await;
        client.say(&json!([4711, name, good])).await;
        assert_eq!(client.command().await, json!([-4711, null]));
        assert_eq!(client.command().await[1], "grant");
        lab.served("a.example", Https).await;
        drop(client);
        lab.unserved("a.example", Https).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_09_an_invalid_token_is_answered_403_and_nothing_else() {
    let lab = Lab::new().await;
    let bad = domains("wrong", &["a.example"]);
    let go = ("User-Agent", "Go-http-client/1.1");
    let bearer = format!("Bearer {bad}");
    let query = format!("/?access_token={bad}");
    let both = format!("/ws?access_token={bad}&versions=v1");
    assert_eq!(connect(&lab, &query, &[]).await.err(), Some(403));
    assert_eq!(connect(&lab, &query, &[go]).await.err(), Some(403));
    let headers = [go, ("Authorization", &*bearer)];
    assert_eq!(connect(&lab, &both, &headers).await.err(), Some(403));
    assert_eq!(lab.shared.hub.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_09_after_the_upgrade_a_wrong_token_is_refused_by_number_and_the_third_ends_it() {
    let lab = Lab::new().await;
    let mut client = go::stranger(&lab).await;
    client.command().await;
    for id in 1..=3 {
        let bad = domains("wrong", &[&format!("{id}.a.example")]);
        client.say(&json!([id, "add_token", bad])).await;
        let answer = client.command().await;
        assert_eq!(answer[0], -id);
        assert_eq!(answer[1]["code"], "E_INVALID_TOKEN");
    }
    assert_eq!(client.closed().await.0, 1008);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_log_in_holds_nothing_and_has_ten_seconds() {
    let lab = Lab::new().await;
    let begun = Instant::now();
    let mut client = go::stranger(&lab).await;
    client.command().await;
    assert_eq!(lab.front.pending.count(), 1);
    assert_eq!(lab.shared.hub.count(), 0);
    assert!(lab.shared.meter.usage().is_empty());
    // Pings are answered, but are no login.
    let (code, reason) = client.closed().await;
    assert_eq!((code, &*reason), (1008, "no login in time"));
    let after = begun.elapsed();
    assert!(
        after >= Duration::from_secs(9) && after < Duration::from_secs(13),
        "{after:?}"
    );
    drop(client);
    lab.until(|| (lab.front.pending.count() == 0).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_may_say_no_more_than_a_login() {
    let lab = Lab::new().await;
    let big = vec![b' '; 6000];
    let header = format!(",,,{},control", big.len());
    for (bytes, expected) in [
        (frame("IPv4,192.0.2.1,1", "http", b""), 1008),
        (frame("IPv4,192.0.2.1,1", "http", b"GET /"), 1008),
        (frame("IPv4,192.0.2.1,1", "end", b""), 1008),
        (go::raw(&header, &big), 1008),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), 1008),
        (vec![0xfe; 100_000], 1009),
    ] {
        let mut client = go::stranger(&lab).await;
        client.command().await;
        client.try_send(bytes).await;
        assert_eq!(client.closed().await.0, expected);
    }
    let mut client = go::stranger(&lab).await;
    client.command().await;
    let text = tokio_tungstenite::tungstenite::Message::text("hello");
    futures_util::SinkExt::send(&mut client.socket, text)
        .await
        .unwrap();
    assert_eq!(client.closed().await.0, 1003);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_come_and_go_while_connected() {
    let lab = Lab::new().await;
    let first = domains(SECRET, &["a.example"]);
    let second = domains(SECRET, &["x.a.example", "*.y.a.example"]);
    let foreign = domains(OTHER, &["b.example"]);
    let mut client = connect(&lab, &format!("/?access_token={first}"), &[])
        .await
        .unwrap();
    client.command().await;
    // Saying a known token again is no offence, and is not paid twice.
    client.say(&json!([1, "add_token", first])).await;
    assert_eq!(client.command().await, json!([-1, null]));
    assert_eq!(lab.front.gate.connections(), 1);
    client.say(&json!([2, "add_token", second])).await;
    assert_eq!(client.command().await, json!([-2, null]));
    lab.served("x.a.example", Https).await;
    lab.served("deep.y.a.example", Https).await;
    client.say(&json!([3, "add_token", foreign])).await;
    let answer = client.command().await;
    assert_eq!(
        (&answer[0], &answer[1]["code"]),
        (&json!(-3), &json!("E_INVALID_TOKEN"))
    );
    assert!(lab.who("b.example", Https).is_none());
    client.say(&json!([4, "delete_token", second])).await;
    assert_eq!(client.command().await, json!([-4, null]));
    lab.unserved("x.a.example", Https).await;
    lab.served("a.example", Https).await;
    client.say(&json!([5, "delete_token", "*"])).await;
    assert_eq!(client.command().await, json!([-5, null]));
    lab.unserved("a.example", Https).await;
    assert_eq!(lab.front.gate.connections(), 0);
    client.say(&json!([6, "add_token", first])).await;
    assert_eq!(client.command().await, json!([-6, null]));
    lab.served("a.example", Https).await;
    for (id, command, code) in [
        (7, json!([7, "format", {}]), "E_UNKNOWN_COMMAND"),
        (8, json!([8, "add_token"]), "E_BAD_COMMAND"),
        (
            9,
            json!([9, "auth", {"subject": "a@b.example", "otp": "1"}]),
            "E_INVALID_TOKEN",
        ),
    ] {
        client.say(&command).await;
        let answer = client.command().await;
        assert_eq!(
            (&answer[0], &answer[1]["code"]),
            (&json!(-id), &json!(code))
        );
    }
    client.say(&json!("hello")).await;
    assert_eq!(client.command().await[0], 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_is_listed_can_be_kicked_and_ends_when_its_token_does() {
    let lab = Lab::new().await;
    let good = domains(SECRET, &["a.example"]);
    let mut client = go::of_2017(&lab, &good).await;
    lab.served("a.example", Https).await;
    let list = lab.shared.list();
    assert_eq!(list.len(), 1);
    let card = &list[0].card;
    assert_eq!(
        (card.service, &*card.account, card.slot),
        ("packer", "legacy:old", None)
    );
    assert!(lab.shared.kick(card.id));
    assert_eq!(
        client.closed().await,
        (1008, "disconnected by the operator".to_owned())
    );
    lab.unserved("a.example", Https).await;
    lab.until(|| (lab.shared.hub.count() == 0).then_some(()))
        .await;

    let short = json!({"domains": ["a.example"], "exp": now() - 3});
    let mut client = go::of_2017(&lab, &token(SECRET, &short)).await;
    assert_eq!(
        client.closed().await,
        (1008, "the token has expired".to_owned())
    );

    let mut client = go::of_2017(&lab, &good).await;
    lab.served("a.example", Https).await;
    let drained = lab.shared.drain(Duration::from_secs(5));
    let (left, closed) = tokio::join!(drained, client.closed());
    assert_eq!((left, closed.0), (0, 1012));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoking_an_account_ends_its_tunnels() {
    use rvpn_gateway::store::{Revocation, Scope};
    let lab = Lab::new().await;
    let mut client = go::of_2020(&lab, &domains(SECRET, &["a.example"])).await;
    lab.served("a.example", Https).await;
    let revocation = Revocation {
        scope: Scope::Subject,
        value: "legacy:old".to_owned(),
        until: None,
        reason: String::new(),
        created: now(),
    };
    assert_eq!(lab.front.gate.revoke(revocation).await.unwrap(), 1);
    assert_eq!(
        client.closed().await,
        (1008, "access was revoked".to_owned())
    );
    lab.unserved("a.example", Https).await;
    assert_eq!(refused(&lab, &domains(SECRET, &["a.example"])).await, 403);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rev_09_a_blocks_tokens_have_its_ports_and_no_others() {
    let block = |ports| {
        format!(
            "[[legacy]]\nname = \"old\"\nsecret = \"abc123\"\ndomains = [\"a.example\"]\n{ports}\n"
        )
    };
    let all = token(
        SECRET,
        &json!({"domains": ["a.example"], "ports": [80, 2500, 2222]}),
    );
    for (ports, expected) in [
        ("", &[][..]),
        ("ports = [2222, \"2400-2999\"]", &[2500, 2222]),
        ("ports = []", &[]),
    ] {
        let lab = Lab::with("", &block(ports)).await;
        let _client = go::of_2017(&lab, &all).await;
        let chosen = lab.served("a.example", Https).await;
        assert_eq!(chosen.server.rights.ports, expected, "{ports}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r_29_a_client_that_cannot_do_tls_may_say_so_in_its_token() {
    use rvpn_gateway::serve::table::Ending;
    let lab = Lab::new().await;
    for (decrypt, ending) in [(true, Ending::Here), (false, Ending::There)] {
        let claims = json!({"domains": ["a.example"], "decrypt": decrypt});
        let client = go::of_2017(&lab, &token(SECRET, &claims)).await;
        lab.served("a.example", Http).await;
        let name = "a.example".parse().unwrap();
        assert_eq!(lab.front.table.ending(&name), Some(ending));
        drop(client);
        lab.unserved("a.example", Http).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_block_for_names_the_door_is_closed() {
    let lab = Lab::with("", "[[legacy]]\nname = \"old\"\nsecret = \"abc123\"\n").await;
    let good = domains(SECRET, &["a.example"]);
    // The page is for browsers; nobody is upgraded there.
    assert_eq!(refused(&lab, &good).await, 200);
    let lab = Lab::and("[packer]\nenabled = false\n").await;
    assert_eq!(refused(&lab, &good).await, 200);
    let lab = Lab::with("", "[packer]\nenabled = true\n").await;
    assert_eq!(refused(&lab, &good).await, 403);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_profile_can_be_set_where_requests_do_not_show_it() {
    let tables = "[packer]\nprofile = \"go-2020\"\n[[legacy]]\nname = \"old\"\nsecret = \"abc123\"\n\
                  domains = [\"a.example\"]\n[[legacy]]\nname = \"five\"\nsecret = \"five\"\n\
                  domains = [\"b.example\"]\nprofile = \"go-2017\"\n";
    let lab = Lab::with("", tables).await;
    for (secret, name, fields) in [(SECRET, "a.example", 7), ("five", "b.example", 5)] {
        let target = format!("/?access_token={}", domains(secret, &[name]));
        let mut client = connect(&lab, &target, &[]).await.unwrap();
        let mut stream = lab.visit(name, Https, "203.0.113.9:40000").await;
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"\x16\x03\x01")
            .await
            .unwrap();
        let seen = client.next().await;
        assert_eq!((seen.service(), seen.fields.len()), ("https", fields));
    }
}
