//! The gateway's program in its namespace, as somebody would run it.

use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rvpn_lab::ns::Daemon;
use rvpn_lab::topology::{GW4, GW6, many_uids};
use rvpn_lab::{Helper, Lab, wait_until};
use serde_json::json;

use crate::front_support::NAME;
use crate::front_support::tokens::Signer;

pub(crate) struct Gateway {
    daemon: Option<Daemon>,
    dir: PathBuf,
    /// Signs for the key "ops".
    pub(crate) ops: Signer,
}

impl Gateway {
    /// With more configuration behind the usual.
    pub(crate) fn start(lab: &Lab, helper: &Helper, more: &str) -> Gateway {
        let dir = lab.dir.join("front");
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
        let ops = Signer::ed25519();
        ops.write_public(&dir.join("ops.pem"));
        let user = match many_uids() {
            true => format!("user = {}\n", helper.gateway_uid),
            false => String::new(),
        };
        let text = format!(
            "names = [\"{NAME}\"]\nstate-dir = {:?}\n{user}admin.address = \"unix:{}\"\n\
             [helper]\nsocket = {:?}\nuser = {}\n\
             [[listener]]\naddress = \"{GW4}:443\"\n[[listener]]\naddress = \"[{GW6}]:443\"\n\
             [[key]]\nname = \"ops\"\nalgorithm = \"EdDSA\"\nfile = \"ops.pem\"\n{more}",
            dir.join("state"),
            dir.join("admin.sock").display(),
            helper.socket,
            helper.uid,
        );
        fs::write(dir.join("gateway.toml"), text).unwrap();
        let mut gateway = Gateway {
            daemon: None,
            dir,
            ops,
        };
        gateway.run(lab);
        gateway
    }

    /// Starts it, anew if it was killed.
    pub(crate) fn run(&mut self, lab: &Lab) {
        let log = File::create(self.dir.join("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_rvpn-gateway"));
        command
            .env_clear()
            .arg("--config")
            .arg(self.dir.join("gateway.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let mut daemon = lab.gw.daemon(&mut command);
        wait_until("the gateway is ready", || {
            if let Some(status) = daemon.child.try_wait().unwrap() {
                panic!("the gateway ended with {status}: {}", self.log());
            }
            self.log().contains(" ready ")
        });
        self.daemon = Some(daemon);
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        self.daemon = None;
    }

    /// Ends it in order, as a service manager does.
    pub(crate) fn stop(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        let pid = i32::try_from(daemon.child.id()).unwrap();
        kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
        assert!(daemon.child.wait().unwrap().success(), "{}", self.log());
    }

    /// Takes an account's access back by the operators' API.
    pub(crate) fn revoke(&self, account: &str) {
        let mut io = UnixStream::connect(self.dir.join("admin.sock")).unwrap();
        let body = json!({"scope": "subject", "value": account}).to_string();
        let request = format!(
            "POST /api/v1/revocations HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        io.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        io.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 20"), "{answer}");
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("gateway's log:\n{}", self.log());
        }
    }
}
