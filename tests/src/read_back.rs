//! What the kernel says, by tools that are not ours.

use serde_json::Value;

use crate::ns::Ns;

/// `nft -j list ruleset`.
pub fn nft(ns: &Ns) -> Value {
    let text = ns.sh("nft", &["-j", "list", "ruleset"]);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("nft: {e}: {text}"))
}

/// Packets a named counter of our table has counted.
pub fn counter(ns: &Ns, name: &str) -> u64 {
    let all = nft(ns);
    let found = all["nftables"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|o| o["counter"]["name"] == name);
    found
        .and_then(|o| o["counter"]["packets"].as_u64())
        .unwrap_or_else(|| panic!("no counter {name}"))
}

/// The rules without anything that counts, and without set elements.
pub fn rules_alone(ns: &Ns) -> Vec<Value> {
    let all = nft(ns);
    let mut out: Vec<Value> = all["nftables"]
        .as_array()
        .into_iter()
        .flatten()
        .cloned()
        .collect();
    for o in &mut out {
        strip(o);
    }
    out.retain(|o| o.get("counter").is_none() && o.get("metainfo").is_none());
    out
}

fn strip(v: &mut Value) {
    match v {
        Value::Object(map) => {
            for gone in ["elem", "handle", "packets", "bytes"] {
                map.remove(gone);
            }
            map.values_mut().for_each(strip);
        }
        Value::Array(all) => all.iter_mut().for_each(strip),
        _ => {}
    }
}

/// How many elements a set or map of our table holds.
pub fn elements(ns: &Ns, name: &str) -> usize {
    let all = nft(ns);
    for o in all["nftables"].as_array().into_iter().flatten() {
        for kind in ["set", "map"] {
            if o[kind]["name"] == name && o[kind]["table"] == "rvpn" {
                return o[kind]["elem"].as_array().map_or(0, Vec::len);
            }
        }
    }
    panic!("no set {name}");
}

/// Tracked flows of both families whose line holds the text.
pub fn flows(ns: &Ns, text: &str) -> Vec<String> {
    // Without a family the tool lists IPv4 alone.
    let mut out = ns.sh("conntrack", &["-L", "-f", "ipv4", "-o", "extended"]);
    out += &ns.sh("conntrack", &["-L", "-f", "ipv6", "-o", "extended"]);
    out.lines()
        .filter(|l| l.contains(text))
        .map(str::to_owned)
        .collect()
}

/// `ip -j` with these words.
pub fn ip_json(ns: &Ns, words: &str) -> Value {
    let text = ns.ip(&format!("-j {words}"));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("ip {words}: {e}: {text}"))
}

/// Names of devices of the pool.
pub fn devices(ns: &Ns) -> Vec<String> {
    let all = ip_json(ns, "link show");
    let mut names: Vec<String> = all
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|l| l["ifname"].as_str())
        .filter(|n| {
            n.strip_prefix("rv")
                .is_some_and(|d| d.parse::<u32>().is_ok())
        })
        .map(str::to_owned)
        .collect();
    names.sort_by_key(|n| n[2..].parse::<u32>().unwrap_or(0));
    names
}

/// Packets that a kernel refused for a bad checksum or header, in both families.
pub fn bad_sums(ns: &Ns) -> u64 {
    let read = |name: &str| {
        let path = format!("/proc/thread-self/net/{name}");
        ns.run(|| std::fs::read_to_string(&path))
            .unwrap_or_else(|e| panic!("{path}: {e}"))
    };
    let is_bad = |name: &str| name.ends_with("InCsumErrors") || name.ends_with("InHdrErrors");
    let number = |word: &str| word.parse::<u64>().expect("a number");
    // A line of names above one of values.
    let (four, six) = (read("snmp"), read("snmp6"));
    let (names, values) = (four.lines().step_by(2), four.lines().skip(1).step_by(2));
    let four = names
        .zip(values)
        .flat_map(|(names, values)| names.split_whitespace().zip(values.split_whitespace()));
    let six = six.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        words.next().zip(words.next())
    });
    let bad: Vec<u64> = four
        .chain(six)
        .filter(|(name, _)| is_bad(name))
        .map(|(_, value)| number(value))
        .collect();
    assert!(bad.len() >= 6, "fewer counters than there are: {bad:?}");
    bad.iter().sum()
}
