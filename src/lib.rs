//! A localhost HTTPS forward proxy that signs tools in without giving them the keys.

pub mod clock;
pub mod credential;
pub mod headers;
pub mod inject;
pub mod origin;
pub mod rules;
pub mod secret;
pub mod tasks;
