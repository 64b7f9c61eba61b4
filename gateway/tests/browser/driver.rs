//! Chromium without a screen, driven by WebDriver: HTTP and JSON to its driver.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rvpn_lab::ns::Daemon;
use rvpn_lab::topology::{GW4, GW6};
use rvpn_lab::{Lab, Ns, wait_until};
use serde_json::{Value, json};

/// The only browser of its namespace needs no other port.
const DRIVER: &str = "127.0.0.1:9515";
/// What an element is called in WebDriver's JSON.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";
/// Longer than anything a page does here.
const PATIENCE: Duration = Duration::from_secs(40);
/// Browsers that are started before there is none.
const ATTEMPTS: usize = 4;

/// A browser with one window. It ends with this, and so does all it started.
pub(crate) struct Browser<'a> {
    machine: &'a Ns,
    session: String,
    /// Answers the driver's questions to the end.
    _driver: Daemon,
}

impl<'a> Browser<'a> {
    /// On this machine of the laboratory. A browser that is not up within the
    /// driver's ten seconds is given up by it; a slow machine gets further tries.
    pub(crate) fn start(lab: &Lab, machine: &'a Ns) -> Browser<'a> {
        let mut said = String::new();
        for attempt in 0..ATTEMPTS {
            match Browser::attempt(lab, machine, attempt) {
                Ok(browser) => return browser,
                Err(why) => said = why,
            }
        }
        panic!("no browser in {ATTEMPTS} attempts: {said}");
    }

    fn attempt(lab: &Lab, machine: &'a Ns, attempt: usize) -> Result<Browser<'a>, String> {
        let home = lab.dir.join(format!("browser-{}-{attempt}", machine.name));
        fs::create_dir_all(&home).unwrap();
        let log = File::create(home.join("log")).unwrap();
        // In a process namespace of its own, whose first process takes all
        // others with it: the driver starts the browser in other groups.
        let mut command = Command::new("unshare");
        command
            .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["--", "chromedriver", "--port=9515"])
            .env("HOME", &home)
            .env("TMPDIR", &home)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let mut driver = machine.daemon(&mut command);
        wait_until("the browser's driver answers", || {
            if let Some(status) = driver.child.try_wait().unwrap() {
                let log = fs::read_to_string(home.join("log")).unwrap();
                panic!("chromedriver ended with {status}; is chromium-driver there? {log}");
            }
            machine.run(|| TcpStream::connect(DRIVER).is_ok())
        });
        let mut browser = Browser {
            machine,
            session: String::new(),
            _driver: driver,
        };
        let profile = format!("--user-data-dir={}", home.join("profile").display());
        // Its own errands look up names that nobody here answers for.
        let names = format!(
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE {GW4}, EXCLUDE {GW6}, EXCLUDE [{GW6}]"
        );
        let options = json!({
            "args": [
                "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--disable-dev-shm-usage", "--no-proxy-server", names,  "--ignore-certificate-errors", profile,
            ]
        });
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let answer = machine.run(|| ask("POST", "/session", &wanted.to_string()));
        let (status, answer) = answer.map_err(|e| e.to_string())?;
        let made: Value = serde_json::from_str(&answer).unwrap();
        match made["value"]["sessionId"].as_str() {
            Some(session) if status == 200 => browser.session = format!("/session/{session}"),
            _ => return Err(answer),
        }
        Ok(browser)
    }

    /// Goes to a page and waits until it is loaded.
    pub(crate) fn open(&self, url: &str) {
        self.own("POST", "/url", &json!({"url": url}));
    }

    /// Runs the body of a function in the page and returns what it returns.
    pub(crate) fn script(&self, body: &str) -> Value {
        self.own(
            "POST",
            "/execute/sync",
            &json!({"script": body, "args": []}),
        )
    }

    pub(crate) fn click(&self, id: &str) {
        let path = format!("/element/{}/click", self.element(id));
        self.own("POST", &path, &json!({}));
    }

    /// Types into a field in place of what it held.
    pub(crate) fn enter(&self, id: &str, text: &str) {
        let element = self.element(id);
        self.own("POST", &format!("/element/{element}/clear"), &json!({}));
        let path = format!("/element/{element}/value");
        self.own("POST", &path, &json!({"text": text}));
    }

    /// Chooses files in a field for them, their paths one a line.
    pub(crate) fn choose(&self, id: &str, paths: &str) {
        let path = format!("/element/{}/value", self.element(id));
        self.own("POST", &path, &json!({"text": paths}));
    }

    /// What is to be read there.
    pub(crate) fn text(&self, id: &str) -> String {
        let value = self.script(&format!(
            "return document.getElementById({id:?}).textContent"
        ));
        value.as_str().unwrap().to_owned()
    }

    /// A number with whatever people have between its digits.
    pub(crate) fn number(&self, id: &str) -> u64 {
        let digits: String = self.text(id).chars().filter(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    }

    /// Waits until an expression is true in the page, and says what the page
    /// shows if it never is.
    #[track_caller]
    pub(crate) fn until(&self, expression: &str) {
        let end = Instant::now() + PATIENCE;
        while self.script(&format!("return Boolean({expression})")) != Value::Bool(true) {
            assert!(
                Instant::now() < end,
                "never: {expression}\n{}\n{:?}",
                self.script("return document.body.innerText"),
                self.complaints()
            );
        }
    }

    /// What the browser wrote to its console: refusals by the policy, errors of scripts.
    pub(crate) fn complaints(&self) -> Vec<Value> {
        match self.own("POST", "/se/log", &json!({"type": "browser"})) {
            Value::Array(lines) => lines,
            other => panic!("{other}"),
        }
    }

    fn element(&self, id: &str) -> String {
        let by = json!({"using": "css selector", "value": format!("#{id}")});
        let found = self.own("POST", "/element", &by);
        found[ELEMENT].as_str().unwrap().to_owned()
    }

    fn own(&self, method: &str, path: &str, body: &Value) -> Value {
        self.call(method, &format!("{}{path}", self.session), body)
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let answer = self.machine.run(|| ask(method, path, &body.to_string()));
        let (status, answer) = answer.expect("the driver's answer");
        let mut answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(status, 200, "{method} {path} {body}: {answer}");
        answer["value"].take()
    }
}

/// One request, one answer: its status and body.
fn ask(method: &str, path: &str, body: &str) -> io::Result<(u16, String)> {
    let mut io = TcpStream::connect(DRIVER)?;
    io.set_read_timeout(Some(3 * PATIENCE))?;
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {DRIVER}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    io.write_all(request.as_bytes())?;
    let mut bytes = Vec::new();
    let mut piece = [0; 16 * 1024];
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, rest)) = text.split_once("\r\n\r\n") {
            let status = head.split(' ').nth(1).unwrap().parse().unwrap();
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                let found = name.eq_ignore_ascii_case("content-length");
                found.then(|| value.trim().parse::<usize>().unwrap())
            });
            if length.is_some_and(|length| rest.len() >= length) {
                return Ok((status, rest.to_owned()));
            }
        }
        let n = io.read(&mut piece)?;
        if n == 0 {
            let why = format!("the driver closed after {text:?}");
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
        }
        bytes.extend(&piece[..n]);
    }
}
