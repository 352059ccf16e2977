//! Which rule covers a request, against an oracle that asks every rule and looks for the one that goes before.

use std::cmp::Reverse;
use std::time::Instant;

use http::Method;
use valetkey::inject::{Injection, Template};
use valetkey::origin::{Origin, Target};
use valetkey::rules::pattern::{HostPattern, PathPrefix};
use valetkey::rules::{Action, Decision, DefaultAction, Found, Plain, Rule, Rules, Unmatched, Use};

use super::attack::on_all_cores;
use crate::dice::Dice;
use crate::rounds;

#[test]
fn rules_decide_as_the_oracle_does() {
    let rounds = rounds(1_000_000, 50_000_000);
    let begun = Instant::now();
    let ruled = on_all_cores("rules", rounds / QUESTIONS, |dice| {
        let default = *dice.pick(&[DefaultAction::Refuse, DefaultAction::Tunnel]);
        let written: Vec<Written> = (0..=dice.below(7)).map(|at| Written::at(at, dice)).collect();
        let rules = Rules::new(written.iter().map(Written::rule).collect(), default);
        (0..QUESTIONS).map(|_| usize::from(ask(dice, &rules, &written, default))).sum()
    });
    println!("rules: {rounds} questions, {ruled} of them ruled, {:?}", begun.elapsed());
    assert!((rounds / 10..rounds).contains(&ruled), "{ruled} of {rounds} ruled");
}

/// Asked of each set of rules.
const QUESTIONS: usize = 100;

/// A rule as the oracle knows it: as text.
#[derive(Debug)]
struct Written {
    name: String,
    host: String,
    port: u16,
    paths: Vec<String>,
    methods: Vec<Method>,
    action: &'static str,
    refuses_the_rest: bool,
    is_pinned: bool,
}

impl Written {
    fn at(at: usize, dice: &mut Dice) -> Self {
        let mut host = name(dice, 2);
        match dice.below(6) {
            0 => host = "127.0.0.1".to_owned(),
            1 | 2 => host = format!("*.{host}"),
            _ => (),
        }
        let paths = (0..dice.below(3)).map(|_| path(dice, &["v1", "v2", "a", "ab", "a.b"]));
        let paths = paths.map(|path| if path.is_empty() { "/".to_owned() } else { path }).collect();
        let methods = (0..dice.below(3)).map(|_| dice.pick(METHODS).clone()).collect();
        Self {
            name: format!("rule {at}"),
            host,
            port: *dice.pick(PORTS),
            paths,
            methods,
            action: dice.word(&["inject", "inject", "inject", "refuse", "tunnel", "issuer"]),
            refuses_the_rest: dice.one_in(4),
            is_pinned: dice.one_in(5),
        }
    }

    fn rule(&self) -> Rule {
        let uses = Use { credential: "one".parse().unwrap(), login: None };
        let set = vec![(http::header::AUTHORIZATION, Template::token())];
        let injection = Injection::new(set, vec![]).unwrap();
        Rule {
            name: self.name.clone(),
            host: HostPattern::parse(&format!("{}:{}", self.host, self.port)).unwrap(),
            paths: self.paths.iter().map(|path| PathPrefix::parse(path).unwrap()).collect(),
            methods: self.methods.clone(),
            action: match self.action {
                "inject" => Action::Inject { uses, injection },
                "issuer" => Action::Issuer { uses },
                "refuse" => Action::Refuse,
                _ => Action::Tunnel,
            },
            unmatched: if self.refuses_the_rest { Unmatched::Refuse } else { Unmatched::Forward },
            websocket_fallback: false,
            pinned: self.is_pinned,
            scrub: false,
        }
    }

    /// Label by label; a star stands for one.
    fn speaks_of(&self, host: &str) -> bool {
        let (own, asked): (Vec<&str>, Vec<&str>) =
            (self.host.split('.').collect(), host.split('.').collect());
        own.len() == asked.len()
            && own.iter().zip(&asked).all(|(own, asked)| own == &"*" || own == asked)
    }

    /// How far in front: the tuple of the documented order, largest first.
    fn rank(&self, path_len: usize) -> (bool, bool, usize, usize, bool) {
        let is_exact = !self.host.starts_with('*');
        let host_len = if is_exact { 0 } else { self.host.len() };
        (self.is_pinned, is_exact, host_len, path_len, !self.methods.is_empty())
    }
}

/// One question; whether a rule was found.
fn ask(dice: &mut Dice, rules: &Rules, written: &[Written], default: DefaultAction) -> bool {
    let host = match dice.below(6) {
        0 => "127.0.0.1".to_owned(),
        1 => name(dice, 4),
        2 => format!("{}{}", dice.word(&["x", "x.", "a."]), name(dice, 2)),
        _ => dice.pick(written).host.replace('*', dice.word(&["a", "b", "a.b", "xa"])),
    };
    let port = *dice.pick(PORTS);
    let method = dice.pick(METHODS).clone();
    let path = match dice.below(3) {
        0 => path(
            dice,
            &["v1", "%76%31", "..", ".", "", "a%2fb", "a;b", "a%2Eb", "%zz", "a\\b", "v1x", "%00"],
        ),
        _ => path(dice, &["v1", "v2", "a", "ab", "a.b", "v1x", "%61", "c%20d"]),
    };
    let question = || format!("{method} {host}:{port}{path} of {written:#?}");
    let target: Target = format!("{host}:{port}").parse().unwrap();
    let on_host: Vec<&Written> =
        written.iter().filter(|it| it.port == port && it.speaks_of(&host)).collect();

    let (found, is_ruled) = match rules.find(&Origin::https(target.clone()), &method, &path) {
        Found::Rule(rule) => (rule.name.clone(), true),
        Found::Unmatched(unmatched) => (format!("{unmatched:?}"), false),
    };
    assert_eq!(found, covering(&on_host, &method, &path), "{}", question());

    let first = in_order(&on_host).first().map(|(rule, _)| rule.action);
    let decision = match first {
        None if default == DefaultAction::Refuse => Decision::Refuse,
        None | Some("tunnel") => Decision::Tunnel,
        Some(_) if on_host.iter().any(|it| matches!(it.action, "inject" | "issuer")) => {
            Decision::Intercept
        }
        Some(_) => Decision::Tunnel,
    };
    assert_eq!(rules.decide(&target), decision, "{}", question());
    let is_ruled_for_tls = written.iter().any(|it| it.action != "tunnel" && it.speaks_of(&host));
    let plain = match is_ruled_for_tls {
        true => Plain::OnlyTls,
        false if decision == Decision::Refuse => Plain::NoRule,
        false => Plain::Forward,
    };
    assert_eq!(rules.decide_plain(&target), plain, "{}", question());
    let origin = Origin { scheme: valetkey::origin::Scheme::Http, target };
    assert!(matches!(rules.find(&origin, &method, &path), Found::Unmatched(_)), "{}", question());
    is_ruled
}

/// The name of the rule that covers a request, or what becomes of one that none does.
fn covering(on_host: &[&Written], method: &Method, path: &str) -> String {
    let segments = read(path);
    let order = in_order(on_host);
    let covers = |(rule, own): &&(&Written, Option<&str>)| {
        let by_path = match (own, &segments) {
            (None, _) => true,
            (Some(own), Some(segments)) => {
                let own: Vec<&str> = own.split('/').skip(1).filter(|it| !it.is_empty()).collect();
                segments
                    .iter()
                    .filter(|it| !it.is_empty())
                    .map(String::as_str)
                    .take(own.len())
                    .eq(own)
            }
            (Some(_), None) => false,
        };
        by_path && (rule.methods.is_empty() || rule.methods.contains(method))
    };
    let place = order.iter().position(|entry| covers(&entry));
    match place {
        // Whether one with paths goes before cannot be told.
        Some(at) if segments.is_none() && order[..at].iter().any(|(_, own)| own.is_some()) => {
            "Refuse".to_owned()
        }
        Some(at) => order[at].0.name.clone(),
        None if on_host.iter().any(|rule| rule.refuses_the_rest) => "Refuse".to_owned(),
        None => "Forward".to_owned(),
    }
}

/// Every path of every rule, the one that is looked at first in front.
fn in_order<'a>(on_host: &[&'a Written]) -> Vec<(&'a Written, Option<&'a str>)> {
    let mut order: Vec<(&Written, Option<&str>)> = Vec::new();
    for rule in on_host {
        match rule.paths.is_empty() {
            true => order.push((rule, None)),
            false => order.extend(rule.paths.iter().map(|path| (*rule, Some(path.as_str())))),
        }
    }
    // Stable: what is written first stays in front.
    order.sort_by_key(|(rule, path)| {
        Reverse(rule.rank(path.map_or(0, |path| path.trim_end_matches('/').len())))
    });
    order
}

/// The segments that every server reads in a path; `None` where two could differ.
fn read(path: &str) -> Option<Vec<String>> {
    let mut segments = Vec::new();
    for (at, segment) in path.split('/').enumerate() {
        let mut bytes = segment.bytes();
        let mut text = String::new();
        while let Some(byte) = bytes.next() {
            let byte = match byte {
                b'%' => {
                    let digits =
                        [bytes.next()?, bytes.next()?].map(|it| char::from(it).to_digit(16));
                    let byte = u8::try_from(digits[0]? * 16 + digits[1]?).unwrap();
                    if byte < b' ' || b"/\\%\x7f".contains(&byte) {
                        return None;
                    }
                    byte
                }
                b'\\' | b';' => return None,
                plain => plain,
            };
            text.push(char::from(byte));
        }
        let is_last = at == path.matches('/').count();
        if text == "." || text == ".." || text.is_empty() && at > 0 && !is_last {
            return None;
        }
        segments.push(text);
    }
    (segments.len() > 1 && segments.remove(0).is_empty()).then_some(segments)
}

fn name(dice: &mut Dice, least: usize) -> String {
    let labels: Vec<&str> =
        (0..least + dice.below(2)).map(|_| dice.word(&["a", "b", "ab"])).collect();
    labels.join(".")
}

fn path(dice: &mut Dice, segments: &[&'static str]) -> String {
    let path: String = (0..dice.below(4)).map(|_| format!("/{}", dice.word(segments))).collect();
    if path.is_empty() || dice.one_in(3) && !path.ends_with('/') { path + "/" } else { path }
}

const PORTS: &[u16] = &[443, 443, 443, 8443];
const METHODS: &[Method] = &[Method::GET, Method::POST, Method::DELETE];
