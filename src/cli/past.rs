//! Names the hosts that a rule signs in and that tools reach past the proxy, because they are this machine's own.

use std::collections::BTreeSet;

use crate::client_env;
use crate::origin::Target;
use crate::rules::Rules;

/// What to do about each of them.
pub(super) const FIX: &str = "give it another name under [upstream.resolve]";

/// Those that `run` and `env` put into `NO_PROXY` themselves.
pub(super) fn hosts_past(rules: &Rules) -> BTreeSet<Target> {
    let signing_in = rules.iter().filter(|rule| rule.action.uses().is_some());
    signing_in.filter_map(|rule| rule.host.target()).filter(goes_past).collect()
}

/// Whether tools reach a target past the proxy, whatever rules say.
pub(super) fn goes_past(target: &Target) -> bool {
    client_env::is_reached_directly(&target.host.to_string())
}

/// What becomes of a rule for such a host.
pub(super) fn sentence(target: &Target) -> String {
    format!("tools reach {target} past valetkey: NO_PROXY names it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_this_machine() {
        let table = [
            ("localhost:18443", true),
            ("127.0.0.1:443", true),
            ("[::1]:443", true),
            ("127.0.0.2:443", false),
            ("a.localhost:443", false),
            ("api.example.com:443", false),
        ];
        for (target, expected) in table {
            assert_eq!(goes_past(&Target::parse(target).unwrap()), expected, "{target}");
        }
    }
}
