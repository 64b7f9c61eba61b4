//! Who is here, and who used how much.

use hyper::Method;
use serde_json::Value;

use super::{print, segment, text};
use crate::cli::{Session, Usage};
use crate::fail::{Failure, Outcome};
use crate::http::api;
use crate::text::{bytes, moment, now, span, table};

pub(crate) async fn run(what: Session) -> Outcome {
    match what {
        Session::Ls { admin } => {
            let found = api(&admin, Method::GET, "/api/v1/sessions", None).await?;
            if admin.json {
                print(&found);
                return Ok(());
            }
            let head = [
                "ID", "ACCOUNT", "SERVICE", "PEER", "SINCE", "ADDRESS", "OUT", "IN", "DROPS",
                "QUEUE",
            ];
            let mut rows = vec![head.map(str::to_owned).to_vec()];
            for one in found["sessions"].as_array().into_iter().flatten() {
                let started = one["started-ms"].as_u64().unwrap_or(0) / 1000;
                rows.push(vec![
                    text(one, "id").chars().take(12).collect(),
                    text(one, "account"),
                    text(one, "service"),
                    text(one, "peer"),
                    span(now().saturating_sub(started)),
                    first(&one["addresses"]),
                    payload(&one["outbound"]),
                    payload(&one["inbound"]),
                    (drops(&one["outbound"]) + drops(&one["inbound"])).to_string(),
                    bytes(one["queue"]["bytes"].as_u64().unwrap_or(0)),
                ]);
            }
            print!("{}", table(&rows));
            Ok(())
        }
        Session::End { admin, id } => {
            let found = api(&admin, Method::GET, "/api/v1/sessions", None).await?;
            let ids = found["sessions"].as_array().into_iter().flatten();
            let fitting: Vec<&str> = ids
                .filter_map(|s| s["id"].as_str())
                .filter(|s| s.starts_with(&id))
                .collect();
            let [one] = fitting.as_slice() else {
                return Err(Failure::usage(format!(
                    "{} sessions begin with '{id}': see 'rvpn session ls'",
                    fitting.len()
                )));
            };
            let path = format!("/api/v1/sessions/{}", segment(one));
            api(&admin, Method::DELETE, &path, None).await?;
            println!("ended {one}");
            Ok(())
        }
    }
}

fn first(addresses: &Value) -> String {
    addresses[0].as_str().unwrap_or("-").to_owned()
}

fn payload(side: &Value) -> String {
    bytes(side["payload"].as_u64().unwrap_or(0))
}

fn drops(side: &Value) -> u64 {
    let reasons = side["drops"].as_object().into_iter().flatten();
    reasons.filter_map(|(_, n)| n.as_u64()).sum()
}

pub(crate) async fn usage(args: Usage) -> Outcome {
    let mut path = match args.sessions {
        true => "/api/v1/usage?".to_owned(),
        false => "/api/v1/usage/accounts?".to_owned(),
    };
    path.push_str("limit=10000");
    if let Some(account) = &args.account {
        path.push_str(&format!("&account={}", segment(account)));
    }
    if let Some(last) = args.last {
        let since = now().saturating_sub(last.as_secs());
        path.push_str(&format!("&since-ms={}", since * 1000));
    }
    let found = api(&args.admin, Method::GET, &path, None).await?;
    if args.admin.json {
        print(&found);
        return Ok(());
    }
    let each = ["OUT", "PACKETS", "WIRE", "IN", "PACKETS", "WIRE"];
    let head: &[&str] = match args.sessions {
        true => &["SESSION", "ACCOUNT", "SERVICE", "BEGAN", "LASTED"],
        false => &["ACCOUNT", "SESSIONS"],
    };
    let mut rows = vec![head.iter().chain(&each).map(|h| (*h).to_owned()).collect()];
    let key = if args.sessions { "usage" } else { "accounts" };
    for one in found[key].as_array().into_iter().flatten() {
        let mut row = match args.sessions {
            true => {
                let began = one["started-ms"].as_u64().unwrap_or(0) / 1000;
                let lasted = match one["ended-ms"].as_u64() {
                    Some(end) => span((end / 1000).saturating_sub(began)),
                    None => "(running)".to_owned(),
                };
                vec![
                    text(one, "session").chars().take(12).collect(),
                    text(one, "account"),
                    text(one, "service"),
                    moment(began),
                    lasted,
                ]
            }
            false => vec![text(one, "account"), text(one, "sessions")],
        };
        for way in ["outbound", "inbound"] {
            let side = &one[way];
            row.push(payload(side));
            row.push(text(side, "packets"));
            row.push(bytes(side["wire"].as_u64().unwrap_or(0)));
        }
        rows.push(row);
    }
    print!("{}", table(&rows));
    Ok(())
}
