//! Certificates of names that are served with TLS ended at the gateway, and
//! checks of names that are asked for by clients themselves.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

mod front_support;
mod serve_support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use front_support::{Lab, PATIENCE};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use rvpn_gateway::acme::Wish;
use rvpn_gateway::serve::table::{Ending, Offer};
use rvpn_lab::acme_server::AcmeServer;
use serve_support::{Fake, Served, pattern, rights, server};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;

/// A front whose certificates are looked after.
async fn lab(authority: &AcmeServer, more: &str) -> (Lab, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let ca = authority.ca_file(dir.path());
    let lab = Lab::and(format!(
        "[acme]\ndirectory = \"{}\"\nca-file = {ca:?}\nnames = []\nserved = true\n{more}",
        authority.directory()
    ))
    .await;
    authority.lead(lab.at.port(), lab.at.port());
    let front = Arc::clone(&lab.front);
    let wish = move || Wish::of(&front);
    tokio::spawn(Arc::clone(&lab.front.acme).run(wish));
    (lab, dir)
}

/// A client that serves these names, whose TLS ends where it says.
fn serve(lab: &Lab, account: &str, names: &[(&str, Ending)]) -> Served {
    let (fake, asked) = Fake::new();
    let all: Vec<_> = names.iter().map(|(n, _)| *n).collect();
    let one = server(account, "one", rights(&all, &[]), Arc::clone(&fake));
    let place = lab.front.table.join(one);
    for (name, ending) in names {
        let offer = Offer {
            ending: *ending,
            ..Offer::of(pattern(name))
        };
        place.offer(offer).unwrap();
    }
    Served { place, fake, asked }
}

async fn visit(lab: &Lab, name: &str, ca: &str) -> bool {
    let mut roots = RootCertStore::empty();
    for one in CertificateDer::pem_slice_iter(ca.as_bytes()) {
        roots.add(one.unwrap()).unwrap();
    }
    let config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let made = TlsConnector::from(Arc::new(config)).connect(name, lab.tcp().await);
    timeout(PATIENCE, made).await.unwrap().is_ok()
}

async fn until_trusted(lab: &Lab, name: &str, ca: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !visit(lab, name, ca).await {
        assert!(Instant::now() < deadline, "no certificate for {name}");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn r_28_a_served_name_whose_tls_ends_here_gets_a_certificate_and_no_other() {
    let authority = AcmeServer::start(Duration::from_secs(3600));
    let (lab, _dir) = lab(&authority, "").await;
    let served = serve(
        &lab,
        "alice",
        &[
            ("here.example.org", Ending::Here),
            ("there.example.org", Ending::There),
            ("*.wild.example.org", Ending::Here),
        ],
    );
    until_trusted(&lab, "here.example.org", authority.ca_pem()).await;
    let row = &lab.front.acme.list()[0];
    assert_eq!(
        (row.name.as_str(), row.kind),
        ("here.example.org", "served")
    );
    // Whoever leaves is not renewed for; its certificate is kept for its return.
    drop(served);
    let deadline = Instant::now() + PATIENCE;
    while !lab.front.acme.list().is_empty() {
        assert!(Instant::now() < deadline, "it is still looked after");
        sleep(Duration::from_millis(50)).await;
    }
    let _again = serve(&lab, "alice", &[("here.example.org", Ending::Here)]);
    until_trusted(&lab, "here.example.org", authority.ca_pem()).await;
    assert_eq!(authority.asked().orders, ["here.example.org"]);
}

#[tokio::test]
async fn r_28_rev_16_a_challenge_is_answered_by_the_names_client_or_by_us_and_nobody_else() {
    let authority = AcmeServer::start(Duration::from_secs(3600));
    let more =
        "challenge = \"http-01\"\n[[name]]\npattern = \"*.example.org\"\nhttp = \"redirect\"\n";
    let (lab, _dir) = lab(&authority, more).await;
    let mut a = serve(&lab, "alice", &[("a.example.org", Ending::There)]);
    let mut b = serve(&lab, "bob", &[("b.example.org", Ending::Here)]);
    // Ours, by http-01 under the name that b serves.
    until_trusted(&lab, "b.example.org", authority.ca_pem()).await;
    assert!(b.asked.try_recv().is_err(), "the client saw our challenge");
    // A challenge of a's own goes to a, though other plain HTTP is redirected.
    for (path, passes) in [
        ("/.well-known/acme-challenge/of-a", true),
        ("/elsewhere", false),
    ] {
        let mut io = lab.tcp().await;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: a.example.org\r\nConnection: close\r\n\r\n");
        io.write_all(request.as_bytes()).await.unwrap();
        if passes {
            let (_, mut far) = timeout(PATIENCE, a.asked.recv()).await.unwrap().unwrap();
            let mut head = vec![0; 4096];
            let n = far.read(&mut head).await.unwrap();
            assert!(head[..n].starts_with(format!("GET {path} ").as_bytes()));
            far.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nof-a")
                .await
                .unwrap();
        }
        let mut answer = String::new();
        timeout(PATIENCE, io.read_to_string(&mut answer))
            .await
            .unwrap()
            .unwrap();
        let expected = if passes {
            "HTTP/1.1 200"
        } else {
            "HTTP/1.1 301"
        };
        assert!(answer.starts_with(expected), "{path}: {answer}");
        assert_eq!(answer.ends_with("of-a"), passes);
    }
    assert!(b.asked.try_recv().is_err());
}
