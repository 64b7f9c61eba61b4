//! Tokens through the real listener, over real TLS: AUT-01 to AUT-10, AUT-15.

mod front_support;

use front_support::Lab;
use front_support::client::{NATIVE, login, upgrade};
use front_support::tokens::{Signer, b64, b64_standard, claims, now, with, without};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

async fn refused(lab: &Lab, token: &str, why: &str) {
    let reply = lab.request(&login(token)).await;
    // A token that is too long does not even fit a header.
    assert!(matches!(reply.status, 403 | 431), "{why}: {reply:?}");
    assert_eq!(lab.echo.count(), 0, "{why}");
}

/// Limits that these tests do not run into.
const MANY: &str = "[limits]\nlogin-failures = 100000\n";

#[tokio::test]
async fn a_good_token_opens_a_session_that_carries_messages() {
    let lab = Lab::new().await;
    let mut socket = lab.socket(&login(&lab.ops.good())).await;
    for message in [Message::text("hello"), Message::binary(vec![7; 60_000])] {
        socket.send(message.clone()).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), message);
    }
    let admission = lab.echo.last();
    assert_eq!(&*admission.account, "alice");
    assert_eq!(&*admission.subject, "alice");
    assert!(admission.expires_at.is_some() && !admission.anonymous);
    assert!(admission.peer.ip().is_loopback());
}

#[tokio::test]
async fn every_algorithm_and_every_place_for_a_token() {
    let lab = Lab::new().await;
    let (es, rs) = (Signer::es256(), Signer::rs256());
    es.write_public(&lab.dir.path().join("es.pem"));
    rs.write_public(&lab.dir.path().join("rs.pem"));
    std::fs::write(
        lab.dir.path().join("hs"),
        "0123456789abcdef0123456789abcdef",
    )
    .unwrap();
    let config = lab.config(
        "[[key]]\nname = \"es\"\nalgorithm = \"ES256\"\nfile = \"es.pem\"\n\
         [[key]]\nname = \"rs\"\nalgorithm = \"RS256\"\nfile = \"rs.pem\"\n\
         [[key]]\nname = \"hs\"\nsecret-file = \"hs\"\n",
    );
    lab.front
        .gate
        .commit(rvpn_gateway::auth::Gate::prepare(&config).unwrap());
    let hs = Signer::secret(b"0123456789abcdef0123456789abcdef");
    for signer in [&lab.ops, &es, &rs, &hs] {
        assert_eq!(
            lab.try_token(&signer.good()).await,
            101,
            "{:?}",
            signer.algorithm
        );
    }
    assert_eq!(lab.try_token(&es.named("es", &claims("bob"))).await, 101);
    assert_eq!(&*lab.echo.last().account, "bob");

    let token = lab.ops.good();
    let native = "Sec-WebSocket-Protocol: rvpn.packets.1";
    let basic = b64_standard(format!("any:{token}").as_bytes());
    for headers in [
        format!("{native}, rvpn.bearer.{token}\r\n"),
        format!("{native}\r\nSec-WebSocket-Protocol: rvpn.bearer.{token}\r\n"),
        format!("{native}\r\nAuthorization: Basic {basic}\r\n"),
    ] {
        let reply = lab.request(&upgrade(NATIVE, "vpn.test", &headers)).await;
        assert_eq!(reply.status, 101, "{headers}");
        // The token is never sent back.
        assert_eq!(
            reply.header("sec-websocket-protocol"),
            Some("rvpn.packets.1")
        );
    }
    // The query is for older clients only.
    let target = format!("{NATIVE}?access_token={token}");
    let reply = lab
        .request(&upgrade(&target, "vpn.test", &format!("{native}\r\n")))
        .await;
    assert_eq!(reply.status, 403);
}

#[tokio::test]
async fn aut_01_alg_none_in_every_spelling() {
    let lab = Lab::and(MANY).await;
    for alg in ["none", "None", "NONE", "nOnE", "none ", ""] {
        let head = b64(json!({"alg": alg, "typ": "JWT"}).to_string().as_bytes());
        let body = b64(claims("alice").to_string().as_bytes());
        refused(&lab, &format!("{head}.{body}."), alg).await;
        let signature = lab.ops.good();
        let signature = signature.rsplit('.').next().unwrap();
        refused(&lab, &format!("{head}.{body}.{signature}"), alg).await;
    }
}

#[tokio::test]
async fn aut_02_a_public_key_is_no_shared_secret() {
    let lab = Lab::and(MANY).await;
    let rs = Signer::rs256();
    rs.write_public(&lab.dir.path().join("rs.pem"));
    let config = lab.config("[[key]]\nname = \"rs\"\nalgorithm = \"RS256\"\nfile = \"rs.pem\"\n");
    lab.front
        .gate
        .commit(rvpn_gateway::auth::Gate::prepare(&config).unwrap());
    for (kid, signer) in [("ops", &lab.ops), ("rs", &rs)] {
        let pem = signer.public_pem.as_bytes();
        for secret in [pem, pem.trim_ascii_end(), &signer.public[..]] {
            let forger = Signer::secret(secret);
            refused(&lab, &forger.named(kid, &claims("alice")), kid).await;
            refused(&lab, &forger.good(), "without kid").await;
        }
    }
    // And an asymmetric token is not judged by another key's kind.
    refused(&lab, &rs.named("ops", &claims("alice")), "RS256 for EdDSA").await;
}

#[tokio::test]
async fn aut_03_other_hashes_than_the_verifiers() {
    let lab = Lab::and(MANY).await;
    let secret = b"0123456789abcdef0123456789abcdef";
    std::fs::write(lab.dir.path().join("hs"), secret).unwrap();
    let config = lab.config("[[key]]\nname = \"hs\"\nsecret-file = \"hs\"\n");
    lab.front
        .gate
        .commit(rvpn_gateway::auth::Gate::prepare(&config).unwrap());
    let mut signer = Signer::secret(secret);
    for algorithm in [
        jsonwebtoken::Algorithm::HS384,
        jsonwebtoken::Algorithm::HS512,
    ] {
        signer.algorithm = algorithm;
        refused(&lab, &signer.named("hs", &claims("alice")), "other hash").await;
        refused(&lab, &signer.good(), "other hash").await;
    }
    signer.algorithm = jsonwebtoken::Algorithm::HS256;
    assert_eq!(lab.try_token(&signer.good()).await, 101);
}

#[tokio::test]
async fn aut_04_kid_and_urls_lead_nowhere() {
    let lab = Lab::and(MANY).await;
    let long = "k".repeat(4096);
    for kid in [
        "../../etc/passwd",
        "/dev/zero",
        "' OR 1=1 --",
        "https://evil.test/jwks",
        "",
        &long,
        "ops\0",
        "OPS",
        "unknown",
    ] {
        refused(&lab, &lab.ops.named(kid, &claims("alice")), kid).await;
    }
    for (name, value) in [
        ("jku", json!("https://evil.test/jwks")),
        ("x5u", json!("https://evil.test/cert")),
        (
            "jwk",
            json!({"kty": "OKP", "crv": "Ed25519", "x": b64(&lab.ops.public)}),
        ),
        ("x5c", json!(["AAAA"])),
        ("crit", json!(["exp"])),
        ("b64", json!(false)),
    ] {
        let mut header = json!({"alg": "EdDSA", "kid": "ops"});
        header[name] = value;
        refused(&lab, &lab.ops.with_header(&header, &claims("alice")), name).await;
    }
    assert_eq!(
        lab.try_token(&lab.ops.named("ops", &claims("alice"))).await,
        101
    );
}

#[tokio::test]
async fn aut_05_exp_is_a_whole_number_and_there() {
    let lab = Lab::and(MANY).await;
    for exp in [
        json!((now() + 300).to_string()),
        json!(now() as f64 + 300.0),
        json!(1e300),
        json!(-1),
        Value::Null,
        json!([now() + 300]),
        json!({"v": now() + 300}),
        json!(true),
    ] {
        refused(
            &lab,
            &lab.ops.claims(&with("exp", exp.clone())),
            &exp.to_string(),
        )
        .await;
    }
    refused(&lab, &lab.ops.claims(&without("exp")), "missing").await;
    refused(&lab, &lab.ops.claims(&without("sub")), "no sub").await;
}

#[tokio::test]
async fn aut_06_times_to_come() {
    let lab = Lab::and(MANY).await;
    for (claim, value) in [
        ("nbf", json!(now() + 60)),
        ("nbf", json!((now() - 60).to_string())),
        ("nbf", json!(1.5)),
        ("iat", json!(now() + 60)),
        ("iat", json!("soon")),
    ] {
        refused(
            &lab,
            &lab.ops.claims(&with(claim, value.clone())),
            &value.to_string(),
        )
        .await;
    }
    for claim in ["nbf", "iat"] {
        let token = lab.ops.claims(&with(claim, json!(now())));
        assert_eq!(lab.try_token(&token).await, 101, "{claim} now");
    }
}

#[tokio::test]
async fn aut_07_expired_by_more_than_the_leeway() {
    let lab = Lab::and(MANY).await;
    for ago in [6, 59, 3600] {
        refused(
            &lab,
            &lab.ops.claims(&with("exp", json!(now() - ago))),
            "expired",
        )
        .await;
    }
    // The documented leeway is 5 seconds.
    assert_eq!(
        lab.try_token(&lab.ops.claims(&with("exp", json!(now() - 1))))
            .await,
        101
    );
}

#[tokio::test]
async fn aut_08_issuer_and_audience_by_an_exact_table() {
    let lab = Lab::and(format!(
        "[[key]]\nname = \"ops\"\nalgorithm = \"EdDSA\"\nfile = \"ops.pem\"\n\
         issuer = \"https://id.test\"\naudience = \"vpn\"\n{MANY}"
    ))
    .await;
    let token = |iss: Value, aud: Value| {
        let mut all = claims("alice");
        for (name, value) in [("iss", iss), ("aud", aud)] {
            if !value.is_null() {
                all[name] = value;
            }
        }
        lab.ops.claims(&all)
    };
    let ours = json!("https://id.test");
    for (iss, aud, accepted) in [
        (ours.clone(), json!("vpn"), true),
        (ours.clone(), json!(["web", "vpn"]), true),
        (ours.clone(), json!(["web"]), false),
        (ours.clone(), json!("VPN"), false),
        (ours.clone(), json!([]), false),
        (ours.clone(), json!(7), false),
        (ours.clone(), Value::Null, false),
        (json!("https://id.test/"), json!("vpn"), false),
        (json!(7), json!("vpn"), false),
        (Value::Null, json!("vpn"), false),
    ] {
        let status = lab.try_token(&token(iss.clone(), aud.clone())).await;
        assert_eq!(status == 101, accepted, "iss {iss} aud {aud}: {status}");
    }
    // Without a configured audience a token must not be meant for another.
    let plain = Lab::and(MANY).await;
    let status = plain
        .try_token(&plain.ops.claims(&with("aud", json!("vpn"))))
        .await;
    assert_eq!(status, 403);
}

#[tokio::test]
async fn aut_09_no_flipped_bit_is_accepted() {
    let lab = Lab::and(MANY).await;
    let token = lab.ops.good();
    let (gate, dots) = (&lab.front.gate, token.matches('.').count());
    assert_eq!(dots, 2);
    let strict = rvpn_gateway::auth::Policy::Strict;
    let mut judged = 0;
    for bit in 0..token.len() * 8 {
        let mut bytes = token.clone().into_bytes();
        bytes[bit / 8] ^= 1 << (bit % 8);
        // What is no text cannot be in a header.
        let Ok(flipped) = String::from_utf8(bytes) else {
            continue;
        };
        let Ok(credential) = rvpn_gateway::auth::credential::Credential::new(&flipped) else {
            continue;
        };
        judged += 1;
        let verdict = gate.login(Some(&credential), strict, None, 9).await;
        assert!(verdict.is_err(), "bit {bit}: {flipped}");
    }
    assert!(judged > 300, "{judged}");
    // The same through the whole front, one bit of every 40.
    for at in (0..token.len()).step_by(5) {
        let mut bytes = token.clone().into_bytes();
        bytes[at] ^= 1;
        refused(&lab, &String::from_utf8(bytes).unwrap(), "flipped").await;
    }
}

#[tokio::test]
async fn aut_10_large_deep_and_doubtful_tokens() {
    let lab = Lab::and(MANY).await;
    for len in [4097, 64 * 1024, 1 << 20] {
        refused(&lab, &"a".repeat(len), "long").await;
    }
    let exp = now() + 300;
    let deep = format!("{}1{}", "[".repeat(400), "]".repeat(400));
    for text in [
        format!(r#"{{"sub":"mallory","sub":"alice","exp":{exp}}}"#),
        format!(r#"{{"sub":"alice","exp":1,"exp":{exp}}}"#),
        format!(r#"{{"sub":"alice","exp":{exp},"x":{deep}}}"#),
        format!(r#"{{"sub":"alice\r\nX: y","exp":{exp}}}"#),
        format!(r#"{{"sub":"","exp":{exp}}}"#),
        format!(r#"{{"sub":"{}","exp":{exp}}}"#, "a".repeat(129)),
        format!(r#"{{"sub":"legacy:old","exp":{exp}}}"#),
        format!(r#"{{"sub":"anonymous","exp":{exp}}}"#),
        format!(r#"{{"sub":"alice","jti":"a b","exp":{exp}}}"#),
        "[]".to_owned(),
        "null".to_owned(),
    ] {
        let token = lab.ops.with_text(r#"{"alg":"EdDSA"}"#, &text);
        refused(&lab, &token, &text).await;
    }
    let good = claims("alice").to_string();
    for head in [
        r#"{"alg":"EdDSA","alg":"HS256"}"#,
        r#"{"alg":["EdDSA"]}"#,
        r#"{"alg":"EdDSA"} x"#,
        "{}",
    ] {
        refused(&lab, &lab.ops.with_text(head, &good), head).await;
    }
    let latin = lab.ops.good().replace('.', ".\u{e9}");
    let reply = lab.request(&login(&latin)).await;
    assert!(matches!(reply.status, 400 | 403), "{reply:?}");
    for odd in ["", ".", "..", "...", "a.b", "a.b.c.d", "%2e", "a b"] {
        refused(&lab, odd, odd).await;
    }
}

#[tokio::test]
async fn aut_10_a_huge_token_costs_next_to_nothing() {
    let lab = Lab::and(MANY).await;
    let huge = "a".repeat(1 << 20);
    let start = std::time::Instant::now();
    for _ in 0..1000 {
        assert!(rvpn_gateway::auth::credential::Credential::new(&huge).is_err());
    }
    assert!(
        start.elapsed() < std::time::Duration::from_secs(1),
        "1 ms each"
    );
    drop(lab);
}

#[tokio::test]
async fn aut_11_an_unknown_key_takes_as_long_as_a_bad_signature() {
    let lab = Lab::and(MANY).await;
    let stranger = Signer::ed25519();
    let known = stranger.named("ops", &claims("alice"));
    let unknown = stranger.named("nobody", &claims("alice"));
    let credential = |t: &str| rvpn_gateway::auth::credential::Credential::new(t).unwrap();
    let (known, unknown) = (credential(&known), credential(&unknown));
    let strict = rvpn_gateway::auth::Policy::Strict;
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..3000 {
        for (token, times) in [&known, &unknown].into_iter().zip(&mut times) {
            let start = std::time::Instant::now();
            assert!(
                lab.front
                    .gate
                    .login(Some(token), strict, None, 9)
                    .await
                    .is_err()
            );
            times.push(start.elapsed());
        }
    }
    let [known, unknown] = times.map(|mut t| {
        t.sort();
        t[t.len() / 2]
    });
    // Without the decoy an unknown key is refused ten times as fast.
    assert!(
        known < 2 * unknown && unknown < 2 * known,
        "{known:?} {unknown:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn aut_15_rotation_refuses_nobody_in_the_overlap_and_the_old_key_after() {
    let lab = Lab::and(MANY).await;
    let new = Signer::ed25519();
    new.write_public(&lab.dir.path().join("new.pem"));
    let new_key = "[[key]]\nname = \"new\"\nalgorithm = \"EdDSA\"\nfile = \"new.pem\"\n";
    let both = lab.config(new_key);
    // "ops" is now the new key's file: the old one is gone.
    let only = lab.config(&format!(
        "[[key]]\nname = \"ops\"\nalgorithm = \"EdDSA\"\nfile = \"new.pem\"\n{new_key}"
    ));
    let put = |config| {
        lab.front
            .gate
            .commit(rvpn_gateway::auth::Gate::prepare(config).unwrap())
    };
    let (old, new) = (lab.ops.good(), new.good());
    let strict = rvpn_gateway::auth::Policy::Strict;
    let credential = |t: &str| rvpn_gateway::auth::credential::Credential::new(t).unwrap();
    let (old_c, new_c) = (credential(&old), credential(&new));
    let judge = async |token| {
        let gate = &lab.front.gate;
        gate.login(Some(token), strict, None, usize::MAX)
            .await
            .is_ok()
    };
    assert!(judge(&old_c).await && !judge(&new_c).await);
    put(&both);
    // A thousand judgements while the same configuration is loaded again and again.
    for n in 0..1000 {
        assert!(judge(&old_c).await && judge(&new_c).await);
        if n % 50 == 0 {
            put(&both);
        }
    }
    assert_eq!(
        (lab.try_token(&old).await, lab.try_token(&new).await),
        (101, 101)
    );
    put(&only);
    for _ in 0..1000 {
        assert!(!judge(&old_c).await && judge(&new_c).await);
    }
    assert_eq!(
        (lab.try_token(&old).await, lab.try_token(&new).await),
        (403, 101)
    );
}

#[tokio::test]
async fn a_jwk_set_in_a_file_gives_its_signing_keys() {
    let lab = Lab::and(MANY).await;
    let (a, b) = (Signer::ed25519(), Signer::es256());
    let set = json!({"keys": [
        {"kty": "future", "kid": "x"},
        {"kty": "oct", "kid": "shared", "k": b64(b"0123456789abcdef0123456789abcdef")},
        {"kty": "OKP", "crv": "Ed25519", "kid": "a", "use": "sig", "x": b64(&a.public)},
        {"kty": "EC", "crv": "P-256", "kid": "b", "alg": "ES256",
         "x": b64(&b.public[1..33]), "y": b64(&b.public[33..])},
    ]});
    std::fs::write(lab.dir.path().join("jwks.json"), set.to_string()).unwrap();
    let config = lab.config("[[key]]\nname = \"id\"\njwks-file = \"jwks.json\"\n");
    lab.front
        .gate
        .commit(rvpn_gateway::auth::Gate::prepare(&config).unwrap());
    assert_eq!(lab.try_token(&a.named("a", &claims("alice"))).await, 101);
    assert_eq!(lab.try_token(&b.named("b", &claims("alice"))).await, 101);
    assert_eq!(lab.try_token(&a.named("b", &claims("alice"))).await, 403);
    // A secret that was published is none.
    let shared = Signer::secret(b"0123456789abcdef0123456789abcdef");
    assert_eq!(
        lab.try_token(&shared.named("shared", &claims("alice")))
            .await,
        403
    );
}
