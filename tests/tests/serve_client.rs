//! `rvpn serve` with the real programs: what the world sees of a machine.

use std::process::Command;
use std::time::Duration;

use rvpn_lab::gateway::Gateway;
use rvpn_lab::machine::Machine;
use rvpn_lab::serving::{
    Identity, SOON, connect, echo, http_server, listen, noise, resident, tls_server, visit,
};
use rvpn_lab::topology::{GW4, at};
use rvpn_lab::{Helper, Lab, Ns, wait_until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

const SHOP: &str = "shop.example";

fn scene() -> (Lab, Helper, Gateway, Machine) {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "");
    let phone = Machine::new(&lab, "phone", 10);
    (lab, helper, gateway, phone)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_visitor_sees_the_servers_own_certificate() {
    let (lab, _helper, gateway, phone) = scene();
    let identity = Identity::of(SHOP);
    tls_server(
        &phone.ns,
        "127.0.0.1:8443",
        &identity,
        |mut tls| async move {
            let mut request = [0; 1024];
            let n = tls.read(&mut request).await.expect("a request");
            assert!(request[..n].starts_with(b"GET /hello"));
            let answer =
                "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\nfrom home";
            tls.write_all(answer.as_bytes()).await.expect("an answer");
            tls.shutdown().await.expect("an end");
        },
    );
    let login = phone.login(&gateway, "alice", &[SHOP], &[]);
    let mut serve = phone.serving(&login, &["tls://:8443"]);
    let serving = &serve.events("serving")[0];
    assert_eq!(serving["urls"][0], format!("https://{SHOP}"));
    let pem = lab.dir.join("shop.pem");
    std::fs::write(&pem, &identity.pem).expect("certificate");
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--max-time", "10", "--resolve"])
        .arg(format!("{SHOP}:443:{GW4}"))
        .arg("--cacert")
        .arg(&pem)
        .arg(format!("https://{SHOP}/hello"));
    let output = lab.up.output(&mut curl);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "from home",
        "{said}"
    );
    let visitor = serve.until("visitor");
    assert_eq!(visitor["name"], SHOP);
    assert_eq!(visitor["target"], "tls://127.0.0.1:8443");
    let left = serve.until("left");
    assert!(left["sent"].as_u64().is_some_and(|n| n > 500), "{left}");
    // Listed like every session, and its wire is metered.
    let row = gateway.sessions().remove(0);
    assert_eq!(
        (&row["service"], &row["account"]),
        (&"streams".into(), &"alice".into())
    );
    assert!(
        row["inbound"]["wire"].as_u64().is_some_and(|n| n > 1000),
        "{row}"
    );
    assert_eq!(serve.interrupt(), 0);
    wait_until("the session is gone", || gateway.sessions().is_empty());
}

/// Sends so much to a server that sends it back, and compares.
async fn there_and_back(from: &Ns, name: &str, identity: &Identity, whole: usize) {
    let visitor = visit(from, name, identity).await;
    let (mut reader, mut writer) = tokio::io::split(visitor);
    let sent = noise(7, 1 << 20);
    let expected = sent.clone();
    let writing = tokio::spawn(async move {
        let mut left = whole;
        while left > 0 {
            let n = left.min(sent.len());
            writer.write_all(&sent[..n]).await.expect("a write");
            left -= n;
        }
        writer.shutdown().await.expect("an end");
    });
    let mut got = 0;
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = timeout(SOON, reader.read(&mut buffer))
            .await
            .expect("in time")
            .expect("a read");
        if n == 0 {
            break;
        }
        for byte in &buffer[..n] {
            assert!(*byte == expected[got % (1 << 20)], "another byte at {got}");
            got += 1;
        }
    }
    writing.await.expect("written");
    assert_eq!(got, whole);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn two_hundred_megabytes_go_both_ways_at_once_and_stay_the_same() {
    let (lab, _helper, gateway, phone) = scene();
    let identity = Identity::of(SHOP);
    tls_server(&phone.ns, "127.0.0.1:8443", &identity, echo);
    let login = phone.login(&gateway, "alice", &[SHOP], &[]);
    let _serve = phone.serving(&login, &["tls://:8443"]);
    there_and_back(&lab.up, SHOP, &identity, 200_000_000).await;
}

/// CPU time of each of the gateway's data threads, in clock ticks.
fn data_threads(pid: u32) -> Vec<u64> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("threads");
    let stats = tasks.filter_map(|t| std::fs::read_to_string(t.ok()?.path().join("stat")).ok());
    let ticks = stats.filter_map(|stat| {
        let (name, rest) = stat.rsplit_once(") ")?;
        let times = rest.split(' ').skip(11).take(2);
        let own = times.filter_map(|t| t.parse::<u64>().ok()).sum();
        name.contains("(rvpn-data-").then_some(own)
    });
    ticks.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn r_22_gigabytes_use_many_cores_and_leave_no_garbage() {
    const NAMES: [&str; 4] = ["a.example", "b.example", "c.example", "d.example"];
    // `RVPN_FILE_BYTES` says how much, each way and for each of the four.
    let given = std::env::var("RVPN_FILE_BYTES").ok();
    let whole = given.and_then(|b| b.parse().ok()).unwrap_or(60_000_000);
    let (lab, _helper, gateway, phone) = scene();
    let mut serving = Vec::new();
    let mut identities = Vec::new();
    for (n, name) in NAMES.into_iter().enumerate() {
        let identity = Identity::of(name);
        let at = format!("127.0.0.1:{}", 8443 + n);
        tls_server(&phone.ns, &at, &identity, echo);
        let login = phone.login(&gateway, name, &[name], &[]);
        serving.push(phone.serving(&login, &[&format!("tls://{at}"), "--name", name]));
        identities.push(identity);
    }
    let all = async |whole| {
        let visits = NAMES.iter().zip(&identities);
        let visits = visits.map(|(name, own)| there_and_back(&lab.up, name, own, whole));
        futures_util::future::join_all(visits).await;
    };
    // What is taken once and kept is there after this.
    all(8_000_000).await;
    let before = resident(gateway.pid());
    all(whole).await;
    let more = resident(gateway.pid()).saturating_sub(before);
    assert!(
        more < 8 << 20,
        "{more} bytes more after {whole} each way, four times"
    );
    let threads = data_threads(gateway.pid());
    let busy = threads.iter().filter(|ticks| **ticks >= 3).count();
    assert!(busy >= threads.len().min(4), "{threads:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_allowed_is_said_with_a_remedy_and_a_status() {
    let (_lab, _helper, gateway, phone) = scene();
    let login = phone.login(&gateway, "alice", &[SHOP], &[15432]);
    let words = |more: &[&str]| {
        let login = login.iter().map(String::as_str).collect::<Vec<_>>();
        phone.rvpn(&[&["serve"], more, &login].concat())
    };
    for (target, code, why) in [
        (
            &["3000", "--name", "bob.example"][..],
            77,
            "this login may serve: shop.example",
        ),
        (&["3000", "--name", "a b"], 1, "a b"),
        (
            &["tcp:5432", "--port", "22"],
            77,
            "this login may serve on: 15432",
        ),
        (&["ftp://x:1"], 1, "'ftp://x:1' is nothing to serve"),
        (
            &["3000", "--name", "a", "--name", "b"],
            1,
            "--name b is one more",
        ),
        (&["3000", "--auth", "basic"], 1, "--auth-file"),
    ] {
        let said = words(target);
        assert_eq!(said.code, code, "{target:?}: {said:?}");
        assert!(said.err.contains(why), "{target:?}: {}", said.err);
    }
    // Nobody there at all.
    let elsewhere = phone.rvpn(&[
        "serve",
        "3000",
        "--server",
        &at(GW4, 444),
        "--token-file",
        &login[3],
    ]);
    assert_eq!(elsewhere.code, 69, "{elsewhere:?}");
    // Nothing is left of all these.
    assert_eq!(
        phone.rvpn(&["serve", "status"]).good(),
        "nothing is served\n"
    );
    let left = std::fs::read_dir(phone.run_dir().join("serve")).map_or(0, Iterator::count);
    assert_eq!(left, 0);
    wait_until("no session is left", || gateway.sessions().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serving_goes_on_in_the_background_until_it_is_stopped() {
    let (lab, _helper, gateway, phone) = scene();
    let identity = Identity::of(SHOP);
    tls_server(&phone.ns, "127.0.0.1:8443", &identity, echo);
    let login = phone.login(&gateway, "alice", &[SHOP], &[]);
    let login = login.iter().map(String::as_str).collect::<Vec<_>>();
    let begun = phone
        .rvpn(&[&["serve", "tls://:8443", "--bg"], &login[..]].concat())
        .good();
    assert!(begun.contains(&format!("https://{SHOP}")), "{begun}");
    let mut visitor = visit(&lab.up, SHOP, &identity).await;
    visitor.write_all(b"hello").await.expect("a write");
    let mut back = [0; 5];
    timeout(SOON, visitor.read_exact(&mut back))
        .await
        .expect("in time")
        .expect("a read");
    let status = phone.rvpn(&["serve", "status", "--json"]).json();
    assert_eq!(status["state"], "connected");
    assert_eq!(status["visitors"]["open"], 1, "{status}");
    assert_eq!(status["served"][0]["urls"][0], format!("https://{SHOP}"));
    assert_eq!(phone.rvpn(&["serve", "stop"]).good(), "stopped 1\n");
    let end = timeout(SOON, visitor.read(&mut back))
        .await
        .expect("in time");
    assert!(matches!(end, Ok(0) | Err(_)));
    assert_eq!(
        phone.rvpn(&["serve", "stop"]).good(),
        "nothing was served\n"
    );
    let left = std::fs::read_dir(phone.run_dir().join("serve")).expect("directory");
    assert_eq!(left.count(), 0);
    tokio::time::sleep(Duration::from_millis(1)).await;
}

/// Runs curl on the internet's side against the public port; its output.
fn curl(lab: &Lab, words: &[&str]) -> String {
    let mut curl = Command::new("curl");
    curl.args(["-sSk", "--max-time", "10", "--resolve"])
        .arg(format!("app.alice.example:443:{GW4}"))
        .args(words);
    let output = lab.up.output(&mut curl);
    let said = String::from_utf8_lossy(&output.stderr);
    format!("{}{said}", String::from_utf8_lossy(&output.stdout))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_web_server_is_served_under_a_name_and_learns_who_visits() {
    let (lab, _helper, gateway, phone) = scene();
    let heads = http_server(&phone.ns, "127.0.0.1:3000");
    let login = phone.login(&gateway, "alice", &["*.alice.example"], &[]);
    let mut serve = phone.serving(&login, &["3000", "--name", "app", "--proxy-protocol"]);
    let url = serve.events("serving")[0]["urls"][0].clone();
    assert_eq!(url, "https://app.alice.example");
    let said = curl(
        &lab,
        &[
            "https://app.alice.example/one",
            "https://app.alice.example/two",
        ],
    );
    assert_eq!(
        said,
        "you asked: GET /one HTTP/1.1you asked: GET /two HTTP/1.1"
    );
    let said = curl(&lab, &["http://app.alice.example:443/three"]);
    assert_eq!(said, "you asked: GET /three HTTP/1.1");
    let asked = heads.lock().expect("heads").clone();
    assert!(asked[0].contains("QUIT"), "no PROXY header: {:?}", asked[0]);
    let visitor = serve.until("visitor");
    assert!(
        visitor["peer"]
            .as_str()
            .is_some_and(|p| p.starts_with("1.1.1.1:")),
        "{visitor}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_is_asked_for_before_the_server_sees_anything() {
    let (lab, _helper, gateway, phone) = scene();
    let heads = http_server(&phone.ns, "127.0.0.1:3000");
    let login = phone.login(&gateway, "alice", &["*.alice.example"], &[]);
    let users = phone.secret("users", "ann:secret\n");
    let words = [
        "3000",
        "--name",
        "app",
        "--auth",
        "basic",
        "--auth-file",
        &users,
    ];
    let _serve = phone.serving(&login, &words);
    let url = "https://app.alice.example/secret";
    let status = ["-o", "/dev/null", "-w", "%{http_code} "];
    for more in [&[][..], &["-u", "ann:wrong"], &["-u", "bob:secret"]] {
        let said = curl(&lab, &[&status, more, &[url]].concat());
        assert_eq!(said, "401 ", "{more:?}");
    }
    assert!(
        heads.lock().expect("heads").is_empty(),
        "the server was asked"
    );
    assert_eq!(
        curl(&lab, &["-u", "ann:secret", url]),
        "you asked: GET /secret HTTP/1.1"
    );
    // On a connection that is kept each request is asked.
    let said = curl(
        &lab,
        &[
            &status[..],
            &["-u", "ann:secret", url, "--next", "-k"],
            &status,
            &["--max-time", "10", url],
        ]
        .concat(),
    );
    assert!(said.starts_with("200 401 "), "{said}");
    let asked = heads.lock().expect("heads").clone();
    assert_eq!(asked.len(), 2);
    // What was for us is not passed on.
    let told = asked
        .iter()
        .any(|h| h.to_ascii_lowercase().contains("authorization"));
    assert!(!told, "{asked:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_older_clients_words_serve_by_their_protocol() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let legacy = "[[legacy]]\nname = \"old\"\nsecret = \"abc123\"\ndomains = [\"a.example\", \"*.a.example\"]\n";
    let gateway = Gateway::start(&lab, &helper, legacy);
    let phone = Machine::new(&lab, "phone", 10);
    let _heads = http_server(&phone.ns, "127.0.0.1:3000");
    let identity = Identity::of("shop.a.example");
    tls_server(&phone.ns, "127.0.0.1:8443", &identity, echo);
    let pin = gateway.fingerprint();
    let words = |secret: &str| {
        let url = format!("wss://{GW4}:443/");
        let words = [
            "--locals",
            "http:a.example:3000,https:shop.a.example:8443",
            "--stunneld",
            &url,
            "--pin",
            &pin,
            "--secret",
            secret,
        ];
        words.map(str::to_owned).to_vec()
    };
    let mut serve = phone.serving(&words("abc123"), &[]);
    assert_eq!(serve.until_many("serving", 2).len(), 2);
    let mut web = Command::new("curl");
    web.args(["-sS", "--max-time", "10", "--resolve"])
        .arg(format!("a.example:443:{GW4}"))
        .args(["http://a.example:443/one", "http://a.example:443/two"]);
    let output = lab.up.output(&mut web);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(
        said,
        "you asked: GET /one HTTP/1.1you asked: GET /two HTTP/1.1"
    );
    // TLS untouched, both ways at once, with the server's own certificate.
    let visitor = visit(&lab.up, "shop.a.example", &identity).await;
    let (mut reader, mut writer) = tokio::io::split(visitor);
    let sent = noise(5, 20_000_000);
    let copy = sent.clone();
    let writing = tokio::spawn(async move {
        writer.write_all(&copy).await.expect("a write");
        writer.shutdown().await.expect("an end");
    });
    let mut got = Vec::new();
    let read = timeout(3 * SOON, reader.read_to_end(&mut got)).await;
    read.expect("in time").expect("all of it");
    writing.await.expect("written");
    assert!(got == sent, "other bytes");
    assert_eq!(serve.interrupt(), 0);
    // Another secret signs nothing here.
    let mut wrong = phone.serve(&words("other"), &[]);
    assert_eq!(wrong.ended(), 77, "{}", wrong.said());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_speak_first_are_heard_on_ports_and_by_ssh() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let gateway = Gateway::start(&lab, &helper, "front.ssh = \"home.example\"\n");
    let phone = Machine::new(&lab, "phone", 10);
    for (port, banner) in [
        (2222, "SSH-2.0-of_this_machine\r\n"),
        (5432, "+OK first\r\n"),
    ] {
        let listener = listen(&phone.ns, &at("127.0.0.1", port));
        tokio::spawn(async move {
            while let Ok((mut tcp, _)) = listener.accept().await {
                tokio::spawn(async move {
                    tcp.write_all(banner.as_bytes()).await.expect("a banner");
                    // What comes is sent back behind it.
                    let (mut from, mut to) = tcp.split();
                    let _gone = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
    }
    let login = phone.login(&gateway, "alice", &["home.example"], &[15432]);
    let words = [
        "ssh:2222",
        "tcp:5432",
        "--name",
        "home.example",
        "--port",
        "15432",
    ];
    let mut serve = phone.serving(&login, &words);
    let serving = serve.until_many("serving", 2);
    assert_eq!(serving[0]["urls"][0], "ssh://home.example:443");
    assert_eq!(serving[1]["urls"][0], format!("tcp://{GW4}:15432"));
    let read = async |tcp: &mut tokio::net::TcpStream, wanted: &str| {
        let mut got = vec![0; wanted.len()];
        let read = timeout(SOON, tcp.read_exact(&mut got)).await;
        read.expect("in time").expect("a read");
        assert_eq!(String::from_utf8_lossy(&got), wanted);
    };
    // On a port the server may speak before the visitor has said a byte.
    let mut tcp = connect(&lab.up, at(GW4, 15432).parse().expect("address"));
    read(&mut tcp, "+OK first\r\n").await;
    tcp.write_all(b"question").await.expect("a write");
    read(&mut tcp, "question").await;
    // On the shared one the client shows first what it speaks.
    let mut ssh = connect(&lab.up, at(GW4, 443).parse().expect("address"));
    ssh.write_all(b"SSH-2.0-visitor\r\n")
        .await
        .expect("a write");
    read(&mut ssh, "SSH-2.0-of_this_machine\r\nSSH-2.0-visitor\r\n").await;
    // The port closes with its client.
    assert_eq!(serve.interrupt(), 0);
    wait_until("the port is closed", || {
        lab.up
            .run(|| std::net::TcpStream::connect(at(GW4, 15432)))
            .is_err()
    });
}
