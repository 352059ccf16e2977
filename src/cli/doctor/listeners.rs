//! Where clients are heard, who is let in there, and what would keep one out.

use super::report::{Check, Report};
use crate::access::PassRecord;
use crate::cli::passes;
use crate::clock::Clock;
use crate::config::{Config, Listener};

/// The listeners of a configuration, whether a proxy runs or not, and the passes.
pub(super) fn examine(config: &Config, report: &mut Report) {
    let records = match passes::file(&config.paths).read() {
        Ok(records) => records,
        Err(error) => {
            report.add(Check::failed("passes", error.to_string(), error.hint()));
            Vec::new()
        }
    };
    let now = Clock::system().now();
    let counts = |record: &&PassRecord| !record.has_expired(now) && !record.is_used_up();
    let counting = records.iter().filter(counts).count();
    if !records.is_empty() {
        let sentence = format!("{counting} of {} count", records.len());
        report.add(Check::ok("passes", format!("{sentence}: valetkey pass list")));
    }
    for listener in &config.listeners {
        report.add(judge(listener, records.len(), counting).about(&listener.address));
    }
}

fn judge(listener: &Listener, passes: usize, counting: usize) -> Check {
    let has_tls = !listener.tls_names.is_empty();
    let is_far = listener.is_beyond_loopback();
    if is_far && passes == 0 {
        let sentence =
            "other machines can reach it and there is no pass, so that the proxy does not start";
        return Check::failed("listener", sentence, "valetkey pass new NAME");
    }
    if (is_far || listener.require_pass) && counting == 0 {
        let sentence = "nobody can use it: no pass counts any more, or there is none";
        return Check::warning("listener", sentence, "valetkey pass new NAME");
    }
    if has_tls {
        let sentence = "speaks TLS: curl and a few others take an https:// proxy, Codex does not";
        let fix = "give those a listener without TLS, on this machine or behind a tunnel of yours (SSH, WireGuard)";
        return Check::warning("listener", sentence, fix);
    }
    if is_far {
        let sentence = "other machines can reach it, and passes go there in the clear";
        let fix = "keep it to a network of this machine, or set tls = true for clients that can";
        return Check::warning("listener", sentence, fix);
    }
    Check::ok("listener", who(listener))
}

fn who(listener: &Listener) -> String {
    let uids: Vec<String> = listener.allow_uids.iter().map(u32::to_string).collect();
    match (listener.require_pass, uids.is_empty()) {
        (true, _) => "for whoever shows a pass".to_owned(),
        (false, true) => "for your own user, and whoever shows a pass".to_owned(),
        (false, false) => {
            format!("for your own user, uid {}, and whoever shows a pass", uids.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::origin::Host;

    #[test]
    fn what_is_said_of_a_listener() {
        let on = |address: &str| Listener::on(address.parse().unwrap());
        let strict = Listener { require_pass: true, ..on("127.0.0.1:1") };
        let tls = Listener { tls_names: vec![Host::parse("localhost").unwrap()], ..on("[::1]:1") };
        let known = Listener { allow_uids: vec![7, 8], ..on("unix:/s") };
        for (listener, passes, counting, outcome, said) in [
            (&on("127.0.0.1:1"), 0, 0, "ok", "for your own user, and whoever"),
            (&known, 0, 0, "ok", "uid 7, 8,"),
            (&strict, 1, 1, "ok", "for whoever shows a pass"),
            (&strict, 1, 0, "warning", "nobody can use it"),
            (&strict, 0, 0, "warning", "nobody can use it"),
            (&on("0.0.0.0:1"), 0, 0, "failed", "does not start"),
            (&on("0.0.0.0:1"), 1, 0, "warning", "nobody can use it"),
            (&on("0.0.0.0:1"), 1, 1, "warning", "in the clear"),
            (&tls, 0, 0, "warning", "Codex does not"),
        ] {
            let check = judge(listener, passes, counting).to_json().to_string();
            assert!(check.contains(outcome) && check.contains(said), "{check}");
        }
    }
}
