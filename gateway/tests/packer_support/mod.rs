//! A gateway with everything but a kernel helper, and older reverse tunnel
//! clients for it.
#![expect(dead_code, reason = "every test program uses another part of this")]
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

#[path = "../session_support/fake_helper.rs"]
mod fake_helper;
pub(crate) mod go;
pub(crate) mod live;
#[path = "../front_support/tokens.rs"]
pub(crate) mod tokens;
pub(crate) mod visitor;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rvpn_gateway::auth::Gate;
use rvpn_gateway::config::Config;
use rvpn_gateway::cores::Cores;
use rvpn_gateway::front::listeners::Origin;
use rvpn_gateway::helper::{Helper, HelperConfig};
use rvpn_gateway::http::Front;
use rvpn_gateway::listener;
use rvpn_gateway::meter::Meter;
use rvpn_gateway::serve::table::{Chosen, Found};
use rvpn_gateway::serve::{Service, Stream, Visit};
use rvpn_gateway::session::{Sessions, Settings, Shared};
use rvpn_gateway::store::{Sqlite, Store};
use rvpn_gateway::ticket::TicketKey;
use rvpn_gateway::tls::Tls;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use self::fake_helper::FakeHelper;
use self::tokens::Signer;

/// Longer than anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// The name under which the gateway is reached.
pub(crate) const NAME: &str = "vpn.test";
/// The secret of the block "old", which is for `a.example` and below.
pub(crate) const SECRET: &str = "abc123";
/// The secret of the block "other", which is for `b.example` and below.
pub(crate) const OTHER: &str = "shhhhh";

pub(crate) struct Lab {
    /// Ends before its socket's directory does.
    _helper: FakeHelper,
    pub(crate) front: Arc<Front>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) at: SocketAddr,
    /// Signs for the strict key "ops".
    pub(crate) ops: Signer,
    pub(crate) dir: TempDir,
}

const USUAL: &str = r#"
[[legacy]]
name = "old"
secret = "abc123"
domains = ["a.example", "*.a.example", "127.0.0.1"]
ports = ["1024-65535"]
[[legacy]]
name = "other"
secret = "shhhhh"
domains = ["b.example", "*.b.example"]
"#;

impl Lab {
    pub(crate) async fn new() -> Lab {
        Lab::with("", USUAL).await
    }

    pub(crate) async fn and(more: &str) -> Lab {
        Lab::with("", &format!("{USUAL}{more}")).await
    }

    /// With these keys of the listener and these tables.
    pub(crate) async fn with(listener: &str, tables: &str) -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let ops = Signer::ed25519();
        ops.write_public(&dir.path().join("ops.pem"));
        let state = dir.path().display();
        let text = format!(
            "names = [\"{NAME}\"]\nstate-dir = \"{state}\"\nhelper.user = 65534\n\
             [[listener]]\naddress = \"127.0.0.1:0\"\n{listener}\n\
             [[key]]\nname = \"ops\"\nalgorithm = \"EdDSA\"\nfile = \"ops.pem\"\n{tables}"
        );
        let config = Config::parse(&text, &dir.path().join("gateway.toml"), |_| None).unwrap();
        let config = Arc::new(config);
        let store = Store::start(Sqlite::open(&dir.path().join("store.db")).unwrap()).unwrap();
        let at_home = Arc::clone(&config);
        let opened = tokio::task::spawn_blocking(move || Gate::open(&at_home, store));
        let gate = Arc::new(opened.await.unwrap().unwrap());
        let helper_end = FakeHelper::start(dir.path(), 2);
        let helper = Helper::start(HelperConfig {
            socket: helper_end.socket.clone(),
            uid: nix::unistd::getuid().as_raw(),
            successor: false,
        });
        timeout(PATIENCE, helper.ready()).await.unwrap().unwrap();
        let shared = Shared::new(
            Cores::start(2, false).unwrap(),
            helper,
            Arc::new(Meter::create(dir.path(), 256).unwrap()),
            TicketKey::load_or_create(&dir.path().join("ticket.key")).unwrap(),
            Settings {
                ticket_life: Duration::from_secs(3600),
                dns: Vec::new(),
                routes: Vec::new(),
            },
        );
        let tls = Arc::new(Tls::load(&config).unwrap());
        let sessions = Arc::new(Sessions(Arc::clone(&shared)));
        let front = Front::new(config, gate, tls, sessions);
        let settings = front.config().listeners[0].clone();
        let socket = listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let at = front
            .listeners
            .adopt(&front, socket, settings, Origin::Config)
            .unwrap();
        Lab {
            front,
            shared,
            at,
            ops,
            dir,
            _helper: helper_end,
        }
    }

    /// Waits until somebody serves the name.
    pub(crate) async fn served(&self, name: &str, service: Service) -> Chosen {
        self.until(|| self.who(name, service)).await
    }

    /// Waits until nobody does.
    pub(crate) async fn unserved(&self, name: &str, service: Service) {
        self.until(|| self.who(name, service).is_none().then_some(()))
            .await;
    }

    pub(crate) fn who(&self, name: &str, service: Service) -> Option<Chosen> {
        let peer = "203.0.113.9:40000".parse().unwrap();
        match self.front.table.find(&name.parse().unwrap(), service, peer) {
            Found::Served(chosen) => Some(chosen),
            Found::Nobody => None,
        }
    }

    /// Waits until there is something.
    pub(crate) async fn until<T>(&self, mut look: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(Instant::now() < deadline, "it does not come");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Visits a name from an address, past the public port.
    pub(crate) async fn visit(&self, name: &str, service: Service, peer: &str) -> Stream {
        let chosen = self.served(name, service).await;
        let visit = Visit {
            peer: peer.parse().unwrap(),
            port: 443,
            name: Some(name.parse().unwrap()),
            service,
        };
        chosen.server.carrier.open(visit).await.unwrap()
    }
}

/// A token as the old clients make it.
pub(crate) fn token(secret: &str, claims: &Value) -> String {
    Signer::secret(secret.as_bytes()).claims(claims)
}

/// For these names.
pub(crate) fn domains(secret: &str, names: &[&str]) -> String {
    token(secret, &json!({ "domains": names, "iat": tokens::now() }))
}
