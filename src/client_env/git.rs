//! What git reads: settings that the environment numbers, one of which is ours.

use std::ffi::OsString;

use super::ProxyUrl;
use crate::config::env::Environment;

/// What the names of git's settings start with.
pub(super) const NAMES: &str = "GIT_CONFIG_";

/// How many settings there are in the environment (git-config(1)).
const COUNT: &str = "GIT_CONFIG_COUNT";

/// The setting that is ours. What the user's files say of it would win over `HTTPS_PROXY`.
const PROXY: &str = "http.proxy";

/// One more setting, behind those that are in the environment already.
pub(super) fn setting(proxy: &ProxyUrl, env: &Environment) -> [(String, OsString); 3] {
    let count = count(env);
    [
        (COUNT.to_owned(), (u32::from(count) + 1).to_string().into()),
        (key(count), PROXY.into()),
        (value(count), proxy.as_str().into()),
    ]
}

/// What takes every setting of ours out; those of others close up. `None` is a variable to unset.
pub(super) fn without_ours(env: &Environment) -> Vec<(String, Option<String>)> {
    let count = count(env);
    let kept: Vec<u16> = (0..count).filter(|index| !is_ours(*index, env)).collect();
    if kept.len() == usize::from(count) {
        return Vec::new();
    }
    let after = Some(kept.len()).filter(|it| *it > 0).map(|it| it.to_string());
    let mut back = vec![(COUNT.to_owned(), after)];
    for index in 0..count {
        match kept.get(usize::from(index)) {
            Some(before) if *before == index => {}
            Some(before) => {
                back.push((key(index), Some(env.text(&key(*before)).unwrap_or_default())));
                back.push((value(index), Some(env.text(&value(*before)).unwrap_or_default())));
            }
            None => back.extend([(key(index), None), (value(index), None)]),
        }
    }
    back
}

/// Whether a setting leads to the proxy that the environment leads to.
fn is_ours(index: u16, env: &Environment) -> bool {
    env.text(&key(index)).as_deref() == Some(PROXY)
        && env.get(&value(index)) == env.get("HTTPS_PROXY")
}

fn count(env: &Environment) -> u16 {
    env.text(COUNT).and_then(|count| count.parse().ok()).unwrap_or(0)
}

fn key(index: u16) -> String {
    format!("{NAMES}KEY_{index}")
}

fn value(index: u16) -> String {
    format!("{NAMES}VALUE_{index}")
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    type Settings = &'static [(&'static str, &'static str)];
    type Back = &'static [(&'static str, Option<&'static str>)];

    #[test]
    fn settings_of_git_that_are_there_stay() {
        let proxy = SocketAddr::from(([127, 0, 0, 1], 8377)).into();
        for (count, names) in [
            (None, ["GIT_CONFIG_COUNT", "GIT_CONFIG_KEY_0", "GIT_CONFIG_VALUE_0"]),
            (Some("2"), ["GIT_CONFIG_COUNT", "GIT_CONFIG_KEY_2", "GIT_CONFIG_VALUE_2"]),
        ] {
            let env = Environment::from_pairs(count.map(|it| (COUNT, it)));
            assert_eq!(setting(&proxy, &env).map(|(name, _)| name), names);
        }
    }

    #[test]
    fn every_setting_of_ours_goes_and_those_of_others_close_up() {
        const OURS: (&str, &str) = ("http.proxy", "http://127.0.0.1:8377");
        const THEIRS: (&str, &str) = ("http.proxy", "http://corp:1");
        const NAME: (&str, &str) = ("user.name", "me");
        let table: [(Settings, Back); 5] = [
            (&[], &[]),
            (&[THEIRS, NAME], &[]),
            (&[OURS], &[("COUNT", None), ("KEY_0", None), ("VALUE_0", None)]),
            (
                &[NAME, OURS, OURS],
                &[
                    ("COUNT", Some("1")),
                    ("KEY_1", None),
                    ("VALUE_1", None),
                    ("KEY_2", None),
                    ("VALUE_2", None),
                ],
            ),
            (
                &[THEIRS, OURS, NAME],
                &[
                    ("COUNT", Some("2")),
                    ("KEY_1", Some(NAME.0)),
                    ("VALUE_1", Some(NAME.1)),
                    ("KEY_2", None),
                    ("VALUE_2", None),
                ],
            ),
        ];
        for (settings, expected) in table {
            let mut pairs = vec![
                ("HTTPS_PROXY".to_owned(), OURS.1.to_owned()),
                (COUNT.to_owned(), settings.len().to_string()),
            ];
            for (index, setting) in (0..).zip(settings) {
                pairs.push((key(index), setting.0.to_owned()));
                pairs.push((value(index), setting.1.to_owned()));
            }
            let back = without_ours(&Environment::from_pairs(pairs));
            let back: Vec<_> = back
                .iter()
                .map(|(name, it)| (name.strip_prefix(NAMES).unwrap(), it.as_deref()))
                .collect();
            assert_eq!(back, expected, "{settings:?}");
        }
    }
}
