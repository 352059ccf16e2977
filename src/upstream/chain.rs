//! The chain: our own upstream proxy, which targets go through it, and the tunnel that it opens.

pub mod auth;
mod connect;
pub mod no_proxy;
mod socks;

use std::fmt;
use std::sync::Arc;

use super::{Stage, UpstreamError};
use crate::origin::{ProxyScheme, Target};
use auth::{NoLogin, ProxyAuth};
use no_proxy::NoProxy;

pub(super) use connect::{Conversation, Opened, open_tunnel};
pub(super) use socks::open as open_socks;

/// Which proxy, if any, stands between us and a target.
#[derive(Clone, Default)]
pub struct Chain(Option<Hop>);

/// One proxy to go through.
#[derive(Clone)]
pub struct Hop {
    /// How it is spoken to.
    pub scheme: ProxyScheme,
    /// Where it is.
    pub proxy: Target,
    /// How it is shown who we are.
    pub auth: Arc<dyn ProxyAuth>,
    /// What is reached without it.
    pub direct: NoProxy,
}

impl Chain {
    /// No proxy for any target.
    pub fn none() -> Self {
        Self::default()
    }

    /// One proxy for every target but those that are reached without it, and this machine's loopback,
    /// which through a proxy would be the proxy's own.
    pub fn via(hop: Hop) -> Self {
        Self(Some(hop))
    }

    /// The proxy to go through for a target.
    pub fn hop(&self, target: &Target) -> Option<&Hop> {
        self.0.as_ref().filter(|hop| !target.host.is_loopback() && !hop.direct.covers(target))
    }
}

impl Hop {
    pub(super) fn no_login(&self, error: NoLogin) -> UpstreamError {
        UpstreamError::new(Stage::ChainLogin(error.0), &self.proxy)
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Chain").field(&self.0).finish()
    }
}

impl fmt::Debug for Hop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hop").field("proxy", &self.proxy).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_targets_go_through() {
        let chain = Chain::via(Hop {
            scheme: ProxyScheme::Http,
            proxy: Target::parse("proxy.example:3128").unwrap(),
            auth: Arc::new(auth::NoAuth),
            direct: NoProxy::parse("a.example").0,
        });
        let table = [
            ("a.example:443", false),
            ("b.example:443", true),
            ("localhost:443", false),
            ("127.0.0.1:8443", false),
            ("[::1]:443", false),
            ("10.0.0.1:443", true),
        ];
        for (target, through) in table {
            let target = Target::parse(target).unwrap();
            assert_eq!(chain.hop(&target).is_some(), through, "{target}");
            assert!(Chain::none().hop(&target).is_none());
        }
    }
}
