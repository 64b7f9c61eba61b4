use super::*;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("/etc/rvpn/gateway.toml"), |_| None).map_err(|e| e.to_string())
}

const LEAST: &str = "helper.user = 7\n[[listener]]\naddress = \"[::]:443\"\n";

fn with(more: &str) -> Result<Config, String> {
    parse(&format!("{LEAST}{more}"))
}

fn refused(more: &str) -> String {
    with(more).expect_err(more)
}

#[test]
fn the_least_that_is_needed() {
    let config = with("").unwrap();
    assert_eq!(config.listeners[0].mode, Mode::Auto);
    assert_eq!(config.helper.uid, 7);
    assert_eq!(
        config.admin,
        AdminAddress::Tcp("127.0.0.1:7980".parse().unwrap())
    );
    assert!(config.sandbox);
    assert!(config.keys.is_empty() && config.dialects.is_empty());
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest_one() {
    let error = refused("adress = \"x\"\n");
    assert!(
        error.starts_with("/etc/rvpn/gateway.toml:4: unknown field `adress`"),
        "{error}"
    );
    assert!(error.ends_with("did you mean `address`?"), "{error}");
    let error = parse("listner = []").unwrap_err();
    assert!(error.ends_with("did you mean `listener`?"), "{error}");
    let error = refused("mode = \"tsl\"\n");
    assert!(error.ends_with("did you mean `tls`?"), "{error}");
}

#[test]
fn dialects_say_who_is_let_in() {
    let config = with(
        "[[legacy]]\nname = \"old\"\nsecret = \"abc123\"\n\
         [[dialect]]\npath = \"/tunnel\"\nanonymous = true\npadding = \"broad\"\n\
         [[dialect]]\npath = \"/raw\"\nkind = \"raw\"\nlegacy = \"old\"\n\
         [[dialect]]\npath = \"/b\"\nkind = \"text4\"\naccount = \"alice\"\n",
    )
    .unwrap();
    assert_eq!(config.dialects[0].variant, Variant::Padded);
    assert_eq!(config.dialects[0].padding, Padding::BROAD);
    assert_eq!(config.dialects[1].legacy.as_deref(), Some("old"));
    assert_eq!(config.dialects[2].account.as_deref(), Some("alice"));
    assert_eq!(&*config.legacy[0].account, "legacy:old");

    for (wrong, why) in [
        ("path = \"tunnel\"", "must begin with /"),
        ("path = \"/rvpn/v1/packets\"", "belong to the gateway"),
        ("path = \"/x\"\nlegacy = \"none\"", "no [[legacy]] named"),
        (
            "path = \"/x\"\nkind = \"raw\"\npadding = \"broad\"",
            "only the kind",
        ),
        ("path = \"/x\"\npadding = \"loud\"", "padding is"),
        (
            "path = \"/x\"\npadding = { bytes = [9, 1] }",
            "[least, most]",
        ),
        ("path = \"/x\"\n[[dialect]]\npath = \"/x\"", "there twice"),
    ] {
        let error = refused(&format!("[[dialect]]\n{wrong}\n"));
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_strict_secret_is_long_and_a_legacy_one_is_not_empty() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("short"),
        "0123456789012345678901234567890\n",
    )
    .unwrap();
    std::fs::write(
        dir.path().join("long"),
        "01234567890123456789012345678901\n",
    )
    .unwrap();
    let at = dir.path().join("gateway.toml");
    let load = |file: &str| {
        let text = format!("{LEAST}[[key]]\nname = \"k\"\nsecret-file = \"{file}\"\n");
        Config::parse(&text, &at, |_| None)
    };
    let error = load("short").unwrap_err().to_string();
    assert!(error.contains("has 31 bytes and needs 32"), "{error}");
    let config = load("long").unwrap();
    assert!(matches!(&config.keys[0].source, KeySource::Secret(s) if s.bytes().len() == 32));
    assert!(
        !format!("{config:?}").contains("0123456789"),
        "a secret is shown"
    );
    assert!(refused("[[legacy]]\nname = \"x\"\nsecret = \"\"\n").contains("empty"));
}

#[test]
fn a_key_has_one_source_and_one_algorithm() {
    for (wrong, why) in [
        ("name = \"k\"", "exactly one of"),
        (
            "name = \"k\"\nfile = \"a\"\njwks-file = \"b\"\nalgorithm = \"EdDSA\"",
            "exactly one of",
        ),
        ("name = \"k\"\nfile = \"a\"", "algorithm must be"),
        (
            "name = \"k\"\nfile = \"a\"\nalgorithm = \"HS256\"",
            "algorithm must be",
        ),
        (
            "name = \"k\"\nfile = \"a\"\nalgorithm = \"none\"",
            "algorithm must be",
        ),
        ("name = \"k\"\njwks-url = \"http://x/\"", "https://"),
        ("name = \"../k\"\nfile = \"a\"", "is not a name"),
    ] {
        let error = refused(&format!("[[key]]\n{wrong}\n"));
        assert!(error.contains(why), "{error}");
    }
    let config = with("[[key]]\nname = \"k\"\nfile = \"k.pem\"\nalgorithm = \"ES256\"\n").unwrap();
    let file = PathBuf::from("/etc/rvpn/k.pem");
    let algorithm = Algorithm::Es256;
    assert_eq!(config.keys[0].source, KeySource::Pem { algorithm, file });
}

#[test]
fn the_admin_listener_stays_at_home() {
    let admin = |address: &str| parse(&format!("admin.address = \"{address}\"\n{LEAST}"));
    assert!(admin("0.0.0.0:80").unwrap_err().contains("loopback"));
    assert!(admin("unix:run/x").unwrap_err().contains("absolute"));
    let config = admin("unix:/run/rvpn/admin.sock").unwrap();
    assert_eq!(
        config.admin,
        AdminAddress::Unix("/run/rvpn/admin.sock".into())
    );
}

#[test]
fn the_environment_wins() {
    let env = |name: &str| match name {
        "RVPN_LISTEN" => Some("127.0.0.1:8443".to_owned()),
        "RVPN_STATE_DIR" => Some("/tmp/state".to_owned()),
        _ => None,
    };
    let config = Config::parse(LEAST, Path::new("x"), env).unwrap();
    assert_eq!(
        config.listeners[0].address,
        "127.0.0.1:8443".parse().unwrap()
    );
    assert_eq!(config.state_dir, Path::new("/tmp/state"));
    let two = format!("{LEAST}[[listener]]\naddress = \"[::]:80\"\n");
    assert!(Config::parse(&two, Path::new("x"), env).is_err());
}

#[test]
fn what_a_reload_cannot_change_is_kept_and_named() {
    let old = with("").unwrap();
    let mut new = with("[[dialect]]\npath = \"/t\"\n[limits]\nlogin-failures = 5\n").unwrap();
    assert!(new.keep_fixed(&old).is_empty());
    assert_eq!(new.limits.login_failures, 5);
    new.state_dir = "/elsewhere".into();
    new.limits.max_clients = 5;
    new.listeners[0].mode = Mode::Plain;
    assert_eq!(new.keep_fixed(&old), ["state-dir", "limits.max-clients"]);
    assert_eq!(new.state_dir, old.state_dir);
    assert_eq!(new.listeners[0].mode, Mode::Plain);
}

#[test]
fn certificates_and_services_by_name() {
    let config = with(
        "[[certificate]]\nnames = [\"App.Example.\", \"*.b.example\"]\nchain = \"c.pem\"\nkey = \"k.pem\"\n\
         [front]\ndefault-service = \"box.example\"\nsilent = \"mail.example\"\n",
    )
    .unwrap();
    let names: Vec<_> = config.certificates[0]
        .names
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(names, ["app.example", "*.b.example"]);
    assert_eq!(
        config.certificates[0].files.key,
        Path::new("/etc/rvpn/k.pem")
    );
    let text = |name: &Option<Name>| name.as_ref().map(ToString::to_string);
    let front = &config.front;
    assert_eq!(text(&front.ssh).as_deref(), Some("box.example"));
    assert_eq!(text(&front.other).as_deref(), Some("box.example"));
    assert_eq!(text(&front.silent).as_deref(), Some("mail.example"));
    let twice =
        "[[certificate]]\nnames = [\"a.example\", \"A.example\"]\nchain = \"c\"\nkey = \"k\"\n";
    assert!(refused(twice).contains("a.example\" is there twice"));
    assert!(
        refused("[[certificate]]\nnames = []\nchain = \"c\"\nkey = \"k\"\n")
            .contains("names is empty")
    );
    assert!(refused("[front]\nssh = \"a b\"\n").contains("front: ssh \"a b\""));
}

#[test]
fn names_have_the_nearest_policy() {
    let config = with("names = [\"vpn.ex.org\"]\n");
    assert!(config.is_err(), "a top-level key belongs before the tables");
    let config = with(
        "[serve]\ndomain = \"T.ex.org\"\nreserved = [\"*.int.ex.org\"]\nbalance = \"by-source\"\n\
         [serve.dead-time]\nidle = 5\n\
         [[name]]\npattern = \"*.a.ex.org\"\nhttp = \"redirect\"\ntls = \"terminate\"\n\
         [[name]]\npattern = \"x.a.ex.org\"\nhttp = \"acme-only\"\nbalance = \"least-connections\"\n",
    )
    .unwrap();
    let serve = &config.serve;
    let of = |name: &str| serve.policy(&name.parse().unwrap());
    assert_eq!(of("x.a.ex.org").http, serve::Http::AcmeOnly);
    assert_eq!(of("x.a.ex.org").tls, None);
    assert_eq!(of("y.z.a.ex.org").http, serve::Http::Redirect);
    assert_eq!(of("y.a.ex.org").tls, Some(serve::Tls::Terminate));
    assert_eq!(of("a.ex.org"), serve::Policy::default());
    let balance = |pattern: &str| serve.balance_of(&pattern.parse().unwrap());
    assert_eq!(balance("x.a.ex.org"), serve::Balance::LeastConnections);
    assert_eq!(balance("*.a.ex.org"), serve::Balance::BySource);
    assert_eq!(serve.domain.as_ref().unwrap().as_str(), "t.ex.org");
    assert_eq!(serve.dead_time.idle.as_secs(), 5);
    assert_eq!(serve.terminated().count(), 1);
    for (wrong, what) in [
        ("[serve]\ndomain = \"org\"\n", "one label"),
        ("[serve]\ndomain = \"1.2.3.4\"\n", "address"),
        ("[serve]\nidle-seconds = 0\n", "idle-seconds"),
        ("[[name]]\npattern = \"*.org\"\n", "*.org"),
        (
            "[[name]]\npattern = \"a.ex\"\n[[name]]\npattern = \"A.ex\"\n",
            "twice",
        ),
        (
            "[[name]]\npattern = \"a.ex\"\nhttp = \"fowrard\"\n",
            "fowrard",
        ),
    ] {
        let error = refused(wrong);
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn older_tunnel_clients_are_let_in_where_a_block_has_names_for_them() {
    let block = "[[legacy]]\nname = \"old\"\nsecret = \"s\"\n";
    let named =
        format!("{block}domains = [\"a.ex\"]\nports = [80, \"90-99\"]\nprofile = \"go-2017\"\n");
    assert!(!with("").unwrap().packer.enabled);
    assert!(!with(block).unwrap().packer.enabled);
    let config = with(&named).unwrap();
    assert!(config.packer.enabled);
    assert_eq!(config.legacy[0].ports, [80..=80, 90..=99]);
    let off = format!("[packer]\nenabled = false\n{named}");
    assert!(!with(&off).unwrap().packer.enabled);
    let on = with("[packer]\nenabled = true\nprofile = \"node-2018\"\n").unwrap();
    assert_eq!(on.packer.profile.unwrap().as_str(), "node-2018");
    for (wrong, what) in [
        (format!("{block}ports = [0]\n"), "port 0"),
        (format!("{block}ports = [\"9-8\"]\n"), "\"9-8\""),
        (format!("{block}profile = \"node\"\n"), "go-2020"),
        (
            "[packer]\nprofile = \"c1\"\n".to_owned(),
            "packer: profile \"c1\"",
        ),
    ] {
        let error = refused(&wrong);
        assert!(error.contains(what), "{error}");
    }
}
