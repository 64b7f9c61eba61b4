//! The client page as HTTP sees it: what is sent, under which policy, and to whom.

mod front_support;

use front_support::client::{Reply, upgrade};
use front_support::tokens::{Signer, claims};
use front_support::{Lab, NAME};
use rvpn_gateway::page::CLIENT_HEADERS;

const PARTS: [(&str, &str); 9] = [
    ("", "text/html; charset=utf-8"),
    ("client.css", "text/css; charset=utf-8"),
    ("client.js", "text/javascript; charset=utf-8"),
    ("serve.js", "text/javascript; charset=utf-8"),
    ("answer.js", "text/javascript; charset=utf-8"),
    ("mux.js", "text/javascript; charset=utf-8"),
    ("tunnel.js", "text/javascript; charset=utf-8"),
    ("packet.js", "text/javascript; charset=utf-8"),
    ("demo.js", "text/javascript; charset=utf-8"),
];

async fn send(lab: &Lab, method: &str, path: &str, more: &str) -> Reply {
    lab.request(&format!(
        "{method} {path} HTTP/1.1\r\nHost: {NAME}\r\n{more}\r\n"
    ))
    .await
}

async fn get(lab: &Lab, path: &str) -> Reply {
    send(lab, "GET", path, "").await
}

#[tokio::test]
async fn every_part_comes_with_the_whole_policy() {
    let lab = Lab::new().await;
    for (name, kind) in PARTS {
        let reply = get(&lab, &format!("/rvpn/{name}")).await;
        assert_eq!(reply.status, 200, "{name}");
        assert_eq!(reply.header("content-type"), Some(kind), "{name}");
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
        assert_eq!(reply.header("cache-control"), Some("no-store"));
        for (header, value) in CLIENT_HEADERS {
            assert_eq!(reply.header(header), Some(value), "{name}");
        }
        assert!(reply.header("set-cookie").is_none());
    }
    let policy = CLIENT_HEADERS[0].1;
    for directive in policy.split("; ") {
        let (name, value) = directive.split_once(' ').unwrap();
        let tight = match name {
            "require-trusted-types-for" => value == "'script'",
            "script-src" | "style-src" | "connect-src" => value == "'self'",
            _ => value == "'none'",
        };
        assert!(tight, "{directive}");
    }
    for directive in ["default-src", "base-uri", "form-action", "frame-ancestors"] {
        assert!(policy.contains(&format!("{directive} 'none'")));
    }
}

#[tokio::test]
async fn the_page_needs_nothing_from_elsewhere_and_nothing_inline() {
    let lab = Lab::and("[demo]\necho = true\n").await;
    let html = get(&lab, "/rvpn/").await.text();
    for inline in [
        " style=",
        "<style",
        " onclick",
        " onload",
        "javascript:",
        "<base",
    ] {
        assert!(!html.contains(inline), "{inline}");
    }
    // Every script and style is a part.
    for attribute in [" src=\"", " href=\""] {
        for found in html.split(attribute).skip(1) {
            let name = found.split('"').next().unwrap();
            assert!(PARTS.iter().any(|(part, _)| *part == name), "{name}");
        }
    }
    assert_eq!(
        html.matches("<script").count(),
        html.matches("<script type=\"module\" src=").count()
    );
    // A form that is sent before its script is there must not put the token in a URL.
    assert!(!html.contains(" name=\"token\"") && !html.contains(" action="));
    let input = html.split("<input id=\"token\"").nth(1).unwrap();
    let input = input.split('>').next().unwrap();
    assert!(
        input.contains("type=\"password\"") && !input.contains("name="),
        "{input}"
    );
    for (name, _) in PARTS {
        let text = get(&lab, &format!("/rvpn/{name}")).await.text();
        for elsewhere in ["http://", "https://", "//cdn", "@import", "url("] {
            assert!(!text.contains(elsewhere), "{name}: {elsewhere}");
        }
        for unsafe_sink in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "localStorage",
            "sessionStorage",
            "document.cookie",
        ] {
            assert!(!text.contains(unsafe_sink), "{name}: {unsafe_sink}");
        }
        // What one part imports is a part.
        for import in text.split(" from \"./").skip(1) {
            let wanted = import.split('"').next().unwrap();
            assert!(PARTS.iter().any(|(part, _)| *part == wanted), "{wanted}");
        }
    }
    // Labels for all that can be filled in.
    for input in html.split("<input id=\"").skip(1) {
        let id = input.split('"').next().unwrap();
        assert!(html.contains(&format!("<label for=\"{id}\">")), "{id}");
    }
}

#[tokio::test]
async fn only_what_is_there_is_found() {
    let lab = Lab::new().await;
    for path in [
        "/rvpn/client.html",
        "/rvpn/Client.js",
        "/rvpn/client.js/",
        "/rvpn/../rvpn/client.js",
        "/rvpn//client.js",
        "/rvpn/%63lient.js",
        "/rvpn/../../etc/passwd",
        "/rvpn/page",
        "/rvpn/v1",
        "/rvpn/v1/check/",
        "/client.js",
        "/ws/client",
        "/ws/admin",
    ] {
        let reply = get(&lab, path).await;
        assert_eq!(
            (reply.status, reply.text().as_str()),
            (404, "not found\n"),
            "{path}"
        );
    }
    let moved = get(&lab, "/rvpn").await;
    assert_eq!(moved.status, 308);
    assert_eq!(moved.header("location"), Some("/rvpn/"));
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        for path in ["/rvpn/", "/rvpn", "/rvpn/client.js", "/rvpn/v1/check"] {
            assert_eq!(
                send(&lab, method, path, "").await.status,
                405,
                "{method} {path}"
            );
        }
    }
    let other = lab
        .request("GET /rvpn/ HTTP/1.1\r\nHost: evil.test\r\n\r\n")
        .await;
    assert_eq!(other.status, 421);
}

#[tokio::test]
async fn a_gateway_may_have_no_page() {
    let lab = Lab::and("page = \"off\"\n").await;
    for path in ["/rvpn/", "/rvpn", "/rvpn/client.js", "/rvpn/v1/check"] {
        assert_eq!(get(&lab, path).await.status, 404, "{path}");
    }
    // The rest is as ever.
    assert_eq!(get(&lab, "/").await.status, 200);
    assert_eq!(lab.try_token(&lab.ops.good()).await, 101);
    assert!(lab.front.config().demo.is_none());
}

#[tokio::test]
async fn a_page_can_ask_whether_its_token_is_accepted_and_nobody_else() {
    let lab = Lab::and("[limits]\nlogin-failures = 3\nsessions-per-account = 1\n").await;
    let check = async |more: String| send(&lab, "GET", "/rvpn/v1/check", &more).await;
    let bearer = |token: &str| format!("Authorization: Bearer {token}\r\n");
    let good = lab.ops.good();
    let yes = check(bearer(&good)).await;
    assert_eq!((yes.status, yes.rest.len()), (204, 0));
    assert_eq!(yes.header("cache-control"), Some("no-store"));
    // It holds nothing: neither a session nor a place of the account.
    assert_eq!(lab.echo.count(), 0);
    assert_eq!(lab.front.gate.connections(), 0);
    assert_eq!(check(bearer(&good)).await.status, 204);
    // A page of somebody else may not ask, whatever it knows.
    let foreign = format!("{}Origin: https://evil.test\r\n", bearer(&good));
    assert_eq!(check(foreign).await.status, 403);
    assert_eq!(check(String::new()).await.status, 403);
    assert_eq!(check(format!("Cookie: token={good}\r\n")).await.status, 403);
    let query = format!("/rvpn/v1/check?access_token={good}");
    assert_eq!(get(&lab, &query).await.status, 403);
    // No room left in the account.
    let socket = lab.socket(&front_support::client::login(&good)).await;
    let full = check(bearer(&good)).await;
    assert_eq!(full.status, 429);
    assert!(full.header("retry-after").is_some());
    drop(socket);
    // Guessing here counts as guessing at the door.
    for _ in 0..3 {
        let stranger = Signer::ed25519().claims(&claims("alice"));
        assert_eq!(check(bearer(&stranger)).await.status, 403);
    }
    assert_eq!(check(bearer(&good)).await.status, 429);
    assert_eq!(lab.try_token(&good).await, 429);
}

#[tokio::test]
async fn the_page_says_in_time_that_the_gateway_is_not_ready() {
    let lab = Lab::new().await;
    lab.front.stop();
    let more = format!("Authorization: Bearer {}\r\n", lab.ops.good());
    let reply = send(&lab, "GET", "/rvpn/v1/check", &more).await;
    assert_eq!(reply.status, 503);
    assert!(reply.header("retry-after").is_some());
}

#[tokio::test]
async fn the_demonstration_is_shown_only_where_it_is() {
    for (more, shown, token) in [
        ("", false, false),
        ("[demo]\necho = true\n", true, true),
        ("[demo]\necho = true\nanonymous = true\n", true, false),
    ] {
        let lab = Lab::and(more).await;
        let html = get(&lab, "/rvpn/").await.text();
        assert_eq!(html.contains("<section id=\"demo\""), shown, "{more}");
        assert_eq!(html.contains("data-token=\"needed\""), token, "{more}");
        assert_eq!(
            html.contains("data-token=\"none\""),
            shown && !token,
            "{more}"
        );
        assert!(!html.contains("<!-- demo -->"));
        // Not a WebSocket: as on every other path of one.
        let wanted = if shown { 426 } else { 404 };
        assert_eq!(get(&lab, "/ws/client").await.status, wanted, "{more}");
        let upgrade = upgrade("/ws/client", NAME, "");
        let wanted = match (shown, token) {
            (false, _) => 404,
            (true, true) => 403,
            (true, false) => 101,
        };
        assert_eq!(lab.request(&upgrade).await.status, wanted, "{more}");
    }
}
