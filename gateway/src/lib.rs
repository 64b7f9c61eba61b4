//! The gateway's parts, as a library so that tests and benches can hold them.

pub mod admit;
pub mod api;
pub mod auth;
pub mod config;
pub mod cores;
pub mod demo;
pub mod dialects;
pub mod fd;
pub mod front;
pub mod helper;
pub mod http;
pub mod lifecycle;
pub mod limits;
pub mod listener;
pub mod meter;
pub mod page;
pub mod proxy;
pub mod pump;
pub mod serve;
pub mod session;
pub mod store;
pub mod ticket;
pub mod tls;
pub mod tun;
