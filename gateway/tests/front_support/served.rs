//! Clients that serve, without a tunnel: their streams end in the test.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rvpn_gateway::auth::rights::Rights;
use rvpn_gateway::cores::{CoreId, Cores};
use rvpn_gateway::serve::table::{Ending, Offer, Place, Server, Table};
use rvpn_gateway::serve::{Carrier, OpenError, Opening, Service, Stream, Visit};
use rvpn_proto::name::Pattern;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_rustls::TlsAcceptor;

type Run = Pin<Box<dyn Future<Output = ()> + Send>>;
type Talk = Arc<dyn Fn(Visit, DuplexStream) -> Run + Send + Sync>;

static CORE: LazyLock<CoreId> =
    LazyLock::new(|| Cores::start(1, false).unwrap().least_loaded().core());

struct Carried {
    talk: Talk,
    visits: Arc<AtomicUsize>,
}

impl Carrier for Carried {
    fn open(&self, visit: Visit) -> Opening {
        self.visits.fetch_add(1, Ordering::SeqCst);
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let run = (self.talk)(visit, theirs);
        Box::pin(async move {
            tokio::spawn(run);
            Ok::<Stream, OpenError>(Box::new(ours))
        })
    }

    fn core(&self) -> CoreId {
        *CORE
    }

    fn probe(&self) {}

    fn end(&self, _: u16, _: &'static str) {}
}

/// A client in the table.
pub(crate) struct Device {
    visits: Arc<AtomicUsize>,
    /// Held, and gone with it.
    place: Option<Place>,
}

impl Device {
    /// How many streams it was asked for.
    pub(crate) fn visits(&self) -> usize {
        self.visits.load(Ordering::SeqCst)
    }
}

/// Serves a name (or those below it) by talking like this.
pub(crate) fn serve<F, R>(
    table: &Arc<Table>,
    name: &str,
    service: Option<Service>,
    ending: Ending,
    talk: F,
) -> Device
where
    F: Fn(Visit, DuplexStream) -> R + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let pattern = Pattern::parse(name).unwrap();
    let rights = Rights {
        names: vec![pattern.clone()],
        ..Rights::default()
    };
    let (device, place) = join(table, name, rights, talk);
    let offer = Offer {
        service,
        ending,
        ..Offer::of(pattern)
    };
    place.offer(offer).unwrap();
    Device {
        place: Some(place),
        ..device
    }
}

/// May serve these ports; whether it does is the caller's matter.
pub(crate) fn port_of<F, R>(
    table: &Arc<Table>,
    account: &str,
    ports: &[u16],
    talk: F,
) -> (Device, Place)
where
    F: Fn(Visit, DuplexStream) -> R + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let rights = Rights {
        ports: ports.to_vec(),
        ..Rights::default()
    };
    join(table, account, rights, talk)
}

/// May serve this name; whether it does is the caller's matter.
pub(crate) fn name_of<F, R>(table: &Arc<Table>, name: &str, talk: F) -> (Device, Place)
where
    F: Fn(Visit, DuplexStream) -> R + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let rights = Rights {
        names: vec![Pattern::parse(name).unwrap()],
        ..Rights::default()
    };
    join(table, name, rights, talk)
}

fn join<F, R>(table: &Arc<Table>, account: &str, rights: Rights, talk: F) -> (Device, Place)
where
    F: Fn(Visit, DuplexStream) -> R + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let visits = Arc::new(AtomicUsize::new(0));
    let carrier = Carried {
        talk: Arc::new(move |visit, io| Box::pin(talk(visit, io))),
        visits: Arc::clone(&visits),
    };
    let place = table.join(Server {
        account: account.into(),
        instance: account.into(),
        rights: Arc::new(rights),
        peer: "127.0.0.9:9".parse().unwrap(),
        carrier: Arc::new(carrier),
    });
    let device = Device {
        visits,
        place: None,
    };
    (device, place)
}

/// Ends TLS itself, with a certificate that nobody else has, and answers each
/// line with its name in front. Also returns the certificate.
pub(crate) fn tls_device(table: &Arc<Table>, name: &str) -> (Device, CertificateDer<'static>) {
    let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
    let certificate = made.cert.der().clone();
    let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let own = name.to_owned();
    let device = serve(table, name, None, Ending::There, move |_, io| {
        let (acceptor, own) = (acceptor.clone(), own.clone());
        async move {
            if let Ok(mut io) = acceptor.accept(io).await {
                let mut line = [0; 16];
                while let Ok(n @ 1..) = io.read(&mut line).await {
                    let answer = [own.as_bytes(), b": ", &line[..n]].concat();
                    if io.write_all(&answer).await.is_err() || io.flush().await.is_err() {
                        return;
                    }
                }
            }
        }
    });
    (device, certificate)
}

/// Takes so many bytes, and says whether they are these, to the byte.
pub(crate) async fn compare(mut io: DuplexStream, expected: Arc<Vec<u8>>) {
    let mut bytes = vec![0; expected.len()];
    let same = io.read_exact(&mut bytes).await.is_ok() && bytes == *expected;
    let answer: &[u8] = if same { b"same" } else { b"other" };
    drop(io.write_all(answer).await);
}
