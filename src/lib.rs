//! A localhost HTTPS forward proxy that signs tools in without giving them the keys.

pub mod access;
pub mod cli;
pub mod client_env;
pub mod clock;
pub mod config;
pub mod credential;
pub mod decoy;
pub mod group;
pub mod headers;
pub mod inject;
pub mod oauth;
pub mod origin;
pub mod peer;
pub mod policy;
pub mod proxy;
pub mod quote;
pub mod rules;
pub mod sandbox;
pub mod secret;
pub mod source;
pub mod store;
pub mod tasks;
pub mod telemetry;
pub mod tls;
pub mod tokens;
pub mod upstream;
