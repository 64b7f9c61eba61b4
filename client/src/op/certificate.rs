//! Certificates that the gateway gets by itself.

use hyper::Method;

use super::{print, segment, text};
use crate::cli::Certificate;
use crate::fail::Outcome;
use crate::http::api;
use crate::text::{now, span, table};

pub(crate) async fn run(what: Certificate) -> Outcome {
    match what {
        Certificate::Ls { admin } => {
            let found = api(&admin, Method::GET, "/api/v1/certificates", None).await?;
            if admin.json {
                print(&found);
                return Ok(());
            }
            let head = ["NAME", "KIND", "STATE", "ENDS IN", "NEXT TRY", "FAILURES"];
            let mut rows = vec![head.map(str::to_owned).to_vec()];
            let mut errors = Vec::new();
            for one in found["certificates"].as_array().into_iter().flatten() {
                let until = |key: &str| {
                    let at = one[key].as_u64()?;
                    Some(span(at.saturating_sub(now())))
                };
                rows.push(vec![
                    text(one, "name"),
                    text(one, "kind"),
                    text(one, "state"),
                    until("not-after").unwrap_or_else(|| "-".to_owned()),
                    until("next").unwrap_or_else(|| "-".to_owned()),
                    text(one, "failures"),
                ]);
                if one["error"].is_string() {
                    let [name, error, remedy] = ["name", "error", "remedy"].map(|k| text(one, k));
                    errors.push(format!("{name}: {error}\n    {remedy}"));
                }
            }
            print!("{}", table(&rows));
            for error in errors {
                println!("\n{error}");
            }
            Ok(())
        }
        Certificate::Retry { admin, name } => {
            let path = format!("/api/v1/certificates/{}/retry", segment(&name));
            api(&admin, Method::POST, &path, None).await?;
            println!("asked for again; see 'rvpn certificate ls'");
            Ok(())
        }
    }
}
