//! The other reverse tunnel: rathole, with its TLS transport.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rvpn_lab::Ns;
use rvpn_lab::ns::Daemon;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const CONTROL: u16 = 2333;
const ENTRANCE: u16 = 4443;
const HOST: &str = "rathole.bench.test";
const WORD: &str = "bench";

/// Where its visitors come to.
pub(crate) fn entrance(server: &str) -> Outcome<SocketAddr> {
    Ok(format!("{server}:{ENTRANCE}").parse()?)
}

pub(crate) struct Rathole {
    program: PathBuf,
    dir: PathBuf,
}

impl Rathole {
    /// Makes its certificate, in the form that it wants.
    pub(crate) fn new(program: &Path, dir: &Path) -> Outcome<Rathole> {
        fs::create_dir_all(dir)?;
        let made = rcgen::generate_simple_self_signed([HOST.to_owned()])?;
        fs::write(dir.join("crt.pem"), made.cert.pem())?;
        fs::write(dir.join("key.pem"), made.signing_key.serialize_pem())?;
        let output = Command::new("openssl")
            .current_dir(dir)
            .args(["pkcs12", "-export", "-in", "crt.pem", "-inkey", "key.pem"])
            .args(["-out", "identity.pfx", "-passout"])
            .arg(format!("pass:{WORD}"))
            .output()?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into());
        }
        Ok(Rathole {
            program: program.to_owned(),
            dir: dir.to_owned(),
        })
    }

    pub(crate) fn start(
        &self,
        server: &Ns,
        client: &Ns,
        address: &str,
        local: &str,
    ) -> Outcome<Vec<Daemon>> {
        let dir = self.dir.display();
        let serving = format!(
            "[server]\nbind_addr = \"{address}:{CONTROL}\"\ndefault_token = \"{WORD}\"\n\
             [server.transport]\ntype = \"tls\"\n[server.transport.tls]\npkcs12 = \"{dir}/identity.pfx\"\n\
             pkcs12_password = \"{WORD}\"\n[server.services.app]\nbind_addr = \"{address}:{ENTRANCE}\"\n"
        );
        let connecting = format!(
            "[client]\nremote_addr = \"{address}:{CONTROL}\"\ndefault_token = \"{WORD}\"\n\
             [client.transport]\ntype = \"tls\"\n[client.transport.tls]\n\
             trusted_root = \"{dir}/crt.pem\"\nhostname = \"{HOST}\"\n\
             [client.services.app]\nlocal_addr = \"{local}\"\n"
        );
        let one = |ns: &Ns, side: &str, text: &str| -> Outcome<Daemon> {
            let config = self.dir.join(format!("{side}.toml"));
            fs::write(&config, text)?;
            let log = fs::File::create(self.dir.join(format!("{side}.log")))?;
            let mut command = Command::new(&self.program);
            command
                .arg(format!("--{side}"))
                .arg(&config)
                .env_clear()
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log);
            Ok(ns.daemon(&mut command))
        };
        Ok(vec![
            one(server, "server", &serving)?,
            one(client, "client", &connecting)?,
        ])
    }
}
