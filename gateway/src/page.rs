//! What somebody sees who comes without knowing what is here: a page as a
//! freshly installed web server has it.

/// The page at `/`.
pub const LANDING: &str = "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Welcome</title></head>\n<body><h1>It works.</h1><p>There is nothing here yet.</p></body></html>\n";

/// Nothing may be loaded, run or framed.
pub const POLICY: &str = "default-src 'none'; frame-ancestors 'none'";
