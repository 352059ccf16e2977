//! `valetkey pass`: makes, lists and revokes what others show to use this proxy.

use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use clap::Subcommand;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::output::{self, Failure, WRONG_USE, counted};
use super::running::{self, ServerInfo};
use super::status::in_words;
use super::{Typed, audit, passes};
use crate::access::{self, PassName, PassRecord, Reach};
use crate::clock::Clock;
use crate::config::paths::Paths;
use crate::config::{Config, ListenAddress, Listener};
use crate::origin::Target;
use crate::secret::Fingerprint;

/// What `pass` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a pass, and print it this once
    New(New),
    /// Show the passes, and what each reaches; never a pass itself
    List {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// End a pass at once, and all that is open by it
    Revoke(Revoke),
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Revoke {
    /// Which one
    name: Option<PassName>,

    /// Every pass
    #[arg(long)]
    all: bool,
}

#[derive(Debug, clap::Args)]
struct New {
    /// What to call it: letters, digits, `-` and `_`
    name: PassName,

    /// The rules that it may use, by the names that `valetkey explain URL` shows [default: all, also those to come]
    #[arg(long, value_name = "RULE,…", value_delimiter = ',')]
    rules: Option<Vec<String>>,

    /// How long it counts: 90s, 30m, 8h, 7d [default: until it is revoked]
    #[arg(long, value_name = "TIME")]
    ttl: Option<Life>,

    /// How many requests it is good for [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_requests: Option<u64>,

    /// Let it reach other hosts too, which are not signed in to
    #[arg(long)]
    tunnel: bool,

    /// Of those, also this machine and private networks
    #[arg(long, requires = "tunnel")]
    allow_private: bool,
}

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    match &arguments.command {
        Command::New(new) => make(new, &typed.config()?, typed)?,
        Command::List { json } => list(&typed.paths()?, *json)?,
        Command::Revoke(Revoke { name, .. }) => revoke(name.as_ref(), typed)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn make(new: &New, config: &Config, typed: &Typed) -> Result<(), Failure> {
    let rules = new.rules.as_deref().map(|rules| known(rules, config)).transpose()?;
    let now = Clock::system().now();
    let pass = access::mint()?;
    let record = PassRecord {
        name: new.name.clone(),
        digest: Fingerprint::of(pass.as_bytes()),
        reach: Reach { rules, tunnel: new.tunnel, allow_private: new.allow_private },
        created: now,
        expires: new.ttl.map(|life| now + life.0),
        max_requests: new.max_requests,
        used: 0,
    };
    let name = &new.name;
    if !passes::file(&config.paths).add(record, now).map_err(output::hinted)? {
        return Err(Failure::new(format!("there is a pass `{name}` already"))
            .hint(format!("end it: valetkey pass revoke {name}; or choose another name")));
    }
    if let Err(error) = output::shown(&*pass) {
        // Nobody has it, and nobody should miss it.
        passes::file(&config.paths).remove(Some(name)).map_err(output::hinted)?;
        return Err(Failure::new(format!("standard output: {error}"))
            .hint("there is no such pass now: make it again where it can be read"));
    }
    audit::written(config, |audit| audit.pass_made(&new.name));
    let until = new.ttl.map_or_else(
        || "until it is revoked".to_owned(),
        |life| format!("until {}", in_words(now + life.0)),
    );
    output::words(format_args!("this is the only time that it is shown; it counts {until}"));
    let running = running::find(&config.paths.runtime_dir, &typed.env);
    let (scheme, place) = where_shown(&config.listeners, running.as_ref());
    output::words(format_args!(
        "clients show it in the proxy's URL: {scheme}://{name}:PASS@{place}"
    ));
    if !running.is_some_and(|info| info.needs_pass) && !config.listeners.iter().any(asks) {
        output::words(
            "whoever is let in there by uid, as you are, needs none and is not narrowed by it: require_pass = true",
        );
    }
    output::words(format_args!("end it: valetkey pass revoke {name}"));
    Ok(())
}

/// Where clients show a pass, as scheme and address: at a listener that asks for one, else where the proxy is found.
fn where_shown(listeners: &[Listener], running: Option<&ServerInfo>) -> (&'static str, String) {
    let running_at = |info: &ServerInfo| {
        let scheme = if info.proxy.starts_with("https://") { "https" } else { "http" };
        Some((scheme, info.address()?.to_string()))
    };
    let asking = running.filter(|info| info.needs_pass).and_then(running_at);
    let listed = || listeners.iter().filter(|it| asks(it)).find_map(place_of);
    let usual = || listeners.iter().find_map(place_of);
    asking
        .or_else(listed)
        .or_else(|| running.and_then(running_at))
        .or_else(usual)
        .unwrap_or_else(|| ("http", "HOST:8377".to_owned()))
}

/// Whether a listener asks for a pass.
fn asks(listener: &Listener) -> bool {
    listener.require_pass || listener.is_beyond_loopback()
}

/// A listener as clients name it; `None` for a Unix socket, and for a port that is not known.
fn place_of(listener: &Listener) -> Option<(&'static str, String)> {
    let address = match &listener.address {
        ListenAddress::Tcp(address) if address.port() != 0 => address,
        ListenAddress::Tcp(_) | ListenAddress::Unix(_) => return None,
    };
    let place = match (address.ip().is_unspecified(), listener.tls_names.first()) {
        (true, _) => format!("HOST:{}", address.port()),
        (false, Some(name)) => Target { host: name.clone(), port: address.port() }.to_string(),
        (false, None) => address.to_string(),
    };
    Some((if listener.tls_names.is_empty() { "http" } else { "https" }, place))
}

/// The rules that a pass is for, each of which must exist: a misspelt one would be found out by whoever holds it.
fn known(rules: &[String], config: &Config) -> Result<Vec<String>, Failure> {
    let mut names: Vec<&str> = config.rules.iter().map(|rule| rule.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    match rules.iter().find(|rule| !names.contains(&rule.as_str())) {
        Some(strange) => Err(Failure::new(format!("there is no rule `{strange}`"))
            .status(WRONG_USE)
            .hint(format!("the configuration has: {}", names.join(", ")))),
        None => Ok(rules.to_vec()),
    }
}

fn list(paths: &Paths, as_json: bool) -> Result<(), Failure> {
    let (records, now) =
        (passes::file(paths).read().map_err(output::hinted)?, Clock::system().now());
    if as_json {
        let list: Vec<Value> = records.iter().map(|record| to_json(record, now)).collect();
        output::data(format_args!("{:#}", Value::from(list)));
        return Ok(());
    }
    if records.is_empty() {
        output::words("there is no pass; make one: valetkey pass new NAME");
    }
    for record in &records {
        output::data(&record.name);
        for (word, value) in to_text(record, now) {
            output::data(format_args!("  {word:<14}{value}"));
        }
    }
    Ok(())
}

fn to_text(record: &PassRecord, now: OffsetDateTime) -> Vec<(&'static str, String)> {
    let Reach { rules, tunnel, allow_private } = &record.reach;
    let counts = match record.expires {
        _ if record.is_used_up() => "no more: it is used up".to_owned(),
        Some(at) if record.has_expired(now) => format!("no more: it ended {}", in_words(at)),
        Some(at) => format!("until {}", in_words(at)),
        None => "until it is revoked".to_owned(),
    };
    let others = match (tunnel, allow_private) {
        (false, _) => "no",
        (true, false) => "yes, but none of this machine or of private networks",
        (true, true) => "yes, all",
    };
    let used = match record.max_requests {
        Some(most) => format!("{} of {}", record.used, counted(most, "request")),
        None => counted(record.used, "request"),
    };
    vec![
        ("counts", counts),
        ("rules", rules.as_ref().map_or_else(|| "all".to_owned(), |rules| rules.join(", "))),
        ("other hosts", others.to_owned()),
        ("used for", used),
    ]
}

fn to_json(record: &PassRecord, now: OffsetDateTime) -> Value {
    let moment = |at: OffsetDateTime| at.format(&Rfc3339).ok();
    json!({
        "name": record.name.as_str(),
        "counts": !record.has_expired(now) && !record.is_used_up(),
        "rules": record.reach.rules,
        "tunnel": record.reach.tunnel,
        "allow_private": record.reach.allow_private,
        "created": moment(record.created),
        "expires": record.expires.and_then(moment),
        "max_requests": record.max_requests,
        "used": record.used,
    })
}

/// Ends passes, whatever the configuration says: a proxy that runs goes on by the last one that made sense, and lets in
/// whoever shows them.
fn revoke(name: Option<&PassName>, typed: &Typed) -> Result<(), Failure> {
    let count = passes::file(&typed.paths()?).remove(name).map_err(output::hinted)?;
    if count > 0 {
        match typed.config() {
            Ok(config) => audit::written(&config, |audit| audit.pass_revoked(name)),
            Err(failure) => {
                failure.report();
                output::warning(
                    "if there is an audit, it does not say so: what it is, is not known",
                );
            }
        }
    }
    match (name, count) {
        (Some(name), 0) => {
            return Err(Failure::new(format!("there is no pass `{name}`"))
                .hint("see those that there are: valetkey pass list"));
        }
        (Some(name), _) => output::words(format_args!("`{name}` counts no more")),
        (None, 1) => output::words("1 pass counts no more"),
        (None, count) => output::words(format_args!("{count} passes count no more")),
    }
    Ok(())
}

/// How long a pass counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Life(Duration);

impl FromStr for Life {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "expected a number and s, m, h or d, as in 8h; ten years at most";
        let (number, unit) = match text.strip_suffix(['s', 'm', 'h', 'd']) {
            Some(number) => (number, &text[number.len()..]),
            None => return Err(EXPECTED),
        };
        let unit = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 60 * 60,
            _ => 24 * 60 * 60,
        };
        let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        let number = number.parse::<u64>().ok().filter(|_| is_number).ok_or(EXPECTED)?;
        let seconds = number.checked_mul(unit).filter(|it| (1..=LONGEST_LIFE).contains(it));
        seconds.map(|seconds| Self(Duration::from_secs(seconds))).ok_or(EXPECTED)
    }
}

/// Ten years, in seconds: what is to last longer needs no end.
const LONGEST_LIFE: u64 = 10 * 366 * 24 * 60 * 60;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_is_shown_where_one_is_asked_for() {
        let on = |address: &str| Listener::on(address.parse().unwrap());
        let usual = on("127.0.0.1:8377");
        let strict = Listener { require_pass: true, ..on("127.0.0.1:9000") };
        let socket = Listener { require_pass: true, ..on("unix:/s") };
        let far = on("0.0.0.0:9001");
        let names = vec![crate::origin::Host::parse("proxy.example").unwrap()];
        let tls = Listener { tls_names: names, ..on("10.0.0.1:9002") };
        let at = |url: &str| ServerInfo::of_this_process(url.to_owned(), "ca.pem".into());
        let running = at("http://127.0.0.1:4242");
        let mut asking = at("https://127.0.0.1:4243");
        asking.needs_pass = true;
        let at_socket = at("unix:/s");
        let table: [(&[&Listener], _, _); 9] = [
            (&[&usual], None, ("http", "127.0.0.1:8377")),
            (&[&usual], Some(&running), ("http", "127.0.0.1:4242")),
            (&[&usual, &strict], Some(&running), ("http", "127.0.0.1:9000")),
            (&[&usual, &strict], Some(&asking), ("https", "127.0.0.1:4243")),
            (&[&usual, &far], Some(&running), ("http", "HOST:9001")),
            (&[&usual, &tls], None, ("https", "proxy.example:9002")),
            (&[&socket, &usual], None, ("http", "127.0.0.1:8377")),
            (&[&socket], Some(&at_socket), ("http", "HOST:8377")),
            (&[&on("127.0.0.1:0")], None, ("http", "HOST:8377")),
        ];
        for (listeners, running, (scheme, place)) in table {
            let listeners: Vec<Listener> = listeners.iter().map(|it| (*it).clone()).collect();
            assert_eq!(where_shown(&listeners, running), (scheme, place.to_owned()));
        }
    }

    #[test]
    fn lives() {
        let table = [
            ("90s", Some(90)),
            ("30m", Some(1800)),
            ("8h", Some(28_800)),
            ("7d", Some(604_800)),
            ("0h", None),
            ("8", None),
            ("h", None),
            ("", None),
            ("-1h", None),
            ("+1h", None),
            ("1.5h", None),
            ("8 h", None),
            ("8H", None),
            ("99999999999999999999d", None),
            ("4000d", None),
            ("8\u{fc}", None),
        ];
        for (text, seconds) in table {
            let life = text.parse::<Life>().ok().map(|life| life.0.as_secs());
            assert_eq!(life, seconds, "{text}");
        }
    }
}
