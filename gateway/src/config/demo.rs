//! The first demonstration's switches.

use std::sync::Arc;
use std::time::Duration;

use super::check::Checked;
use super::{Demo, Dialect, raw};
use crate::demo::PATH;

pub(super) fn check(raw: &raw::Demo, dialects: &[Arc<Dialect>]) -> Checked<Option<Demo>> {
    let every = raw.every_seconds.unwrap_or(5);
    // A listener that hears nothing for longer cannot be told from a dead line.
    if !(1..=60).contains(&every) {
        return Err("demo: every-seconds must be between 1 and 60".to_owned());
    }
    let clients = raw.clients.unwrap_or(64);
    if !(1..=65_536).contains(&clients) {
        return Err("demo: clients must be between 1 and 65536".to_owned());
    }
    if !raw.echo {
        return match raw.anonymous {
            true => Err(
                "demo: anonymous without echo = true lets nobody in; add echo, or remove both"
                    .to_owned(),
            ),
            false => Ok(None),
        };
    }
    if dialects.iter().any(|d| d.path == PATH) {
        return Err(format!(
            "dialect \"{PATH}\": with demo.echo this path is the demonstration's; use another"
        ));
    }
    Ok(Some(Demo {
        anonymous: raw.anonymous,
        every: Duration::from_secs(every),
        clients,
    }))
}
