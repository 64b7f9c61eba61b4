//! Ports that a gateway opens and closes while it runs.

use hyper::Method;
use serde_json::json;

use super::{print, segment, text};
use crate::cli::{Admin, Listener, ListenerAdd};
use crate::fail::Outcome;
use crate::http::api;
use crate::text::table;

const PATH: &str = "/api/v1/listeners";

pub(crate) async fn run(what: Listener) -> Outcome {
    match what {
        Listener::Ls { admin } => list(&admin).await,
        Listener::Add(args) => add(args).await,
        Listener::Rm { admin, at } => {
            let path = format!("{PATH}/{}", segment(&at));
            api(&admin, Method::DELETE, &path, None).await?;
            println!("closed {at}; whoever came through it stays");
            Ok(())
        }
    }
}

async fn list(admin: &Admin) -> Outcome {
    let found = api(admin, Method::GET, PATH, None).await?;
    if admin.json {
        print(&found);
        return Ok(());
    }
    let head = ["ADDRESS", "MODE", "FOR", "FROM"].map(str::to_owned);
    let mut rows = vec![head.to_vec()];
    for one in found["listeners"].as_array().into_iter().flatten() {
        let columns = ["address", "mode", "for", "origin"];
        rows.push(columns.map(|c| text(one, c)).to_vec());
    }
    print!("{}", table(&rows));
    Ok(())
}

async fn add(args: ListenerAdd) -> Outcome {
    let mut body = match args.at.parse::<u16>() {
        Ok(port) => json!({ "port": port }),
        Err(_) => json!({ "address": args.at }),
    };
    if let Some(mode) = &args.mode {
        body["mode"] = mode.as_str().into();
    }
    if let Some(name) = &args.name {
        body["for"] = name.as_str().into();
    }
    if !args.proxy_from.is_empty() {
        body["proxy-from"] = args.proxy_from.into();
    }
    let made = api(&args.admin, Method::POST, PATH, Some(&body)).await?;
    if args.admin.json {
        print(&made);
        return Ok(());
    }
    println!("{}: {}", text(&made, "address"), text(&made, "status"));
    eprintln!(
        "it is gone after a restart of the gateway, unless a [[listener]] of the configuration says so too"
    );
    Ok(())
}
