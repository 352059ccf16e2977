//! What was in the environment before ours: kept in a variable beside them, so that it comes back.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::{
    ADDED, ADDING, ClientEnv, GCLOUD_PROXY, OF_NODE, PAST, PROXIES, REPLACING, ROOTS, SETTINGS,
    git, java, no_proxy, of_one_program, wget, without_login,
};
use crate::config::env::{Environment, UPSTREAM_CA_BUNDLE, UPSTREAM_PROXY};

/// Holds, as one JSON object, the values that ours have replaced, by name. A name that is not in it was not set.
pub(super) const VARIABLE: &str = "VALETKEY_BEFORE";

/// What [`VARIABLE`] says when ours are set in an environment. No login of a proxy is in it: what we start must not see one.
pub(super) fn kept(env: &Environment) -> String {
    let value = |name: &str| env.stated(name)?.to_str().filter(|value| !has_login(name, value));
    let kept = replaced(env).filter_map(|name| Some((name.to_owned(), value(name)?.into())));
    Value::Object(kept.collect::<Map<String, Value>>()).to_string()
}

/// As [`ClientEnv::taken_back`].
pub(super) fn taken_back(env: &Environment) -> BTreeMap<String, Option<String>> {
    let mut before = read(env);
    let past = no_proxy(&Environment::from_pairs(
        PAST.iter().filter_map(|name| Some((*name, before.get(*name)?))),
    ));
    let is_there = |name: &&str| match env.stated(name).map(|value| value.to_string_lossy()) {
        Some(value) => is_ours(name, &value, &past),
        None => false,
    };
    let names = replaced(env).filter(is_there);
    let mut back: BTreeMap<_, _> =
        names.map(|name| (name.to_owned(), before.remove(name))).collect();
    if let Some(options) = env.text(java::VARIABLE) {
        let theirs = java::without_ours(&options);
        back.insert(java::VARIABLE.to_owned(), Some(theirs).filter(|it| !it.is_empty()));
    }
    back.extend(git::without_ours(env));
    if env.stated(VARIABLE).is_some() {
        back.insert(VARIABLE.to_owned(), None);
    }
    back
}

/// The environment without what a valetkey of this machine has set in it.
pub(super) fn restored(env: &Environment) -> Environment {
    if !ClientEnv::is_set_in(env) {
        return env.clone();
    }
    let back = taken_back(env);
    let others = env.names().filter(|name| !back.contains_key(*name));
    let others = others.filter_map(|name| Some((name, env.stated(name)?.to_owned())));
    let ours = back.iter().filter_map(|(name, it)| Some((name.as_str(), it.as_ref()?.into())));
    Environment::from_pairs(others.chain(ours))
}

/// The variables that ours take the place of, whether they are set or not, but for those that ours are added to.
fn replaced(env: &Environment) -> impl Iterator<Item = &str> {
    let of_gcloud = GCLOUD_PROXY.into_iter().filter(|_| env.get(GCLOUD_PROXY[0]).is_some());
    let once = of_one_program(env).filter(|name| !PROXIES.contains(name));
    let others = [OF_NODE, UPSTREAM_CA_BUNDLE, UPSTREAM_PROXY, wget::VARIABLE];
    let all = REPLACING.into_iter().chain(ADDING).chain(PROXIES).chain(PAST).chain(others);
    all.chain(of_gcloud).chain(once)
}

/// Whether a value is still the one that we have set: a file is named by us, and hosts are those from before with ours.
fn is_ours(name: &str, value: &str, past: &str) -> bool {
    let begins = |with: &str| {
        let file = Path::new(value).file_name().unwrap_or_default().to_string_lossy();
        file.strip_prefix(with).is_some_and(|rest| rest.starts_with('-'))
    };
    match name {
        _ if REPLACING.contains(&name) => begins(ROOTS),
        _ if ADDING.contains(&name) => begins(ADDED),
        _ if PAST.contains(&name) => value == past,
        wget::VARIABLE => begins(SETTINGS),
        _ => true,
    }
}

fn has_login(name: &str, value: &str) -> bool {
    name.to_ascii_lowercase().ends_with("_proxy") && without_login(value).is_some()
}

fn read(env: &Environment) -> BTreeMap<String, String> {
    let text = env.text(VARIABLE).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::super::tests::made_from;
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> BTreeMap<String, OsString> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())).collect()
    }

    /// As after `eval "$(valetkey env)"`.
    fn put_behind(shell: &mut BTreeMap<String, OsString>) {
        let made = made_from(&Environment::from_pairs(shell.clone()));
        shell.extend(made.iter().map(|(name, value)| (name.to_owned(), value.clone())));
    }

    /// As after `eval "$(valetkey env --unset)"`.
    fn take_back(shell: &mut BTreeMap<String, OsString>) {
        for (name, value) in taken_back(&Environment::from_pairs(shell.clone())) {
            match value {
                Some(value) => drop(shell.insert(name, value.into())),
                None => drop(shell.remove(&name)),
            }
        }
    }

    #[test]
    fn what_was_there_comes_back_however_often_ours_was_set() {
        let before = environment(&[
            ("CLOUDSDK_PROXY_ADDRESS", "corp"),
            ("CURL_CA_BUNDLE", "/etc/corp.pem"),
            ("GIT_CONFIG_COUNT", "2"),
            ("GIT_CONFIG_KEY_0", "http.proxy"),
            ("GIT_CONFIG_KEY_1", "user.name"),
            ("GIT_CONFIG_VALUE_0", "http://corp:1"),
            ("GIT_CONFIG_VALUE_1", "me"),
            ("HTTPS_PROXY", "http://corp:1"),
            ("JAVA_TOOL_OPTIONS", "-Xmx1g"),
            ("NODE_EXTRA_CA_CERTS", "/home/me@corp/added.pem"),
            ("NO_PROXY", "intra.corp"),
            ("PATH", "/bin"),
            ("PIP_PROXY", "http://corp:1"),
            ("SSL_CERT_FILE", ""),
            ("VALETKEY_UPSTREAM_CA_BUNDLE", "/etc/corp.pem"),
            ("WGETRC", "/etc/wgetrc"),
        ]);
        for times in 1..=3 {
            let mut shell = before.clone();
            (0..times).for_each(|_| put_behind(&mut shell));
            assert!(ClientEnv::is_set_in(&Environment::from_pairs(shell.clone())));
            assert_eq!(shell["GIT_CONFIG_COUNT"], "3");
            assert_eq!(shell["NO_PROXY"], "intra.corp,localhost,127.0.0.1,::1");
            take_back(&mut shell);
            assert_eq!(shell, before, "{times}");
        }
    }

    #[test]
    fn each_variable_is_taken_back() {
        let mut shell = environment(&[("PATH", "/bin"), ("HTTP_PROXY", "http://corp:1")]);
        assert!(taken_back(&Environment::from_pairs(shell.clone())).is_empty());
        let before = shell.clone();
        put_behind(&mut shell);
        assert!(shell.len() > 30);
        take_back(&mut shell);
        assert_eq!(shell, before);
    }

    #[test]
    fn a_login_of_a_proxy_is_not_kept() {
        let proxies = ["ALL_PROXY", "HTTPS_PROXY", "PIP_PROXY", "VALETKEY_UPSTREAM_PROXY"];
        let mut shell = environment(&proxies.map(|name| (name, "http://me:pa55@corp:1")));
        put_behind(&mut shell);
        assert!(shell.values().all(|value| !value.to_string_lossy().contains("pa55")));
        take_back(&mut shell);
        assert_eq!(shell, environment(&[("ALL_PROXY", "http://corp:1")]));
    }

    #[test]
    fn what_was_set_since_stays() {
        let mut shell = environment(&[("NO_PROXY", "a"), ("SSL_CERT_FILE", "/a.pem")]);
        put_behind(&mut shell);
        let since = [("NO_PROXY", "a,localhost,b"), ("SSL_CERT_FILE", "/b.pem")];
        shell.extend(environment(&since));
        let restored = restored(&Environment::from_pairs(shell.clone()));
        for (name, value) in since {
            assert_eq!(restored.text(name).as_deref(), Some(value));
        }
        take_back(&mut shell);
        assert_eq!(shell, environment(&since));
    }

    #[test]
    fn names_of_others_do_nothing() {
        let mut shell = BTreeMap::new();
        put_behind(&mut shell);
        for odd in [r#"{"LD_PRELOAD":"x","a;b":"c"}"#, "[1]", "{", ""] {
            shell.insert(VARIABLE.to_owned(), odd.into());
            let back = taken_back(&Environment::from_pairs(shell.clone()));
            assert!(back.values().all(Option::is_none), "{odd}: {back:?}");
            assert!(back.keys().all(|name| shell.contains_key(name)), "{odd}");
        }
    }

    #[test]
    fn an_environment_is_ours_only_with_both_signs() {
        let (chain, theirs) = ((UPSTREAM_PROXY, ""), (ADDING[0], "/etc/corp.pem"));
        for env in
            [vec![chain], vec![theirs], vec![chain, theirs], vec![(ADDING[0], "/added-0.pem")]]
        {
            assert!(!ClientEnv::is_set_in(&Environment::from_pairs(env)));
        }
    }
}
