//! A front with everything real but the sessions, which echo, and clients for it.
#![expect(dead_code, reason = "every test program uses another part of this")]
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

pub(crate) mod client;
pub(crate) mod echo;
pub(crate) mod served;
pub(crate) mod tokens;
pub(crate) mod trust;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rvpn_gateway::auth::Gate;
use rvpn_gateway::config::Config;
use rvpn_gateway::front::listeners::Origin;
use rvpn_gateway::http::Front;
use rvpn_gateway::listener;
use rvpn_gateway::store::{Sqlite, Store};
use rvpn_gateway::tls::Tls;
use tempfile::TempDir;

use self::echo::Echo;
use self::tokens::Signer;

/// Longer than anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// The name under which the front is reached.
pub(crate) const NAME: &str = "vpn.test";

/// A front and what it needs.
pub(crate) struct Lab {
    pub(crate) front: Arc<Front>,
    pub(crate) echo: Arc<Echo>,
    pub(crate) at: SocketAddr,
    /// Signs for the key "ops".
    pub(crate) ops: Signer,
    pub(crate) dir: TempDir,
}

/// What differs from one lab to another.
#[derive(Default)]
pub(crate) struct Setup {
    /// Of the listener.
    pub(crate) listener: &'static str,
    /// The rest of the configuration.
    pub(crate) more: String,
}

impl Lab {
    pub(crate) async fn new() -> Lab {
        Lab::with(Setup::default()).await
    }

    /// With more configuration behind the usual.
    pub(crate) async fn and(more: impl Into<String>) -> Lab {
        Lab::with(Setup {
            more: more.into(),
            ..Setup::default()
        })
        .await
    }

    pub(crate) async fn with(setup: Setup) -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let ops = Signer::ed25519();
        ops.write_public(&dir.path().join("ops.pem"));
        let config = Arc::new(configuration(dir.path(), &setup).unwrap());
        let store = Store::start(Sqlite::open(&dir.path().join("store.db")).unwrap()).unwrap();
        let at_home = Arc::clone(&config);
        let opened = tokio::task::spawn_blocking(move || Gate::open(&at_home, store));
        let gate = Arc::new(opened.await.unwrap().unwrap());
        let tls = Arc::new(Tls::load(&config).unwrap());
        let echo = Arc::new(Echo::default());
        let sessions = Arc::clone(&echo);
        let front = Front::new(config, gate, tls, sessions);
        let settings = front.config().listeners[0].clone();
        let socket = listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listeners = &front.listeners;
        let at = listeners.adopt(&front, socket, settings, Origin::Config);
        let at = at.unwrap();
        Lab {
            front,
            echo,
            at,
            ops,
            dir,
        }
    }

    /// The configuration with other parts, as a file that was edited.
    pub(crate) fn config(&self, more: &str) -> Config {
        let setup = Setup {
            more: more.to_owned(),
            ..Setup::default()
        };
        configuration(self.dir.path(), &setup).unwrap()
    }
}

/// The text of a configuration: one listener, one key, one name.
fn configuration(dir: &Path, setup: &Setup) -> Result<Config, rvpn_gateway::config::ConfigError> {
    let mut text = String::new();
    let (listener, more) = (setup.listener, &setup.more);
    // A test's own tables follow; keys of the top level come first.
    let split = match more.starts_with('[') {
        true => 0,
        false => more.find("\n[").map_or(more.len(), |at| at + 1),
    };
    let top = &more[..split];
    let tables = &more[top.len()..];
    writeln!(text, "names = [\"{NAME}\"]\nstate-dir = {dir:?}\n{top}").unwrap();
    writeln!(text, "helper.user = 65534").unwrap();
    writeln!(text, "[[listener]]\naddress = \"127.0.0.1:0\"\n{listener}").unwrap();
    if !tables.contains("name = \"ops\"") {
        writeln!(
            text,
            "[[key]]\nname = \"ops\"\nalgorithm = \"EdDSA\"\nfile = \"ops.pem\""
        )
        .unwrap();
    }
    writeln!(text, "{tables}").unwrap();
    Config::parse(&text, &dir.join("gateway.toml"), |_| None)
}
