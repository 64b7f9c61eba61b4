//! Other tunnels, as their manuals set them up, each with what it has against
//! needless cost: no compression, AES-GCM, deep device queues.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use aws_lc_rs::digest::{SHA256, digest};
use rvpn_lab::ns::Daemon;
use rvpn_lab::topology::{FAR4, NB4};
use rvpn_lab::{Ns, wait_until};

use crate::stage::{FAR, TCP};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Where stunnel's client listens.
pub(crate) const STUNNEL: u16 = 5301;
const DIRECTORIES: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const USER: &str = "bench";
const PASSWORD: &str = "correct horse battery staple";

/// The program's path, if it is installed.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let mut paths = DIRECTORIES.split(':').map(|d| Path::new(d).join(program));
    paths.find(|p| p.exists())
}

/// What it says of its version, in one line.
pub(crate) fn version(program: &str, word: &str) -> String {
    let out = Command::new(program)
        .arg(word)
        .env("PATH", DIRECTORIES)
        .stdin(Stdio::null())
        .output();
    let text = out.map_or_else(
        |_| String::new(),
        |out| {
            let all = [out.stdout, out.stderr].concat();
            String::from_utf8_lossy(&all).into_owned()
        },
    );
    let line = text.lines().find(|l| l.chars().any(|c| c.is_ascii_digit()));
    // A name and the first word with a number, before what it was built with.
    let mut whole = Vec::new();
    for word in line.unwrap_or("unknown").split_whitespace() {
        whole.push(word);
        if word.chars().any(|c| c.is_ascii_digit()) {
            break;
        }
    }
    whole.join(" ")
}

/// A certificate and its key in files, and the certificate's fingerprint.
pub(crate) struct Identity {
    certificate: PathBuf,
    key: PathBuf,
    fingerprint: String,
}

impl Identity {
    fn new(dir: &Path, name: &str) -> Outcome<Identity> {
        let made = rcgen::generate_simple_self_signed([NB4.to_owned()])?;
        let certificate = dir.join(format!("{name}.crt"));
        let key = dir.join(format!("{name}.key"));
        fs::write(&certificate, made.cert.pem())?;
        fs::write(&key, made.signing_key.serialize_pem())?;
        let sum = digest(&SHA256, made.cert.der());
        let pairs: Vec<String> = sum.as_ref().iter().map(|b| format!("{b:02X}")).collect();
        Ok(Identity {
            certificate,
            key,
            fingerprint: pairs.join(":"),
        })
    }
}

/// A program in the background, its words in a file.
fn start(ns: &Ns, log: &Path, program: &str, words: &[String]) -> Outcome<Daemon> {
    let file = fs::File::create(log)?;
    let mut command = Command::new(program);
    command
        .args(words)
        .env("PATH", DIRECTORIES)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    Ok(ns.daemon(&mut command))
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// OpenVPN over UDP or TCP.
pub(crate) struct OpenVpn {
    tcp: bool,
    dir: PathBuf,
    server: Identity,
    client: Identity,
}

impl OpenVpn {
    pub(crate) fn new(dir: &Path, tcp: bool) -> Outcome<OpenVpn> {
        Ok(OpenVpn {
            tcp,
            dir: dir.to_owned(),
            server: Identity::new(dir, "server")?,
            client: Identity::new(dir, "client")?,
        })
    }

    fn common(&self, own: &Identity, other: &Identity) -> String {
        let mtu = if self.tcp { 1500 } else { 1420 };
        format!(
            "--dev-type tun --cert {} --key {} --peer-fingerprint {} --data-ciphers AES-256-GCM \
             --disable-dco --allow-compression no --mssfix 0 --tun-mtu {mtu} --txqueuelen 1000 {} --verb 2",
            own.certificate.display(),
            own.key.display(),
            other.fingerprint,
            if self.tcp {
                ""
            } else {
                "--fast-io --sndbuf 1048576 --rcvbuf 1048576"
            },
        )
    }

    /// Device, port and network, so that both can run beside each other.
    fn place(&self) -> (&'static str, u16, &'static str) {
        if self.tcp {
            ("ovtcp", 1195, "10.8.2.0")
        } else {
            ("ovudp", 1194, "10.8.1.0")
        }
    }

    pub(crate) fn serve(&self, ns: &Ns) -> Outcome<Daemon> {
        let (device, port, network) = self.place();
        let proto = if self.tcp {
            "tcp4-server --tcp-nodelay"
        } else {
            "udp4"
        };
        let text = format!(
            "--dev {device} --proto {proto} --local {NB4} --port {port} --topology subnet \
             --server {network} 255.255.255.0 --dh none {}",
            self.common(&self.server, &self.client)
        );
        let log = self.dir.join("server.log");
        let daemon = start(ns, &log, "openvpn", &words(&text))?;
        wait_until("OpenVPN serves", || {
            said(&log, "Initialization Sequence Completed")
        });
        Ok(daemon)
    }

    pub(crate) fn connect(&self, ns: &Ns) -> Outcome<Daemon> {
        let (device, port, _) = self.place();
        let proto = if self.tcp { "tcp4-client" } else { "udp4" };
        let text = format!(
            "--client --dev {device} --proto {proto} --remote {NB4} {port} --nobind \
             --route {FAR4} 255.255.255.255 {}",
            self.common(&self.client, &self.server)
        );
        start(ns, &self.dir.join("client.log"), "openvpn", &words(&text))
    }
}

/// ocserv with openconnect, over TLS alone or with DTLS for the data.
pub(crate) struct Ocserv {
    dtls: bool,
    dir: PathBuf,
    server: Identity,
}

impl Ocserv {
    pub(crate) fn new(dir: &Path, dtls: bool) -> Outcome<Ocserv> {
        // The device's address and one route: what the usual script does beyond
        // that would touch the resolvers.
        let script = format!(
            "#!/bin/sh\n[ \"$reason\" = connect ] || exit 0\n\
             ip addr add \"$INTERNAL_IP4_ADDRESS/32\" dev \"$TUNDEV\"\n\
             ip link set \"$TUNDEV\" mtu \"${{INTERNAL_IP4_MTU:-1400}}\" txqueuelen 1000 up\n\
             ip route add {FAR4}/32 dev \"$TUNDEV\"\n"
        );
        let path = dir.join("script");
        fs::write(&path, script)?;
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        Ok(Ocserv {
            dtls,
            dir: dir.to_owned(),
            server: Identity::new(dir, "server")?,
        })
    }

    fn place(&self) -> (u16, &'static str, u8) {
        if self.dtls {
            (4444, "ocdtls", 2)
        } else {
            (4443, "octls", 1)
        }
    }

    pub(crate) fn serve(&self, ns: &Ns) -> Outcome<Daemon> {
        let (port, device, net) = self.place();
        let show = |file: &str| self.dir.join(file).display().to_string();
        let accounts = format!(
            "printf '%s\\n%s\\n' '{PASSWORD}' '{PASSWORD}' | ocpasswd -c {} {USER}",
            show("passwd")
        );
        ns.sh("sh", &["-c", &accounts]);
        let mtu = if self.dtls { 1420 } else { 1500 };
        let config = format!(
            "auth = \"plain[passwd={}]\"\nlisten-host = {NB4}\ntcp-port = {port}\n{}\
             run-as-user = nobody\nrun-as-group = nogroup\nsocket-file = {}\n\
             server-cert = {}\nserver-key = {}\nisolate-workers = true\nuse-occtl = false\n\
             max-clients = 16\nmax-same-clients = 16\nrate-limit-ms = 0\nmax-ban-score = 0\n\
             keepalive = 32400\ndpd = 90\nmobile-dpd = 1800\ntry-mtu-discovery = false\n\
             compression = false\ndevice = {device}\nipv4-network = 10.9.{net}.0\n\
             ipv4-netmask = 255.255.255.0\nmtu = {mtu}\ncookie-timeout = 300\nrekey-time = 0\n\
             cisco-client-compat = true\n",
            show("passwd"),
            if self.dtls {
                format!("udp-port = {port}\n")
            } else {
                String::new()
            },
            show("sock"),
            self.server.certificate.display(),
            self.server.key.display(),
        );
        fs::write(self.dir.join("ocserv.conf"), config)?;
        let text = format!("-f -c {}", show("ocserv.conf"));
        let log = self.dir.join("server.log");
        let daemon = start(ns, &log, "ocserv", &words(&text))?;
        listening(ns, port);
        Ok(daemon)
    }

    pub(crate) fn connect(&self, ns: &Ns) -> Outcome<Daemon> {
        let (port, device, _) = self.place();
        fs::write(self.dir.join("password"), format!("{PASSWORD}\n"))?;
        let file = fs::File::create(self.dir.join("client.log"))?;
        let mut command = Command::new("openconnect");
        command
            .args(["--protocol=anyconnect", "--user", USER, "--passwd-on-stdin"])
            .args(["--non-inter", "--queue-len", "64", "--interface", device])
            .arg(format!("--cafile={}", self.server.certificate.display()))
            .arg(format!("--script={}", self.dir.join("script").display()))
            .args((!self.dtls).then_some("--no-dtls"))
            .arg(format!("https://{NB4}:{port}"))
            .env("PATH", DIRECTORIES)
            .stdin(fs::File::open(self.dir.join("password"))?)
            .stdout(file.try_clone()?)
            .stderr(file);
        Ok(ns.daemon(&mut command))
    }
}

/// WireGuard in a program: wireguard-go, or boringtun's.
pub(crate) struct WireGuard {
    boring: bool,
    dir: PathBuf,
    /// Public keys of server and client.
    public: [String; 2],
    /// The client's machine.
    client: Ipv4Addr,
}

impl WireGuard {
    pub(crate) fn new(dir: &Path, ns: &Ns, client: Ipv4Addr, boring: bool) -> Outcome<WireGuard> {
        let mut public = [String::new(), String::new()];
        for (side, public) in ["server", "client"].iter().zip(&mut public) {
            let file = dir.join(side);
            fs::write(&file, ns.sh("wg", &["genkey"]))?;
            let derive = format!("wg pubkey < {}", file.display());
            ns.sh("sh", &["-c", &derive]).trim().clone_into(public);
        }
        Ok(WireGuard {
            boring,
            dir: dir.to_owned(),
            public,
            client,
        })
    }

    /// Program, its words, what its devices are called, port and network.
    fn place(&self) -> (&'static str, &'static str, &'static str, u16, &'static str) {
        if self.boring {
            let flags = "-f --disable-drop-privileges";
            ("boringtun-cli", flags, "bt", 51_821, "10.7.2")
        } else {
            ("wireguard-go", "-f", "wg", 51_820, "10.7.1")
        }
    }

    fn start(&self, ns: &Ns, side: &str, configure: &str, host: u8) -> Outcome<Daemon> {
        let (program, flags, prefix, _, network) = self.place();
        let device = format!("{prefix}{side}");
        let log = self.dir.join(format!("{side}.log"));
        let daemon = start(ns, &log, program, &words(&format!("{flags} {device}")))?;
        let socket = format!("/run/wireguard/{device}.sock");
        wait_until("WireGuard's program is there", || {
            Path::new(&socket).exists() && std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        let key = self.dir.join(side);
        let text = format!("set {device} private-key {} {configure}", key.display());
        ns.sh("wg", &text.split_whitespace().collect::<Vec<_>>());
        ns.ip(&format!("addr add {network}.{host}/24 dev {device}"));
        ns.ip(&format!("link set {device} mtu 1420 txqueuelen 1000 up"));
        Ok(daemon)
    }

    pub(crate) fn serve(&self, ns: &Ns) -> Outcome<Daemon> {
        let (.., port, network) = self.place();
        // It would find out where the client is; but boringtun's clock for a peer
        // stands still until it knows an address, and if that took three minutes it
        // then ends the first session as if it were that old.
        let configure = format!(
            "listen-port {port} peer {} endpoint {}:{port} allowed-ips {network}.2/32",
            self.public[1], self.client
        );
        self.start(ns, "server", &configure, 1)
    }

    pub(crate) fn connect(&self, ns: &Ns) -> Outcome<Daemon> {
        let (_, _, prefix, port, _) = self.place();
        let configure = format!(
            "listen-port {port} peer {} endpoint {NB4}:{port} allowed-ips {FAR4}/32",
            self.public[0]
        );
        let daemon = self.start(ns, "client", &configure, 2)?;
        ns.ip(&format!("route add {FAR4}/32 dev {prefix}client"));
        Ok(daemon)
    }
}

/// A TLS port forward: no tunnel, but what one often does with.
pub(crate) struct Stunnel {
    dir: PathBuf,
    server: Identity,
}

impl Stunnel {
    pub(crate) fn new(dir: &Path) -> Outcome<Stunnel> {
        Ok(Stunnel {
            dir: dir.to_owned(),
            server: Identity::new(dir, "server")?,
        })
    }

    fn start(&self, ns: &Ns, side: &str, service: &str) -> Outcome<Daemon> {
        let config = self.dir.join(format!("{side}.conf"));
        let text = format!("foreground = yes\npid =\ndebug = 4\n{service}");
        fs::write(&config, text)?;
        let log = self.dir.join(format!("{side}.log"));
        start(ns, &log, "stunnel4", &[config.display().to_string()])
    }

    pub(crate) fn serve(&self, ns: &Ns) -> Outcome<Daemon> {
        let service = format!(
            "[tcp]\naccept = {NB4}:{STUNNEL}\nconnect = {FAR}:{TCP}\ncert = {}\nkey = {}\n",
            self.server.certificate.display(),
            self.server.key.display()
        );
        let daemon = self.start(ns, "server", &service)?;
        listening(ns, STUNNEL);
        Ok(daemon)
    }

    pub(crate) fn connect(&self, ns: &Ns) -> Outcome<Daemon> {
        let here = Ipv4Addr::LOCALHOST;
        let service =
            format!("client = yes\n[tcp]\naccept = {here}:{STUNNEL}\nconnect = {NB4}:{STUNNEL}\n");
        let daemon = self.start(ns, "client", &service)?;
        listening(ns, STUNNEL);
        Ok(daemon)
    }
}

fn said(log: &Path, words: &str) -> bool {
    fs::read_to_string(log).is_ok_and(|text| text.contains(words))
}

/// Waits until somebody listens at this TCP port.
fn listening(ns: &Ns, port: u16) {
    let end = format!(":{port:04X}");
    wait_until("the port is listened at", || {
        let table = ns.run(|| fs::read_to_string("/proc/thread-self/net/tcp"));
        table.unwrap_or_default().lines().any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let local = fields.next().is_some_and(|l| l.ends_with(&end));
            // Listening is state 0A.
            local && fields.nth(1) == Some("0A")
        })
    });
}
