//! Decides, for each target, whether to tunnel, intercept or refuse, and for each request which rule
//! covers it. Pure: a snapshot that is replaced as a whole, never changed.

mod hosts;
pub mod pattern;

use std::cell::LazyCell;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use http::Method;

use crate::credential::{CredentialName, LoginKind};
use crate::inject::Injection;
use crate::origin::{Host, Origin, Scheme, Target};
use hosts::Hosts;
use pattern::{CanonicalPath, HostPattern, PathPrefix};

/// One rule of the configuration.
#[derive(Debug)]
pub struct Rule {
    /// Unique among all rules.
    pub name: String,
    /// Which hosts it speaks of.
    pub host: HostPattern,
    /// Paths that it covers; empty means all.
    pub paths: Vec<PathPrefix>,
    /// Methods that it covers; empty means all.
    pub methods: Vec<Method>,
    /// What it does.
    pub action: Action,
    /// What becomes of requests on its hosts that no rule covers.
    pub unmatched: Unmatched,
    /// Whether a client that asks for a WebSocket is told to do without (426) when none can be had.
    pub websocket_fallback: bool,
    /// Whether the credential is looked for in answers, and filler put in its place.
    pub scrub: bool,
    /// Whether it is looked at before every rule that is not, however those fit: one that the owner of
    /// the machine wrote.
    pub pinned: bool,
}

/// What a rule does to the requests that it covers.
#[derive(Debug)]
pub enum Action {
    /// Signs the request in.
    Inject {
        /// With what.
        uses: Use,
        /// In which header fields.
        injection: Injection,
    },
    /// Looks after a login's token and revoke endpoints.
    Issuer {
        /// Whose.
        uses: Use,
    },
    /// Refuses the request: an endpoint where a signed-in request could make new credentials.
    Refuse,
    /// Never touches the host: bytes are tunnelled.
    Tunnel,
}

/// A credential as a rule refers to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Use {
    /// Its name.
    pub credential: CredentialName,
    /// The rule is in force only while the login is of this kind; `None` for any.
    pub login: Option<LoginKind>,
}

impl Action {
    /// Whether the client's TLS is ended for it.
    pub fn intercepts(&self) -> bool {
        !matches!(self, Self::Tunnel)
    }

    /// The credential that the action needs, if any.
    pub fn uses(&self) -> Option<&Use> {
        match self {
            Self::Inject { uses, .. } | Self::Issuer { uses } => Some(uses),
            Self::Refuse | Self::Tunnel => None,
        }
    }
}

/// What becomes of requests on an intercepted host that no rule covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unmatched {
    /// Sent on as they are.
    #[default]
    Forward,
    /// Refused.
    Refuse,
}

/// What becomes of hosts without a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DefaultAction {
    /// Refused.
    Refuse,
    /// Tunnelled byte for byte.
    #[default]
    Tunnel,
}

/// What to do with a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// End the client's TLS and look at each request.
    Intercept,
    /// Do not connect.
    Refuse,
    /// Carry bytes, see nothing.
    Tunnel,
}

/// What to do with a plain `http://` request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plain {
    /// Send it on; no rule ever applies to it.
    Forward,
    /// Refuse it: the host has no rule, and those are refused.
    NoRule,
    /// Refuse it: a rule speaks of the host, which is therefore only spoken to over TLS.
    OnlyTls,
}

/// The rule for a request on an intercepted host.
#[derive(Clone, Copy, Debug)]
pub enum Found<'a> {
    /// This one covers it.
    Rule(&'a Arc<Rule>),
    /// None does.
    Unmatched(Unmatched),
}

/// All rules and the kinds of login that are in force.
///
/// Precedence: a pinned rule first; then exact host before wildcard, the longer wildcard first; then the
/// longest literal path; then a rule with methods; then declaration order.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    ordered: Arc<Ordered>,
    default: DefaultAction,
    kinds: Arc<BTreeMap<CredentialName, LoginKind>>,
}

#[derive(Debug, Default)]
struct Ordered {
    /// One entry for each path of each rule, the one that is looked at first in front.
    entries: Vec<Entry>,
    /// Where among them those of a host are.
    hosts: Hosts,
}

#[derive(Debug)]
struct Entry {
    rule: Arc<Rule>,
    /// `None` covers every path, even one that has no canonical form.
    path: Option<PathPrefix>,
}

impl Rules {
    /// Rules in the order of their declaration. No login is known yet: see [`Rules::with_kinds`].
    pub fn new(rules: Vec<Rule>, default: DefaultAction) -> Self {
        let mut entries: Vec<Entry> = rules.into_iter().flat_map(entries_of).collect();
        entries.sort_by(Entry::by_precedence);
        let hosts = Hosts::of(entries.iter().map(|entry| &entry.rule.host));
        Self { ordered: Arc::new(Ordered { entries, hosts }), default, kinds: Arc::default() }
    }

    /// The same rules under other logins. A credential without an entry has no login, or one of no
    /// kind; its rules are then in force, so that its hosts are refused with what to type.
    #[must_use]
    pub fn with_kinds(&self, kinds: BTreeMap<CredentialName, LoginKind>) -> Self {
        Self { kinds: Arc::new(kinds), ..self.clone() }
    }

    /// What to do with a target. A host whose rules are all for another kind of login is tunnelled.
    pub fn decide(&self, target: &Target) -> Decision {
        let mut on_host = self.on_host(target).peekable();
        let Some(first) = on_host.peek() else {
            return match self.default {
                DefaultAction::Refuse => Decision::Refuse,
                DefaultAction::Tunnel => Decision::Tunnel,
            };
        };
        if matches!(first.action, Action::Tunnel) {
            return Decision::Tunnel;
        }
        if on_host.any(|rule| rule.action.uses().is_some() && self.is_in_force(rule)) {
            Decision::Intercept
        } else {
            Decision::Tunnel
        }
    }

    /// What to do with a plain `http://` request to a target, at whatever port its host is ruled.
    pub fn decide_plain(&self, target: &Target) -> Plain {
        match self.of_host(&target.host).find(|entry| entry.rule.action.intercepts()) {
            Some(_) => Plain::OnlyTls,
            None if self.decide(target) == Decision::Refuse => Plain::NoRule,
            None => Plain::Forward,
        }
    }

    /// The rule that covers a request. `path` is without query. Never one for an origin without TLS. A path of two
    /// readings is refused where a rule with paths goes before the one that it would have.
    pub fn find(&self, origin: &Origin, method: &Method, path: &str) -> Found<'_> {
        if origin.scheme != Scheme::Https {
            return Found::Unmatched(Unmatched::Forward);
        }
        // Most rules have no paths.
        let path = LazyCell::new(|| CanonicalPath::of(path));
        let (mut unmatched, mut has_paths) = (Unmatched::Forward, false);
        for entry in self.of_target(&origin.target) {
            if !self.is_in_force(&entry.rule) {
                continue;
            }
            if entry.covers(method, || path.as_ref()) {
                // The upstream may read a path of two readings as one that goes before.
                let is_certain = !has_paths || path.is_some();
                return if is_certain {
                    Found::Rule(&entry.rule)
                } else {
                    Found::Unmatched(Unmatched::Refuse)
                };
            }
            has_paths |= entry.path.is_some();
            if entry.rule.unmatched == Unmatched::Refuse {
                unmatched = Unmatched::Refuse;
            }
        }
        Found::Unmatched(unmatched)
    }

    /// Whether the login is of the kind that the rule asks for, or there is none.
    pub fn is_in_force(&self, rule: &Rule) -> bool {
        let Some(Use { credential, login: Some(wanted) }) = rule.action.uses() else { return true };
        self.kinds.get(credential).is_none_or(|kind| kind == wanted)
    }

    /// The hosts that the local CA must be able to sign for: those of every rule that may intercept.
    pub fn constraints(&self) -> Vec<Host> {
        let intercepting = self.iter().filter(|rule| rule.action.intercepts());
        let mut hosts: Vec<Host> = intercepting.map(|rule| rule.host.constraint()).collect();
        hosts.sort();
        hosts.dedup();
        hosts
    }

    /// All rules, first the ones that are looked at first; one with several paths comes several times.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Rule>> {
        self.ordered.entries.iter().map(|entry| &entry.rule)
    }

    /// The rules that speak of a target, in force or not, first the ones that are looked at first.
    pub fn on_host(&self, target: &Target) -> impl Iterator<Item = &Arc<Rule>> {
        self.of_target(target).map(|entry| &entry.rule)
    }

    fn of_target(&self, target: &Target) -> impl Iterator<Item = &Entry> {
        self.of_host(&target.host).filter(|entry| entry.rule.host.is_at(target.port))
    }

    /// The entries that speak of a host, at whatever port. What it takes does not grow with the number of rules for others.
    fn of_host(&self, host: &Host) -> impl Iterator<Item = &Entry> {
        let Ordered { entries, hosts } = &*self.ordered;
        hosts.places(host).map(|place| &entries[place])
    }
}

fn entries_of(rule: Rule) -> Vec<Entry> {
    let rule = Arc::new(rule);
    if rule.paths.is_empty() {
        return vec![Entry { rule, path: None }];
    }
    let entry = |path: &PathPrefix| Entry { rule: rule.clone(), path: Some(path.clone()) };
    rule.paths.iter().map(entry).collect()
}

impl Entry {
    /// `path` is asked for only where the entry has one.
    fn covers<'a>(
        &self,
        method: &Method,
        path: impl FnOnce() -> Option<&'a CanonicalPath<'a>>,
    ) -> bool {
        let methods = &self.rule.methods;
        (methods.is_empty() || methods.contains(method))
            && match &self.path {
                None => true,
                Some(prefix) => path().is_some_and(|path| prefix.covers(path)),
            }
    }

    /// Declaration order is kept by a stable sort.
    fn by_precedence(&self, other: &Self) -> Ordering {
        let path_len = |entry: &Self| entry.path.as_ref().map_or(0, PathPrefix::len);
        (other.rule.pinned.cmp(&self.rule.pinned))
            .then_with(|| self.rule.host.by_precedence(&other.rule.host))
            .then_with(|| path_len(other).cmp(&path_len(self)))
            .then_with(|| self.rule.methods.is_empty().cmp(&other.rule.methods.is_empty()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::inject::Template;

    fn rule(name: &str, host: &str, paths: &[&str], methods: &[Method]) -> Rule {
        let set = vec![(http::header::AUTHORIZATION, Template::token())];
        Rule {
            name: name.into(),
            host: HostPattern::parse(host).unwrap(),
            paths: paths.iter().map(|path| PathPrefix::parse(path).unwrap()).collect(),
            methods: methods.to_vec(),
            action: Action::Inject {
                uses: Use { credential: "openai".parse().unwrap(), login: None },
                injection: Injection::new(set, vec![]).unwrap(),
            },
            unmatched: Unmatched::Forward,
            websocket_fallback: false,
            scrub: false,
            pinned: false,
        }
    }

    fn with_login(mut rule: Rule, login: LoginKind) -> Rule {
        if let Action::Inject { uses, .. } = &mut rule.action {
            uses.login = Some(login);
        }
        rule
    }

    fn target(text: &str) -> Target {
        Target::parse(text).unwrap()
    }

    fn found(rules: &Rules, host: &str, method: &Method, path: &str) -> String {
        match rules.find(&Origin::https(target(host)), method, path) {
            Found::Rule(rule) => rule.name.clone(),
            Found::Unmatched(unmatched) => format!("{unmatched:?}"),
        }
    }

    #[test]
    fn precedence() {
        let rules = Rules::new(
            vec![
                rule("wide", "*.example.com", &[], &[]),
                rule("wider", "*.b.example.com", &[], &[]),
                rule("any-path", "api.example.com", &[], &[]),
                rule("v1", "api.example.com", &["/v1/"], &[]),
                rule("v1-post", "api.example.com", &["/v1/"], &[Method::POST]),
                rule("v1-late", "api.example.com", &["/v1/"], &[]),
                rule("two-paths", "api.example.com", &["/v1/chat/long/path/", "/v"], &[]),
                rule("files", "api.example.com", &["/v1/files"], &[]),
            ],
            DefaultAction::Tunnel,
        );
        let table = [
            ("api.example.com:443", Method::GET, "/", "any-path"),
            ("api.example.com:443", Method::GET, "/v1/x", "v1"),
            ("api.example.com:443", Method::POST, "/v1/x", "v1-post"),
            ("api.example.com:443", Method::POST, "/v1/files", "files"),
            ("api.example.com:443", Method::GET, "/v1/chat/long/path/x", "two-paths"),
            ("api.example.com:443", Method::GET, "/v1/chat", "v1"),
            ("api.example.com:443", Method::GET, "/v1/../v1/files", "Refuse"),
            ("web.example.com:443", Method::GET, "/v1/../v1/files", "wide"),
            ("web.example.com:443", Method::GET, "/v1/x", "wide"),
            ("a.b.example.com:443", Method::GET, "/", "wider"),
            ("api.example.com:8443", Method::GET, "/", "Forward"),
            ("other.example:443", Method::GET, "/", "Forward"),
        ];
        for (host, method, path, expected) in table {
            assert_eq!(found(&rules, host, &method, path), expected, "{method} {host}{path}");
        }
    }

    #[test]
    fn a_pinned_rule_is_looked_at_first() {
        let pinned = |rule: Rule| Rule { pinned: true, ..rule };
        let mut never = rule("never", "*.tunnel.example", &[], &[]);
        never.action = Action::Tunnel;
        let rules = Rules::new(
            vec![
                rule("exact", "api.example.com", &["/v1/chat/long/path/"], &[Method::GET]),
                rule("own", "a.tunnel.example", &["/v1/"], &[]),
                pinned(rule("wide", "*.example.com", &["/v1/"], &[])),
                pinned(rule("wide-post", "*.example.com", &["/v1/"], &[Method::POST])),
                pinned(never),
            ],
            DefaultAction::Tunnel,
        );
        let table = [
            (Method::GET, "/v1/chat/long/path/x", "wide"),
            (Method::POST, "/v1/chat/long/path/x", "wide-post"),
            (Method::GET, "/other", "Forward"),
        ];
        for (method, path, expected) in table {
            assert_eq!(found(&rules, "api.example.com:443", &method, path), expected, "{path}");
        }
        assert_eq!(rules.decide(&target("a.tunnel.example:443")), Decision::Tunnel);
    }

    #[test]
    fn odd_paths_are_covered_by_no_rule_with_paths() {
        let mut refuse = rule("v1", "a.example", &["/v1/"], &[]);
        refuse.unmatched = Unmatched::Refuse;
        let rules = Rules::new(vec![refuse], DefaultAction::Tunnel);
        for path in ["/v1/../admin", "/v1/%2e%2e/admin", "/v1//admin", "/v1\\admin", "/v1x"] {
            assert_eq!(found(&rules, "a.example:443", &Method::GET, path), "Refuse", "{path}");
        }
        assert_eq!(found(&rules, "a.example:443", &Method::GET, "/v1/admin"), "v1");
    }

    #[test]
    fn plain_http_has_no_rule() {
        let rules = Rules::new(vec![rule("all", "a.example:80", &[], &[])], DefaultAction::Tunnel);
        let origin = Origin { scheme: Scheme::Http, target: target("a.example:80") };
        assert!(matches!(rules.find(&origin, &Method::GET, "/"), Found::Unmatched(_)));
        assert_eq!(rules.on_host(&origin.target).count(), 1);
    }

    #[test]
    fn the_kind_of_login_decides_what_is_intercepted() {
        let mut tunnel = rule("ab", "ab.chatgpt.com", &[], &[]);
        tunnel.action = Action::Tunnel;
        let rules = Rules::new(
            vec![
                with_login(
                    rule("chatgpt", "chatgpt.com", &["/backend-api/"], &[]),
                    LoginKind::ChatGpt,
                ),
                with_login(rule("sub", "*.chatgpt.com", &[], &[]), LoginKind::ChatGpt),
                with_login(rule("api", "api.openai.com", &["/v1/"], &[]), LoginKind::ApiKey),
                tunnel,
            ],
            DefaultAction::Refuse,
        );
        use Decision::{Intercept, Refuse, Tunnel};
        let table = [
            (None, [Intercept, Intercept, Intercept, Tunnel, Refuse]),
            (Some(LoginKind::ChatGpt), [Intercept, Intercept, Tunnel, Tunnel, Refuse]),
            (Some(LoginKind::ApiKey), [Tunnel, Tunnel, Intercept, Tunnel, Refuse]),
        ];
        let hosts =
            ["chatgpt.com", "eu.chatgpt.com", "api.openai.com", "ab.chatgpt.com", "evil.example"];
        for (kind, expected) in table {
            let kinds = kind.map(|kind| ("openai".parse().unwrap(), kind)).into_iter().collect();
            let rules = rules.with_kinds(kinds);
            for (host, expected) in hosts.iter().zip(expected) {
                assert_eq!(
                    rules.decide(&target(&format!("{host}:443"))),
                    expected,
                    "{kind:?} {host}"
                );
            }
        }
    }

    #[test]
    fn the_ca_signs_only_what_may_be_intercepted() {
        let mut tunnel = rule("t", "tunnel.example", &[], &[]);
        tunnel.action = Action::Tunnel;
        let rules = vec![
            rule("a", "*.example.com", &[], &[]),
            rule("b", "127.0.0.1:8443", &[], &[]),
            tunnel,
        ];
        let hosts: Vec<_> = Rules::new(rules, DefaultAction::Tunnel)
            .constraints()
            .iter()
            .map(Host::to_string)
            .collect();
        assert_eq!(hosts, ["127.0.0.1", "example.com"]);
    }

    #[test]
    fn of_ten_thousand_rules_those_of_the_host_are_looked_at() {
        let other = |number: usize| match number % 2 {
            0 => rule("", &format!("*.w{number}.example.com"), &[], &[]),
            _ => rule("", &format!("h{number}.example.com"), &[], &[]),
        };
        let asked = [
            rule("", "*.b.example.com", &["/v1/", "/v2/"], &[]),
            rule("", "a.b.example.com", &[], &[]),
        ];
        let rules: Vec<_> = (0..10_000).map(other).chain(asked).collect();
        let rules = Rules::new(rules, DefaultAction::Tunnel);
        let table = [
            ("a.b.example.com", 3),
            ("x.b.example.com", 2),
            ("h1.example.com", 1),
            ("x.w2.example.com", 1),
            ("x.h1.example.com", 0),
            ("w2.example.com", 0),
            ("127.0.0.1", 0),
        ];
        for (host, expected) in table {
            let host = Host::parse(host).unwrap();
            assert_eq!(rules.of_host(&host).count(), expected, "{host}");
        }
    }

    /// What is said of a target and of a request, by a walk over all rules.
    fn walked(rules: &Rules, target: &Target, method: &Method, path: &str) -> (bool, String) {
        let is_only_tls =
            rules.iter().any(|it| it.action.intercepts() && it.host.matches_host(&target.host));
        let path = CanonicalPath::of(path);
        let (mut unmatched, mut has_paths) = (Unmatched::Forward, false);
        for entry in rules.ordered.entries.iter().filter(|it| it.rule.host.matches(target)) {
            if !rules.is_in_force(&entry.rule) {
                continue;
            }
            if entry.covers(method, || path.as_ref()) {
                let is_certain = path.is_some() || !has_paths;
                let name = if is_certain { entry.rule.name.clone() } else { "Refuse".to_owned() };
                return (is_only_tls, name);
            }
            has_paths |= entry.path.is_some();
            if entry.rule.unmatched == Unmatched::Refuse {
                unmatched = Unmatched::Refuse;
            }
        }
        (is_only_tls, format!("{unmatched:?}"))
    }

    const ANY_HOST: &str = "127\\.0\\.0\\.[12]|[ab](\\.[ab]){1,3}";

    prop_compose! {
        fn any_rule()(
            host in "127\\.0\\.0\\.1|(\\*\\.)?[ab](\\.[ab]){1,2}", port in "(:8443)?",
            paths in prop::collection::vec("/[ab]?|/[ab]/[ab]", 0..3), is_for_post: bool,
            login in prop::option::of(prop::bool::ANY), tunnels in prop::bool::weighted(0.2),
            refuses: bool, pinned: bool,
        ) -> Rule {
            let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
            let methods = if is_for_post { vec![Method::POST] } else { Vec::new() };
            let mut rule = Rule { pinned, ..rule("", &format!("{host}{port}"), &paths, &methods) };
            if let Some(is_chatgpt) = login {
                let kind = if is_chatgpt { LoginKind::ChatGpt } else { LoginKind::ApiKey };
                rule = with_login(rule, kind);
            }
            if tunnels {
                rule.action = Action::Tunnel;
            }
            if refuses {
                rule.unmatched = Unmatched::Refuse;
            }
            rule
        }
    }

    proptest! {
        #[test]
        fn what_is_found_is_what_a_walk_over_all_rules_finds(
            written in prop::collection::vec(any_rule(), 0..40),
            asked in prop::collection::vec(
                (ANY_HOST, any::<bool>(), any::<bool>(), "/|(/[ab]){1,3}|/a/\\.\\./b"), 20,
            ),
        ) {
            let named = |(at, rule)| Rule { name: format!("rule {at}"), ..rule };
            let rules = written.into_iter().enumerate().map(named).collect();
            let kinds = [("openai".parse().unwrap(), LoginKind::ChatGpt)].into_iter().collect();
            let rules = Rules::new(rules, DefaultAction::Tunnel).with_kinds(kinds);
            for (host, is_usual_port, is_post, path) in asked {
                let port = if is_usual_port { 443 } else { 8443 };
                let host = format!("{host}:{port}");
                let method = if is_post { Method::POST } else { Method::GET };
                let target = target(&host);
                let all: Vec<_> = rules.iter().filter(|it| it.host.matches(&target)).collect();
                let on_host: Vec<_> = rules.on_host(&target).collect();
                prop_assert_eq!(on_host.len(), all.len());
                prop_assert!(on_host.iter().zip(&all).all(|(one, other)| Arc::ptr_eq(one, other)));
                let is_only_tls = rules.decide_plain(&target) == Plain::OnlyTls;
                let got = (is_only_tls, found(&rules, &host, &method, &path));
                prop_assert_eq!(got, walked(&rules, &target, &method, &path), "{} {}", host, path);
            }
        }
    }
}
