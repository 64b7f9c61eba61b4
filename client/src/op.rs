//! What operators ask of their gateway.

pub(crate) mod certificate;
pub(crate) mod invite;
pub(crate) mod listener;
pub(crate) mod session;
pub(crate) mod token;

use serde_json::Value;

/// Prints what the API said, for programs.
fn print(value: &Value) {
    println!("{value:#}");
}

/// A field that is a text, or a dash.
fn text(value: &Value, key: &str) -> String {
    match &value[key] {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

/// A moment, in seconds since 1970, or a dash.
fn when(value: &Value, key: &str) -> String {
    value[key]
        .as_u64()
        .map_or_else(|| "-".to_owned(), crate::text::moment)
}

/// A path segment from whatever it is.
fn segment(text: &str) -> String {
    text.bytes().fold(String::new(), |mut path, b| {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => path.push(b.into()),
            other => path.push_str(&format!("%{other:02X}")),
        }
        path
    })
}
