//! The pages of the public port: one for everybody who comes by, which says
//! nothing of what is here, and the client page for those who know where it is.
//!
//! All of it is compiled in, so that a page of one version never meets the
//! gateway of another and there is no directory to escape from.

use hyper::body::Bytes;

use crate::config::Demo;

/// The page at `/`, as a freshly installed web server has it.
pub const LANDING: &str = "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Welcome</title></head>\n<body><h1>It works.</h1><p>There is nothing here yet.</p></body></html>\n";

/// Of the landing page: nothing may be loaded, run or framed.
pub const POLICY: &str = "default-src 'none'; frame-ancestors 'none'";

/// Where the client page is.
pub const BASE: &str = "/rvpn/";

/// Headers of every part of the client page: its own files and its own gateway,
/// nothing inline, no markup made by scripts, no frame around it, and no word
/// of it to anybody else.
pub const CLIENT_HEADERS: [(&str, &str); 7] = [
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
         require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    ("x-frame-options", "DENY"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-embedder-policy", "require-corp"),
    ("cross-origin-resource-policy", "same-origin"),
    (
        "permissions-policy",
        "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    ),
];

/// What stands in the page where the demonstration goes.
const DEMO_MARK: &str = "<!-- demo -->\n";
const DEMO: &str = include_str!("page/demo.html");
/// How the demonstration's section says that it needs no token.
const DEMO_TOKEN: &str = "data-token=\"needed\"";
const DEMO_NO_TOKEN: &str = "data-token=\"none\"";

/// One file of the client page.
#[derive(Debug)]
pub struct Part {
    /// Behind [`BASE`]; the page itself has none.
    name: &'static str,
    /// Its media type.
    pub kind: &'static str,
    text: &'static str,
}

const SCRIPT: &str = "text/javascript; charset=utf-8";

static PARTS: [Part; 9] = [
    Part {
        name: "",
        kind: "text/html; charset=utf-8",
        text: include_str!("page/client.html"),
    },
    Part {
        name: "client.css",
        kind: "text/css; charset=utf-8",
        text: include_str!("page/client.css"),
    },
    Part {
        name: "client.js",
        kind: SCRIPT,
        text: include_str!("page/client.js"),
    },
    Part {
        name: "tunnel.js",
        kind: SCRIPT,
        text: include_str!("page/tunnel.js"),
    },
    Part {
        name: "packet.js",
        kind: SCRIPT,
        text: include_str!("page/packet.js"),
    },
    Part {
        name: "serve.js",
        kind: SCRIPT,
        text: include_str!("page/serve.js"),
    },
    Part {
        name: "answer.js",
        kind: SCRIPT,
        text: include_str!("page/answer.js"),
    },
    Part {
        name: "mux.js",
        kind: SCRIPT,
        text: include_str!("page/mux.js"),
    },
    Part {
        name: "demo.js",
        kind: SCRIPT,
        text: include_str!("page/demo.js"),
    },
];

/// The file with this name.
pub fn part(name: &str) -> Option<&'static Part> {
    PARTS.iter().find(|part| part.name == name)
}

impl Part {
    /// What is sent.
    pub fn body(&self, demo: Option<&Demo>) -> Bytes {
        if !self.name.is_empty() {
            return Bytes::from_static(self.text.as_bytes());
        }
        let section = match demo {
            None => String::new(),
            Some(demo) if demo.anonymous => DEMO.replace(DEMO_TOKEN, DEMO_NO_TOKEN),
            Some(_) => DEMO.to_owned(),
        };
        self.text.replace(DEMO_MARK, &section).into()
    }
}
