//! Invites: how devices come to a gateway.

use hyper::Method;
use qrcode::QrCode;
use qrcode::render::unicode::Dense1x2;
use serde_json::json;

use super::token::served_names;
use super::{print, segment, text, when};
use crate::cli::Invite;
use crate::fail::{Outcome, While as _};
use crate::http::api;
use crate::text::{span, table};

pub(crate) async fn run(args: Invite) -> Outcome {
    if let Some(id) = &args.remove {
        let path = format!("/api/v1/invites/{}", segment(id));
        api(&args.admin, Method::DELETE, &path, None).await?;
        println!("taken back");
        return Ok(());
    }
    if args.list {
        return list(&args).await;
    }
    let mut body = json!({
        "account": args.account,
        "uses": args.uses,
        "valid-seconds": args.valid.as_secs(),
        "class": args.class,
    });
    if let Some(valid) = args.device_valid {
        body["device-seconds"] = valid.as_secs().into();
    }
    if let Some(address) = &args.address {
        body["address"] = address.as_str().into();
    }
    if !args.names.is_empty() {
        body["names"] = served_names(&args.names)?.into();
    }
    if !args.ports.is_empty() {
        body["ports"] = args.ports.clone().into();
    }
    let made = api(&args.admin, Method::POST, "/api/v1/invites", Some(&body)).await?;
    if args.admin.json {
        print(&made);
        return Ok(());
    }
    let link = text(&made, "link");
    if args.qr {
        let code = QrCode::new(link.as_bytes()).while_doing("draw the link")?;
        // Dark on light, whatever the terminal's colours.
        let picture = code
            .render::<Dense1x2>()
            .dark_color(Dense1x2::Light)
            .light_color(Dense1x2::Dark)
            .build();
        println!("{picture}");
    }
    println!("{link}");
    eprintln!(
        "good for {} device(s) and {}; on the device: rvpn join 'LINK'",
        args.uses,
        span(args.valid.as_secs())
    );
    Ok(())
}

async fn list(args: &Invite) -> Outcome {
    let found = api(&args.admin, Method::GET, "/api/v1/invites", None).await?;
    if args.admin.json {
        print(&found);
        return Ok(());
    }
    let head = ["ID", "ACCOUNT", "LEFT", "EXPIRES"].map(str::to_owned);
    let mut rows = vec![head.to_vec()];
    for one in found["invites"].as_array().into_iter().flatten() {
        rows.push(vec![
            text(one, "id"),
            text(one, "account"),
            text(one, "left"),
            when(one, "expires"),
        ]);
    }
    print!("{}", table(&rows));
    Ok(())
}
