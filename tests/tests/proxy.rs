//! The gateway as a site among others: behind a reverse proxy, in its log, at its end.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use rvpn_lab::bulk::{Way, size, start};
use rvpn_lab::machine::Machine;
use rvpn_lab::ns::Daemon;
use rvpn_lab::scene::{Scene, round_trip};
use rvpn_lab::topology::{GW4, UP4, UP6, at};
use rvpn_lab::tunnel_client::{DIALECTS, Speech, Target, on};
use rvpn_lab::{Lab, PATIENCE, wait_until};

/// Debian's, with a configuration of nothing but `proxy_pass` and the upgrade.
fn nginx(lab: &Lab) -> Daemon {
    let dir = lab.dir.join("nginx");
    fs::create_dir_all(&dir).expect("directory");
    let site = rcgen::generate_simple_self_signed(vec![GW4.to_owned()]).expect("certificate");
    fs::write(dir.join("site.crt"), site.cert.pem()).expect("certificate");
    fs::write(dir.join("site.key"), site.signing_key.serialize_pem()).expect("key");
    let config = format!(
        "user root;\ndaemon off;\nmaster_process off;\npid {dir}/pid;\nerror_log {dir}/error.log;\n\
         events {{}}\n\
         http {{\n  access_log off;\n\
           client_body_temp_path {dir}/a; proxy_temp_path {dir}/b; fastcgi_temp_path {dir}/c;\n\
           uwsgi_temp_path {dir}/d; scgi_temp_path {dir}/e;\n\
           server {{\n    listen 80;\n    listen 443 ssl;\n\
             ssl_certificate {dir}/site.crt;\n    ssl_certificate_key {dir}/site.key;\n\
             location / {{\n\
               proxy_pass http://127.0.0.1:8080;\n\
               proxy_http_version 1.1;\n\
               proxy_set_header Upgrade $http_upgrade;\n\
               proxy_set_header Connection \"upgrade\";\n\
             }}\n  }}\n}}\n",
        dir = dir.display()
    );
    fs::write(dir.join("nginx.conf"), config).expect("configuration");
    let mut command = Command::new("nginx");
    command
        .arg("-p")
        .arg(&dir)
        .arg("-c")
        .arg(dir.join("nginx.conf"))
        .arg("-e")
        .arg(dir.join("error.log"))
        .stdin(Stdio::null());
    let mut nginx = lab.gw.daemon(&mut command);
    wait_until("nginx listens", || {
        if let Some(status) = nginx.child.try_wait().expect("wait") {
            let log = fs::read_to_string(dir.join("error.log")).unwrap_or_default();
            panic!("nginx ended with {status}: {log}");
        }
        lab.gw.run(|| TcpStream::connect("127.0.0.1:80").is_ok())
    });
    nginx
}

#[test]
fn f_16_behind_a_plain_reverse_proxy() {
    let listener = "[[listener]]\naddress = \"127.0.0.1:8080\"\nmode = \"plain\"\n";
    let scene = Scene::new("", &format!("{DIALECTS}{listener}"));
    let servers = scene.servers();
    let _nginx = nginx(&scene.lab);
    let mut scene = scene;
    scene.target = Target::plain(at(GW4, 80).parse().expect("address"));

    // An ordinary page for whoever just looks.
    let page = scene.phone.run(|| {
        let mut io = TcpStream::connect(at(GW4, 80)).expect("nginx");
        io.set_read_timeout(Some(PATIENCE)).expect("timeout");
        io.write_all(b"GET / HTTP/1.1\r\nHost: vpn.test\r\nConnection: close\r\n\r\n")
            .expect("request");
        let mut page = String::new();
        io.read_to_string(&mut page).expect("an answer");
        page
    });
    assert!(page.starts_with("HTTP/1.1 200 "), "{page}");
    let lower = page.to_ascii_lowercase();
    assert!(lower.contains("content-type: text/html"), "{page}");
    assert!(lower.contains("<!doctype html>"), "{page}");

    on(&scene.phone, async || {
        let all = [
            Speech::Padded,
            Speech::Native { offload: true },
            Speech::Native { offload: false },
        ];
        for speech in all {
            let mut session = scene.session(speech, speech.kind()).await;
            session.ping(UP4, 1, 1).await;
            session.ping(UP6, 1, 2).await;
            for port in 4000..4020 {
                round_trip(&mut session, &servers[0], port).await;
                round_trip(&mut session, &servers[1], port).await;
            }
            drop(session);
            scene.deserted();
        }
        // The refusal gets through as well.
        let refused = scene.target.open("/tunnel", Some("not.a.token")).await;
        assert_eq!(refused.err().map(|r| r.status().as_u16()), Some(403));
    });
}

/// A whole machine through the proxy, which ends its TLS and starts none.
#[test]
fn up_through_a_plain_reverse_proxy() {
    let listener = "[[listener]]\naddress = \"127.0.0.1:8080\"\nmode = \"plain\"\n";
    let scene = Scene::new("", listener);
    let _nginx = nginx(&scene.lab);
    let laptop = Machine::new(&scene.lab, "laptop", 11);
    let token = laptop.home.join("token");
    fs::write(&token, scene.gateway.token("alice")).expect("token");
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).expect("mode");
    let certificate = scene.lab.dir.join("nginx/site.crt");
    let (token, certificate) = (
        token.display().to_string(),
        certificate.display().to_string(),
    );
    let way = [
        "--server",
        GW4,
        "--token-file",
        &token,
        "--ca-file",
        &certificate,
    ];
    laptop
        .rvpn(&[&["ping", UP6, "-c", "2", "-i", "0.1"], &way[..]].concat())
        .good();
    let up = laptop.up(&[&["--no-dns"], &way[..]].concat());
    for address in [UP4, UP6] {
        for way in [Way::Upload, Way::Download] {
            start(&laptop.ns, &scene.lab.up, address, 9000, way, size()).whole(size());
        }
    }
    up.down();
}

#[test]
fn f_17_an_interrupt_closes_the_listener_and_the_log_names_the_client() {
    let log = "[log]\nlevel = \"trace\"\nformat = \"json\"\n";
    let mut scene = Scene::new("", &format!("{DIALECTS}{log}"));
    let local = on(&scene.phone, async || {
        let mut session = scene.session(Speech::Padded, "alice").await;
        session.ping(UP4, 1, 1).await;
        let stranger = scene.target.open("/tunnel", Some("not.a.token")).await;
        assert!(stranger.is_err());
        scene.gateway.signal(Signal::SIGINT);
        let closed = session.rx.closed().await;
        assert_eq!(closed.code, 1012, "{closed:?}");
        session.local
    });
    assert!(scene.gateway.ended().success());
    let refused = scene.phone.run(|| TcpStream::connect(at(GW4, 443)));
    assert!(refused.is_err(), "the listener is closed");

    let mut came = 0;
    let mut levels = std::collections::BTreeSet::new();
    for line in scene.gateway.log().lines().filter(|l| l.starts_with('{')) {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        levels.insert(line["level"].as_str().expect("a level").to_owned());
        if line["fields"]["message"] == "client came" {
            assert_eq!(line["span"]["peer"], local.to_string(), "{line}");
            assert_eq!(line["span"]["account"], "alice");
            came += 1;
        }
    }
    assert_eq!(came, 1);
    // What only the finer levels say: why a stranger was refused.
    assert!(levels.contains("DEBUG"), "{levels:?}");

    // Quieter when told so.
    scene
        .gateway
        .configure(&scene.helper, "[log]\nlevel = \"warn\"\n");
    let before = scene.gateway.log().len();
    scene.gateway.start_quiet();
    on(&scene.phone, async || {
        let mut session = scene.session(Speech::Native { offload: true }, "bob").await;
        session.ping(UP4, 1, 1).await;
    });
    assert!(scene.gateway.stop().success());
    let said = scene.gateway.log()[before..].to_owned();
    assert!(
        !said.contains(" INFO ") && !said.contains(" DEBUG "),
        "{said}"
    );
}
