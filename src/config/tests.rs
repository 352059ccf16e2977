//! The configuration as a whole: what its layers come to, and what is said of every mistake.

use std::path::Path;

use http::Method;

use super::*;
use crate::credential::LoginKind;
use crate::origin::{Origin, Target};
use crate::rules::{Decision, Found};

const HOME: (&str, &str) = ("HOME", "/home/me");

/// Loads files, the highest first, with a home folder and further variables.
fn load_with(
    files: &[&str],
    variables: &[(&str, &str)],
    overrides: &Overrides,
) -> Result<Config, ConfigErrors> {
    let env = Environment::from_pairs(variables.iter().copied().chain([HOME]));
    let written = |(at, text): (usize, &&str)| Written {
        name: format!("{}.toml", at + 1),
        folder: "/etc/valetkey".into(),
        text: (*text).to_owned(),
        is_own: true,
        is_managed: false,
    };
    let files = files.iter().enumerate().map(written).collect();
    let paths = Paths::find(&env, None).unwrap();
    let machine = MachineFiles::below(Path::new("/nonexistent"), 0);
    let given = Given { machine: &machine, overrides, env: &env };
    Config::assemble(files, paths, &given, &Mistakes::default())
}

fn load(files: &[&str], variables: &[(&str, &str)]) -> Result<Config, ConfigErrors> {
    load_with(files, variables, &Overrides::default())
}

/// Every mistake as `file:line:column underlined message`.
fn mistakes(files: &[&str], variables: &[(&str, &str)]) -> Vec<String> {
    let errors = load(files, variables).map(|_| ()).expect_err(files[0]);
    let report = errors.render(false, 100);
    let shown = |mistake: &Mistake| {
        let (line, column) = mistake.position().unwrap();
        let (file, text) = (mistake.file().unwrap(), mistake.underlined().unwrap());
        assert!(report.contains(&format!("[{file}:{line}:{column}]")), "{report}");
        format!("{file}:{line}:{column} {text} | {mistake}")
    };
    errors.mistakes().iter().map(shown).collect()
}

/// A rule on `a.example` with a credential `key`, and more keys.
fn with_key(more: &str) -> String {
    format!(
        "[credentials.key]\nkind = 'api_key'\nsource = 'env:KEY'\n\
         [[rules]]\nhost = 'a.example'\ncredential = 'key'\n{more}\n"
    )
}

#[test]
fn every_mistake_is_pointed_at() {
    let table: &[(&str, &[&str])] = &[
        // the text and its keys
        ("default = ", &["1:11  | string values must be quoted, expected literal string"]),
        ("a = '''\n\n", &["3:1  | invalid multi-line literal string, expected `'`"]),
        ("a = 1\na = 2", &["2:1 a | duplicate key"]),
        ("lisen = 'x'", &["1:1 lisen | unknown key `lisen`"]),
        ("[upstream]\nbundle = 'x'", &["2:1 bundle | unknown key `bundle`"]),
        ("rules = 'x'", &["1:9 'x' | expected a list, found a string"]),
        ("rules = [3]", &["1:10 3 | expected a table, found an integer"]),
        ("upstream = 1", &["1:12 1 | expected a table, found an integer"]),
        ("default = 'drop'", &["1:11 'drop' | expected `tunnel` or `refuse`"]),
        ("use = 'openai'", &["1:7 'openai' | expected a list, found a string"]),
        ("use = ['opnai']", &["1:8 'opnai' | unknown preset `opnai`"]),
        (
            "use = 'openai'\n[credentials.openai]\nhome = 3\n\
             [[rules]]\nhost = 'a.example'\ncredential = 'openai'",
            &[
                "1:7 'openai' | expected a list, found a string",
                "3:8 3 | expected a string, found an integer",
            ],
        ),
        // listeners
        (
            "listen = '8377'",
            &["1:10 '8377' | expected an IP address and a port, as in `127.0.0.1:8377`"],
        ),
        (
            "listen = 'unix:s'",
            &["1:10 'unix:s' | the path of a Unix socket starts with `/` or `~/`"],
        ),
        ("listen = 8377", &["1:10 8377 | expected a string, found an integer"]),
        (
            "listen = '[::1]:1'\n[[listeners]]\naddress = '127.0.0.1:1'\n\
             [[listeners]]\naddress = '[0:0::1]:1'",
            &["5:11 '[0:0::1]:1' | a second listener on [::1]:1: the first is in line 1"],
        ),
        (
            "[[listeners]]\ntls = 1\nrequire_pass = 'yes'\nallow_uids = [-1, 'me', 1000]",
            &[
                "1:1 [[listeners]] | a listener needs an `address`",
                "2:7 1 | expected `true` or `false`, found an integer",
                "3:16 'yes' | expected `true` or `false`, found a string",
                "4:15 -1 | expected the number of a user, found an integer",
                "4:19 'me' | expected the number of a user, found a string",
            ],
        ),
        (
            "[[listeners]]\naddress = '[::1]:1'\ntls_names = ['localhost', 'a b']",
            &[
                "3:1 tls_names | `tls_names` has no meaning without `tls = true`",
                "3:27 'a b' | not a valid host name",
            ],
        ),
        // limits
        (
            "[limits]\nhead_size = 10\nstreams = '9'\nstrangers = -1\nhead_time = 4000\nheads = 1",
            &[
                "2:13 10 | expected a number from 8192 to 1048576",
                "3:11 '9' | expected a number from 1 to 10000",
                "4:13 -1 | expected a number from 1 to 1000000",
                "5:13 4000 | expected a number from 1 to 3600",
                "6:1 heads | unknown key `heads`",
            ],
        ),
        // upstream
        (
            "[upstream]\ntrust = 'all'\nproxy = 'ftp://x'\nca_bundle = 3",
            &[
                "2:9 'all' | expected `system+bundle` or `bundle` or `system` or `mozilla+bundle`",
                "3:9 'ftp://x' | not a proxy: expected `http://`, `https://`, `socks5h://` or `socks5://` with \
                 a host, and a port where it is not 80, 443 or 1080",
                "4:13 3 | expected a string, found an integer",
            ],
        ),
        (
            "[upstream]\ntrust = 'bundle'",
            &["2:9 'bundle' | no `ca_bundle` is set: nothing would be trusted"],
        ),
        (
            "[upstream.resolve]\n'a.example' = '127.0.0.1:1'\n'a.example:443' = '127.1:1'",
            &[
                "2:1 'a.example' | needs a port from 1 to 65535",
                "3:19 '127.1:1' | not a valid IP address",
            ],
        ),
        // credentials
        (
            "[credentials.'a b']\nkind = 'codex'",
            &["1:14 'a b' | a credential's name is 1 to 64 letters, digits, `-` and `_`"],
        ),
        (
            "[credentials.a]",
            &["1:14 a | credential `a` needs a `kind`: `codex`, `api_key` or `oauth`"],
        ),
        (
            "[credentials.openai]\nkind = 'api'\nsource = 'env:A'",
            &["2:8 'api' | expected `codex` or `api_key` or `oauth`"],
        ),
        (
            "[credentials.a]\nkind = 'api'",
            &["2:8 'api' | expected `codex` or `api_key` or `oauth`"],
        ),
        ("[credentials.a]\nkind = 'oauth'", &["1:14 a | credential `a` needs an `issuer`"]),
        (
            "[credentials.a]\nkind = 'oauth'\nissuer = 'https://i.example'",
            &["1:14 a | credential `a` needs a `client_id`"],
        ),
        (
            "[credentials.a]\nkind = 'oauth'\nissuer = 'http://i.example'\nclient_id = 'a b'\n\
             client_secret = 's3cr3t'\nscopes = ['']\ngrant = 'password'",
            &[
                "3:10 'http://i.example' | an issuer is only spoken to over https",
                "4:13 'a b' | expected visible ASCII without spaces",
                "5:17 ******** | expected `env:NAME` or `file:/path`, never the value itself",
                "6:11 '' | expected visible ASCII without spaces",
                "7:9 'password' | expected `authorization_code` or `device_code` or `client_credentials`",
            ],
        ),
        (
            "[credentials.a]\nkind = 'oauth'\nissuer = 'https://i.example'\nclient_id = 'a'\n\
             grant = 'client_credentials'\nsource = 'env:A'",
            &["6:1 source | `source` has no meaning with kind `oauth`"],
        ),
        (
            "[credentials.a]\nkind = 'oauth'\nissuer = 'https://i.example'\nclient_id = 'a'\n\
             grant = 'client_credentials'",
            &["1:14 a | credential `a` needs a `client_secret` for grant `client_credentials`"],
        ),
        ("[credentials.a]\nkind = 'api_key'", &["1:14 a | credential `a` needs a `source`"]),
        (
            "[credentials.a]\nkind = 'api_key'\nsource = 'env:A'\nhome = '/x'",
            &["4:1 home | `home` has no meaning with kind `api_key`"],
        ),
        (
            "[credentials.openai]\nsource = 'env:A'",
            &["2:1 source | `source` has no meaning with kind `codex`"],
        ),
        (
            "[credentials.a]\nkind = 'api_key'\nsource = 'command:pass'",
            &["3:10 ************** | `command:` comes in a later version"],
        ),
        (
            "[credentials.a]\nkind = 'api_key'\nsource = 'env:A B'",
            &["3:10 'env:A B' | expected the name of a variable after `env:`"],
        ),
        (
            "[credentials.a]\nkind = 'api_key'\nsource = 'file:'",
            &["3:10 'file:' | expected a path after `file:`"],
        ),
        (
            "[credentials.a]\nkind = 'api_key'\nsource = 'hunter2'",
            &["3:10 ********* | expected `env:NAME` or `file:/path`, never the value itself"],
        ),
        // rules by themselves
        ("[[rules]]\naction = 'tunnel'", &["1:1 [[rules]] | a rule needs a `host`"]),
        (
            "[[rules]]\nhost = 'https://a.example'\ncredential = 'openai'",
            &["2:8 'https://a.example' | a host stands alone, without scheme and path"],
        ),
        (
            "[[rules]]\nhost = '*.com'\ncredential = 'openai'",
            &["2:8 '*.com' | a star is the whole first label of a name with two more, as in \
               `*.example.com`"],
        ),
        (
            "[[rules]]\nhost = 'a.*.example'\ncredential = 'openai'",
            &[
                "2:8 'a.*.example' | a star is the whole first label of a name with two more, as in \
               `*.example.com`",
            ],
        ),
        (
            "[[rules]]\nhost = 'a.example'",
            &["1:1 [[rules]] | a rule with action `inject` needs a `credential`"],
        ),
        (
            "[[rules]]\nhost = 'a.example'\naction = 'allow'",
            &["3:10 'allow' | expected `inject` or `tunnel` or `issuer` or `refuse`"],
        ),
        (
            &with_key("paths = ['v1', '/ok', '/a/../b']\nmethods = ['get', 'TRACE', 'A B', 'PUT']"),
            &[
                "7:10 'v1' | a path starts with `/` and has no query, escape, empty or dot segment",
                "7:23 '/a/../b' | a path starts with `/` and has no query, escape, empty or dot \
                 segment",
                "8:12 'get' | methods are written in capitals",
                "8:19 'TRACE' | a credential is never sent with this method",
                "8:28 'A B' | not a method",
            ],
        ),
        (
            &with_key("login = 'plus'\nunmatched = 'drop'\nname = ''"),
            &[
                "7:9 'plus' | expected `chatgpt` or `api_key`",
                "8:13 'drop' | expected `forward` or `refuse`",
                "9:8 '' | the name is empty",
            ],
        ),
        (
            &with_key("headers = { 'A B' = 'x', Host = 'x', C = '{secret}', D = '', E = 1 }"),
            &[
                "7:13 'A B' | not the name of a header field",
                "7:26 Host | `host` is not for rules to set or remove",
                "7:42 '{secret}' | unknown field `secret`: one of account_id, email, fedramp, \
                 plan, token",
                "7:58 '' | the value is empty",
                "7:66 1 | expected a string, found an integer",
            ],
        ),
        (&with_key("headers = {}"), &["7:11 {} | `headers` is empty: nothing would be injected"]),
        (&with_key("headers = { A = '{}', a = '{}' }"), &["7:23 a | `a` is set twice"]),
        (
            &with_key("headers = { A = '{}' }\nheader = 'A'\nformat = '{}'"),
            &[
                "8:1 header | `header` together with `headers`: give one of them",
                "9:1 format | `format` together with `headers`: give one of them",
            ],
        ),
        (
            &with_key("header = 'Content-Length'\nformat = '{token'\nremove = ['Proxy-X']"),
            &[
                "7:10 'Content-Length' | `content-length` is not for rules to set or remove",
                "8:10 '{token' | a `{` or `}` has no partner",
                "9:11 'Proxy-X' | `proxy-x` is not for rules to set or remove",
            ],
        ),
        (
            "[[rules]]\nhost = 'a.example'\naction = 'refuse'\nscrub = true",
            &["4:1 scrub | `scrub` has no meaning with action `refuse`"],
        ),
        (
            "[[rules]]\nhost = 'a.example'\naction = 'tunnel'\npaths = ['/']\nmethods = ['GET']\n\
             credential = 'openai'\nunmatched = 'refuse'",
            &[
                "4:1 paths | `paths` has no meaning with action `tunnel`",
                "5:1 methods | `methods` has no meaning with action `tunnel`",
                "6:1 credential | `credential` has no meaning with action `tunnel`",
                "7:1 unmatched | `unmatched` has no meaning with action `tunnel`",
            ],
        ),
        (
            "[[rules]]\nhost = 'auth.example'\naction = 'issuer'\ncredential = 'openai'\n\
             remove = ['Cookie']",
            &["5:1 remove | `remove` has no meaning with action `issuer`"],
        ),
        (
            "[[rules]]\nhost = 'api.openai.com'\naction = 'refuse'\nlogin = 'chatgpt'",
            &["4:1 login | `login` has no meaning with action `refuse`"],
        ),
        // rules among others
        (
            "[[rules]]\nhost = 'A.example'\naction = 'tunnel'\n\
             [[rules]]\nhost = 'a.example:443'\naction = 'tunnel'\n\
             [[rules]]\nname = 'a.example'\nhost = 'b.example'\naction = 'tunnel'",
            &[
                "5:8 'a.example:443' | a second rule with the name `a.example`",
                "8:8 'a.example' | a second rule with the name `a.example`",
            ],
        ),
        (
            "[[rules]]\nhost = 'a.example'\ncredential = 'opnai'",
            &["3:14 'opnai' | unknown credential `opnai`"],
        ),
        (
            &with_key(
                "login = 'api_key'\nheaders = { A = '{token}', B = '{account_id}{plan}' }\n\
                 [[rules]]\nhost = 'b.example'\naction = 'issuer'\ncredential = 'key'",
            ),
            &[
                "7:9 'api_key' | `key` is an API key: only kind `codex` has logins of two kinds",
                "8:32 '{account_id}{plan}' | `key` is an API key and has no {account_id}",
                "8:32 '{account_id}{plan}' | `key` is an API key and has no {plan}",
                "12:14 'key' | `key` is an API key, which has no issuer",
            ],
        ),
        (
            "[[rules]]\nname = 'mine'\nhost = 'chatgpt.com'\naction = 'tunnel'",
            &["3:8 'chatgpt.com' | rule `mine` tunnels a host that rule `chatgpt` intercepts"],
        ),
        (
            "[[rules]]\nname = 'mine'\nhost = 'ab.chatgpt.com'\ncredential = 'openai'",
            &["3:8 'ab.chatgpt.com' | rule `chatgpt-telemetry` tunnels a host that rule `mine` \
               intercepts"],
        ),
        (
            "[[rules]]\nhost = 'a.example'\naction = 'refuse'",
            &["2:8 'a.example' | rule `a.example` refuses nothing"],
        ),
    ];
    for (text, expected) in table {
        let expected: Vec<String> = expected.iter().map(|it| format!("1.toml:{it}")).collect();
        assert_eq!(mistakes(&[text], &[]), expected, "{text}");
    }
}

#[test]
fn a_mistake_says_what_to_write() {
    let table = [
        ("listen = 8377", "listen = \"127.0.0.1:8377\""),
        ("[[listeners]]\naddress = 8377", "address = \"127.0.0.1:8377\""),
        ("listen = 83770", ""),
        ("[[listeners]]\naddress = '[::1]:1'\nallow_uids = ['me']", "the number: id -u me"),
        ("[[listeners]]\naddress = '[::1]:1'\nallow_uids = ['a; b']", "the number: id -u NAME"),
        (
            "[[rules]]\nhost = 'localhost'\nport = 18443\naction = 'tunnel'",
            "the port is part of the host: host = \"localhost:18443\"",
        ),
        (
            "[[rules]]\nhost = 'a.example:1'\nport = 2\naction = 'tunnel'",
            "the port is part of the host: host = \"HOST:2\"",
        ),
        (
            "[[rules]]\nhost = 'a.example'\nport = 'x'\naction = 'tunnel'",
            "the port is part of the host: host = \"a.example:PORT\"",
        ),
        ("[upstream]\nport = 1", "known here: ca_bundle"),
        (
            "listen = '[::1]:1'\n[[listeners]]\naddress = '[::1]:1'",
            "take one of them out, or give it another port",
        ),
    ];
    for (text, expected) in table {
        let errors = load(&[text], &[]).map(|_| ()).expect_err(text);
        let [mistake] = errors.mistakes() else { panic!("{text}: {errors:?}") };
        let hint = mistake.hint().unwrap_or_default();
        assert!(
            hint.starts_with(expected) && hint.is_empty() == expected.is_empty(),
            "{text}: {hint}"
        );
    }
}

#[test]
fn addresses_as_they_are_written_and_typed() {
    let unix = |path: &str| Some(ListenAddress::Unix(path.into()));
    let here = |port| Some(ListenAddress::Tcp((Ipv4Addr::LOCALHOST, port).into()));
    let table = [
        ("127.0.0.1:8377", here(8377), here(8377)),
        ("unix:/s", unix("/s"), unix("/s")),
        ("unix:~/s", unix("/home/me/s"), unix("/home/me/s")),
        ("unix:~you/s", None, None),
        ("8377", None, here(8377)),
        ("localhost:8377", None, here(8377)),
        ("0", None, here(0)),
        ("", None, None),
        ("localhost:", None, None),
        ("localhost", None, None),
        ("83770", None, None),
        ("proxy.example:8377", None, None),
    ];
    for (text, written, typed) in table {
        let home = Some(Path::new("/home/me"));
        assert_eq!(ListenAddress::written(text, home).ok(), written, "{text}");
        assert_eq!(ListenAddress::typed(text, home).ok(), typed, "{text}");
    }
    let config = load(&["[[listeners]]\naddress = 'unix:~/s'"], &[(env::LISTEN, "")]).unwrap();
    assert_eq!(config.listeners, [Listener::on("unix:/home/me/s".parse().unwrap())]);
    let config = load(&[""], &[(env::LISTEN, "localhost:1")]).unwrap();
    assert_eq!(config.listeners, [Listener::on("127.0.0.1:1".parse().unwrap())]);
    let text = "listen = '127.0.0.1:0'\n[[listeners]]\naddress = '127.0.0.1:0'";
    assert_eq!(load(&[text], &[]).unwrap().listeners.len(), 2);
}

#[test]
fn mistakes_of_all_layers_come_together() {
    let user = "[[rules]]\nhost = 'a..example'\ncredential = 'a b'\n";
    let system = "listen = 'here\ndefault = 'tunnel'\n";
    let variables = [
        (env::LISTEN, "localhost"),
        (env::UPSTREAM_PROXY, "http://me:pa55word@:1"),
        ("CODEX_CA_CERTIFICATE", "corp.pem"),
    ];
    let found = mistakes(&[user, system], &variables);
    let expected = [
        "1.toml:2:8 'a..example' | not a valid host name",
        "1.toml:3:14 'a b' | a credential's name is 1 to 64 letters, digits, `-` and `_`",
        "2.toml:1:15  | invalid literal string, expected `'`",
        "VALETKEY_LISTEN:1:1 localhost | expected an IP address and a port, as in `127.0.0.1:8377`",
        "VALETKEY_UPSTREAM_PROXY:1:1 ******************@:1 | not a proxy: expected `http://`, \
         `https://`, `socks5h://` or `socks5://` with a host, and a port where it is not 80, 443 or 1080",
    ];
    assert_eq!(found, expected);
}

#[test]
fn one_mistake_does_not_hide_another() {
    let text = "use = ['openai', 'opnai']\n[[rules]]\nhost = 'a..example'\n\
                credential = 'nobody'\n[[rules]]\nhost = 'b..example'\ncredential = 'key'\n\
                login = 'chatgpt'\n[credentials.key]\nkind = 'api_key'\nsource = 'env:KEY'\n";
    let expected = [
        "1.toml:1:18 'opnai' | unknown preset `opnai`",
        "1.toml:3:8 'a..example' | not a valid host name",
        "1.toml:6:8 'b..example' | not a valid host name",
        "1.toml:8:9 'chatgpt' | `key` is an API key: only kind `codex` has logins of two kinds",
    ];
    assert_eq!(mistakes(&[text], &[]), expected);
    let text = text.replace(", 'opnai'", "");
    let expected = [
        "1.toml:3:8 'a..example' | not a valid host name",
        "1.toml:4:14 'nobody' | unknown credential `nobody`",
    ];
    assert_eq!(mistakes(&[&text], &[])[..2], expected);
    let proxy = mistakes(&[""], &[("ALL_PROXY", "ftp://corp")]);
    assert!(proxy[0].starts_with("ALL_PROXY:1:1 ftp://corp | not a proxy"), "{proxy:?}");
}

#[test]
fn a_credential_that_a_garbled_file_may_have_is_not_called_unknown() {
    let user = "[[rules]]\nhost = 'a.example'\ncredential = 'key'\n";
    let system = "[credentials.key]\nkind = 'api_key'\nsource = env:KEY\n";
    let found = mistakes(&[user, system], &[]);
    assert!(found.iter().all(|mistake| mistake.starts_with("2.toml:3:")), "{found:?}");
}

#[test]
fn a_report_shows_the_line_and_no_secret() {
    let text = "[credentials.a]\nkind = 'api_key'\ntoken = 'hunter2'\n\
                source = 'sk-proj-0123456789abcdef'\n\
                [upstream]\nproxy = 'http://me:pa55word@:1'\n\
                [[rules]]\nhost = 'a.example'\ncredential = 'a'\n\
                headers = { A = 'Bearer 0123456789abcdefghij{' }\n";
    let errors = load(&[text], &[("HTTPS_PROXY", "ftp://me:pa55word@proxy")]).unwrap_err();
    assert_eq!(errors.to_string(), "the configuration has 4 mistakes");
    for proxy in ["me:pa55word@corp:1:2", "http://me:pa55word/@corp", "http://me:pa55@word@:1"] {
        let shown = load(&[], &[("HTTPS_PROXY", proxy)]).unwrap_err().render(false, 100);
        assert!(shown.contains("HTTPS_PROXY:1:1") && !shown.contains("pa55"), "{shown}");
        let inline = format!("upstream = {{ proxy = '{proxy}', trust = 1 }}");
        let shown = load(&[&inline], &[]).unwrap_err().render(false, 100);
        assert!(shown.contains("trust = 1") && !shown.contains("pa55"), "{shown}");
    }
    for color in [false, true] {
        let report = errors.render(color, 100);
        let shown = format!("{report}{errors:?}");
        for secret in ["hunter2", "sk-proj", "pa55word", "0123456789"] {
            assert!(!shown.contains(secret), "{shown}");
        }
        assert!(report.contains("1.toml:3:1") && report.contains("known here: kind"), "{report}");
        assert_eq!(color, report.contains('\u{1b}'));
    }
}

#[test]
fn the_defaults() {
    let config = load(&[], &[]).unwrap();
    assert_eq!(config.listeners, [Listener::on("127.0.0.1:8377".parse().unwrap())]);
    assert_eq!(config.upstream.trust, Trust::SystemAndBundle);
    assert!(config.upstream.ca_bundles.is_empty() && config.upstream.proxies.is_empty());
    let codex = CredentialKind::Codex { home: "/home/me/.codex".into(), keep: Keep::File };
    assert_eq!(config.credentials, [("openai".parse().unwrap(), codex)].into());
    assert_eq!(config.rules.decide(&target("other.example")), Decision::Tunnel);
}

#[test]
fn the_example_has_every_key() {
    let text = include_str!("../../config/example.toml");
    // Two of them would delete the login of whoever copies it.
    let all = text.replace("\n#forced_", "\nforced_");
    assert_eq!(all.len(), text.len() - 2);
    let text = &*all;
    let config = load(&[text], &[]).map_err(|errors| errors.render(false, 100)).unwrap();
    assert_eq!(config.listeners.len(), 2);
    let keys = [
        file::DOCUMENT,
        file::LISTENER,
        file::UPSTREAM,
        file::CREDENTIAL,
        rule::KEYS,
        audit::KEYS,
        &limits::names(),
    ];
    for key in keys.concat() {
        let has = |line: &str| line.starts_with(&format!("{key} ="));
        let is_table = ["[[K]]", "[K]", "[K.", "[upstream.K]"]
            .iter()
            .any(|head| text.contains(&head.replace('K', key)));
        assert!(is_table || text.lines().any(has), "{key}");
    }
}

#[test]
fn the_higher_layer_wins() {
    let user = "listen = '127.0.0.1:1'\n[upstream]\ntrust = 'system'\n\
                [upstream.resolve]\n'a.example:443' = '127.0.0.1:1'\n\
                [credentials.openai]\nhome = 'mine'\n\
                [credentials.key]\nkind = 'api_key'\nsource = 'file:~/key'\n\
                [[rules]]\nname = 'same'\nhost = 'user.example'\ncredential = 'key'\n";
    let system = "listen = '127.0.0.1:2'\ndefault = 'refuse'\n\
                  [upstream]\ntrust = 'mozilla+bundle'\nca_bundle = 'corp.pem'\n\
                  [upstream.resolve]\n'a.example:443' = '127.0.0.1:2'\n'b.example:1' = '[::1]:2'\n\
                  [credentials.key]\nkind = 'codex'\nhome = '/system'\n\
                  [[rules]]\nname = 'same'\nhost = 'system.example'\ncredential = 'key'\n\
                  [[rules]]\nname = 'chatgpt'\nhost = 'own.example'\ncredential = 'key'\n";
    let config = load(&[user, system], &[]).unwrap();
    assert_eq!(config.listeners, [Listener::on("127.0.0.1:1".parse().unwrap())]);
    assert_eq!(config.upstream.trust, Trust::System);
    assert_eq!(config.upstream.ca_bundles[0].path, Path::new("/etc/valetkey/corp.pem"));
    let resolve: Vec<String> =
        config.upstream.resolve.iter().map(|(from, to)| format!("{from} {to}")).collect();
    assert_eq!(resolve, ["a.example:443 127.0.0.1:1", "b.example:1 [::1]:2"]);
    let key = CredentialKind::ApiKey { source: SourceSpec::File("/home/me/key".into()) };
    let openai = CredentialKind::Codex { home: "/etc/valetkey/mine".into(), keep: Keep::File };
    let credentials = [("key".parse().unwrap(), key), ("openai".parse().unwrap(), openai)];
    assert_eq!(config.credentials, credentials.into());
    let table = [
        ("user.example", Decision::Intercept),
        ("system.example", Decision::Refuse),
        ("own.example", Decision::Intercept),
        ("api.openai.com", Decision::Intercept),
    ];
    for (host, expected) in table {
        assert_eq!(config.rules.decide(&target(host)), expected, "{host}");
    }
    let names: Vec<&str> = config.rules.iter().map(|rule| rule.name.as_str()).collect();
    assert_eq!(names.iter().filter(|name| **name == "chatgpt").count(), 1);
}

#[test]
fn each_limit_is_that_of_the_highest_layer_that_has_it() {
    let user = "[limits]\nhead_time = 3\nstreams = 5";
    let system = "[limits]\nstreams = 6\nconnections = 100";
    let limits = load(&[user, system], &[]).unwrap().limits;
    let head_time = std::time::Duration::from_secs(3);
    assert_eq!(limits, Limits { head_time, streams: 5, connections: 100, ..Limits::USUAL });
    assert_eq!(load(&[], &[]).unwrap().limits, Limits::USUAL);
}

#[test]
fn presets_can_be_switched_off() {
    let config = load(&["use = []", "use = ['openai']"], &[]).unwrap();
    assert!(config.credentials.is_empty() && config.rules.iter().next().is_none());
    let config = load(&["default = 'refuse'", "use = []"], &[]).unwrap();
    assert!(config.credentials.is_empty());
}

#[test]
fn a_listener_with_tls_is_called_as_it_is_reached() {
    for (address, first) in [
        ("127.0.0.1:1", "127.0.0.1"),
        ("192.0.2.1:1", "192.0.2.1"),
        ("0.0.0.0:1", "127.0.0.1"),
        ("[::]:1", "[::1]"),
        ("unix:/s", "localhost"),
    ] {
        let file = format!("[[listeners]]\naddress = '{address}'\ntls = true");
        let config = load(&[&file], &[]).unwrap();
        let names: Vec<_> = config.listeners[0].tls_names.iter().map(Host::to_string).collect();
        assert_eq!(names[0], first, "{address}");
        assert!(names.ends_with(&["localhost".to_owned(), "host.docker.internal".to_owned()]));
        let named = config.ca_names().iter().map(Host::to_string).collect::<Vec<_>>();
        assert!(names.iter().all(|name| named.contains(name)), "{named:?}");
    }
}

#[test]
fn flags_and_variables_win_over_files() {
    let file = "[[listeners]]\naddress = '127.0.0.1:1'\nallow_uids = [7]\n\
                [[listeners]]\naddress = '127.0.0.1:2'\n";
    let variables = [(env::LISTEN, "127.0.0.1:3"), (env::SERVER_INFO, "/variable")];
    let flags = Overrides {
        listen: Some("[::1]:0".to_owned()),
        server_info: Some("/flag".into()),
        ..Overrides::default()
    };
    let table = [
        (&variables[..0], Overrides::default(), "127.0.0.1:1", 2, None),
        (&variables[..], Overrides::default(), "127.0.0.1:3", 1, Some("/variable")),
        (&variables[..], flags, "[::1]:0", 1, Some("/flag")),
    ];
    for (variables, flags, address, count, server_info) in table {
        let config = load_with(&[file], variables, &flags).unwrap();
        let address = ListenAddress::Tcp(address.parse().unwrap());
        assert_eq!((&config.listeners[0].address, config.listeners.len()), (&address, count));
        assert_eq!(config.listeners[0].allow_uids, [7], "the conditions stay");
        assert_eq!(config.server_info.as_deref(), server_info.map(Path::new));
    }
    let odd = Overrides { listen: Some("nowhere:1".to_owned()), ..Overrides::default() };
    let errors = load_with(&[file], &[], &odd).unwrap_err();
    assert_eq!(errors.mistakes()[0].file(), Some("--listen"));
}

#[test]
fn which_bundle_counts() {
    let file = "[upstream]\nca_bundle = '~/corp.pem'\n";
    let ours = (env::UPSTREAM_CA_BUNDLE, "ours.pem");
    let none = (env::UPSTREAM_CA_BUNDLE, "");
    let (codex, ssl) = (("CODEX_CA_CERTIFICATE", "codex.pem"), ("SSL_CERT_FILE", "ssl.pem"));
    type Row<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [&'a str]);
    let table: &[Row<'_>] = &[
        ("", &[], &[]),
        ("", &[ssl], &["ssl.pem SSL_CERT_FILE"]),
        ("", &[ssl, codex], &["codex.pem CODEX_CA_CERTIFICATE", "ssl.pem SSL_CERT_FILE"]),
        ("", &[ssl, ("CODEX_CA_CERTIFICATE", "")], &["ssl.pem SSL_CERT_FILE"]),
        ("", &[none, ssl, codex], &[]),
        (file, &[none, ssl], &["/home/me/corp.pem upstream.ca_bundle"]),
        (file, &[ssl], &["/home/me/corp.pem upstream.ca_bundle", "ssl.pem SSL_CERT_FILE"]),
        (
            file,
            &[ours, ssl],
            &["ours.pem VALETKEY_UPSTREAM_CA_BUNDLE", "/home/me/corp.pem upstream.ca_bundle"],
        ),
    ];
    for (file, variables, expected) in table {
        let config = load(&[file], variables).unwrap();
        let found: Vec<String> = config
            .upstream
            .ca_bundles
            .iter()
            .map(|bundle| format!("{} {}", bundle.path.display(), bundle.named_by))
            .collect();
        assert_eq!(found, *expected, "{variables:?}");
    }
}

#[test]
fn which_proxy_counts() {
    let (url, none) = ("[upstream]\nproxy = 'http://file:1'\n", "[upstream]\nproxy = 'none'\n");
    let (upper, lower) = (("HTTPS_PROXY", "http://upper:1"), ("https_proxy", "http://lower:1"));
    let all = ("ALL_PROXY", "socks5h://all");
    type Row<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [&'a str]);
    let table: &[Row<'_>] = &[
        ("", &[], &[]),
        ("", &[("HTTP_PROXY", "http://plain:1")], &[]),
        ("", &[upper], &["http://upper:1 HTTPS_PROXY"]),
        ("", &[upper, lower], &["http://lower:1 https_proxy"]),
        ("", &[all, upper], &["http://upper:1 HTTPS_PROXY", "socks5h://all:1080 ALL_PROXY"]),
        (url, &[upper], &["http://file:1 upstream.proxy"]),
        (none, &[upper], &[]),
        (url, &[(env::UPSTREAM_PROXY, ""), upper], &[]),
        (url, &[(env::UPSTREAM_PROXY, "none"), upper], &[]),
        (url, &[(env::UPSTREAM_PROXY, "env"), upper], &["http://upper:1 HTTPS_PROXY"]),
        (
            none,
            &[(env::UPSTREAM_PROXY, "https://me:pa55@ours:1"), upper],
            &["https://ours:1 VALETKEY_UPSTREAM_PROXY"],
        ),
    ];
    for (file, variables, expected) in table {
        let config = load(&[file], variables).unwrap();
        let found: Vec<String> = config
            .upstream
            .proxies
            .iter()
            .map(|proxy| format!("{} {}", proxy.url, proxy.named_by))
            .collect();
        assert_eq!(found, *expected, "{variables:?}");
    }
    let no_proxy = [("NO_PROXY", "upper"), ("no_proxy", "lower")];
    assert_eq!(load(&[], &no_proxy).unwrap().upstream.no_proxy, "lower");
}

#[test]
fn where_the_login_of_the_chain_comes_from() {
    let table = [
        ("'file:corp.login'", Some("file:/etc/valetkey/corp.login")),
        ("'env:CORP_LOGIN'", Some("env:CORP_LOGIN")),
        ("'command: pass show corp'", Some("pass show corp")),
        ("'command:'", None),
        ("'me:pa55word'", None),
        ("1", None),
    ];
    for (value, expected) in table {
        let text = format!("[upstream]\nproxy = 'http://corp:1'\nproxy_login = {value}\n");
        let loaded = load(&[&text], &[]);
        let shown = loaded.as_ref().ok().map(|it| it.upstream.proxy_login.as_ref().unwrap());
        let shown = shown.map(|login| match login {
            LoginSpec::Command(line) => line.clone(),
            source => source.to_string(),
        });
        match expected {
            Some(expected) => assert_eq!(shown.as_deref(), Some(expected), "{value}"),
            None => {
                let said = loaded.unwrap_err().render(false, 100);
                assert!(!said.contains("pa55word"), "{said}");
            }
        }
    }
}

#[test]
fn a_login_is_for_the_proxy_of_its_own_file() {
    let bound = "[upstream]\nproxy = 'http://corp:1'\nproxy_login = 'env:L'\n";
    let free = "[upstream]\nproxy_login = 'env:L'\n";
    type Row<'a> = (&'a str, &'a [(&'a str, &'a str)], bool);
    let table: &[Row<'_>] = &[
        (bound, &[], true),
        (bound, &[(env::UPSTREAM_PROXY, "http://corp:1")], true),
        (bound, &[(env::UPSTREAM_PROXY, "http://evil:1")], false),
        (bound, &[(env::UPSTREAM_PROXY, "http://corp:2")], false),
        (bound, &[(env::UPSTREAM_PROXY, "socks5h://corp:1")], false),
        (bound, &[(env::UPSTREAM_PROXY, "env"), ("HTTPS_PROXY", "http://evil:1")], false),
        (free, &[("HTTPS_PROXY", "http://any:1")], true),
    ];
    for (file, variables, counts) in table {
        let upstream = load(&[file], variables).unwrap().upstream;
        assert_eq!(upstream.proxy_login.is_some(), *counts, "{variables:?}");
        assert_eq!(upstream.other_logins.is_empty(), *counts, "{variables:?}");
    }
}

#[test]
fn a_running_valetkey_is_no_proxy_unless_it_was_asked_for() {
    let is_valetkey = |target: &Target| target.host.is_loopback() && target.port == 8377;
    let here = "http://127.0.0.1:8377";
    let mut inherited =
        load(&[], &[("HTTPS_PROXY", here), ("ALL_PROXY", "http://corp:1")]).unwrap().upstream;
    inherited.ignore_proxies(is_valetkey);
    let left: Vec<&str> = inherited.proxies.iter().map(|proxy| proxy.named_by).collect();
    assert_eq!(left, ["ALL_PROXY"]);
    let mut asked = load(&[], &[(env::UPSTREAM_PROXY, here)]).unwrap().upstream;
    asked.ignore_proxies(is_valetkey);
    assert_eq!(asked.proxies.len(), 1);
}

#[test]
fn the_openai_preset_decides_by_the_kind_of_login() {
    let rules = load(&[], &[]).unwrap().rules;
    use Decision::{Intercept, Tunnel};
    use LoginKind::{ApiKey, ChatGpt};
    let table = [
        ("chatgpt.com", [Intercept, Intercept, Tunnel]),
        ("eu.chatgpt.com", [Intercept, Intercept, Tunnel]),
        ("a.eu.chatgpt.com", [Tunnel, Tunnel, Tunnel]),
        ("ab.chatgpt.com", [Tunnel, Tunnel, Tunnel]),
        ("api.openai.com", [Intercept, Tunnel, Intercept]),
        ("auth.openai.com", [Intercept, Intercept, Tunnel]),
        ("openai.com", [Tunnel, Tunnel, Tunnel]),
        ("chatgpt.com.evil.example", [Tunnel, Tunnel, Tunnel]),
    ];
    for (host, expected) in table {
        for (kind, expected) in [None, Some(ChatGpt), Some(ApiKey)].into_iter().zip(expected) {
            let rules = rules.with_kinds(kinds(kind));
            assert_eq!(rules.decide(&target(host)), expected, "{host} with {kind:?}");
        }
    }
}

#[test]
fn the_openai_preset_signs_in_where_it_should() {
    let rules = load(&[], &[]).unwrap().rules;
    let chatgpt = Some(LoginKind::ChatGpt);
    let key = Some(LoginKind::ApiKey);
    let table = [
        (chatgpt, "chatgpt.com", "/backend-api/codex/responses", "chatgpt"),
        (chatgpt, "chatgpt.com", "/backend-api/wham/accounts/check", "chatgpt"),
        (chatgpt, "chatgpt.com", "/backend-api/ps/mcp", "chatgpt"),
        (chatgpt, "chatgpt.com", "/backend-api/plugins/export/curated", "chatgpt"),
        (chatgpt, "chatgpt.com", "/backend-api/accounts", "Forward"),
        (chatgpt, "chatgpt.com", "/backend-api/codexx", "Forward"),
        (chatgpt, "chatgpt.com", "/", "Forward"),
        (chatgpt, "chatgpt.com", "/backend-api/wham/remote/control/server/enroll", "refused"),
        (chatgpt, "eu.chatgpt.com", "/backend-api/wham/remote/control/server", "refused"),
        (chatgpt, "eu.chatgpt.com", "/backend-api/codex/responses", "chatgpt-workspaces"),
        (chatgpt, "auth.openai.com", "/oauth/token", "openai-issuer"),
        (chatgpt, "auth.openai.com", "/oauth/revoke", "openai-issuer"),
        (chatgpt, "auth.openai.com", "/oauth/authorize", "Forward"),
        (chatgpt, "auth.openai.com", "/api/accounts/deviceauth/usercode", "Forward"),
        (chatgpt, "api.openai.com", "/v1/responses", "Forward"),
        (key, "api.openai.com", "/v1/responses", "openai-api-responses"),
        (key, "api.openai.com", "/v1/responses/r_1", "openai-api-responses"),
        (key, "api.openai.com", "/v1/realtime", "openai-api"),
        (key, "api.openai.com", "/v1", "openai-api"),
        (key, "api.openai.com", "/dashboard", "Forward"),
        (key, "api.openai.com", "/v1/organization/admin_api_keys", "refused"),
        (key, "api.openai.com", "/v1/organization", "refused"),
        (key, "api.openai.com", "/v1/projects/p/roles", "refused"),
        (key, "api.openai.com", "/v1/realtime/client_secrets", "refused"),
        (key, "api.openai.com", "/v1/chatkit/sessions", "refused"),
        (key, "chatgpt.com", "/backend-api/codex/models", "Forward"),
        (key, "auth.openai.com", "/oauth/token", "Forward"),
    ];
    for (kind, host, path, expected) in table {
        let rules = rules.with_kinds(kinds(kind));
        let found = match rules.find(&Origin::https(target(host)), &Method::GET, path) {
            Found::Rule(rule) if matches!(rule.action, crate::rules::Action::Refuse) => "refused",
            Found::Rule(rule) => &rule.name.clone(),
            Found::Unmatched(unmatched) => &format!("{unmatched:?}"),
        };
        assert_eq!(found, expected, "{host}{path} with {kind:?}");
    }
}

#[test]
fn no_identity_of_the_client_goes_through() {
    let rules = load(&[], &[]).unwrap().rules;
    let mut seen = 0;
    for rule in rules.iter() {
        let crate::rules::Action::Inject { injection, .. } = &rule.action else { continue };
        let mut headers = http::HeaderMap::new();
        for name in [
            "authorization",
            "chatgpt-account-id",
            "x-openai-fedramp",
            "openai-organization",
            "openai-project",
            "x-openai-agent-assertion",
            "cookie",
        ] {
            headers.insert(name, http::HeaderValue::from_static("client"));
        }
        injection.strip(&mut headers);
        let left: Vec<&str> = headers.keys().map(http::HeaderName::as_str).collect();
        assert_eq!(left, ["cookie"], "{}", rule.name);
        seen += 1;
    }
    assert!(seen > 0);
}

#[test]
fn a_named_file_must_exist() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing.toml");
    let env = Environment::from_pairs([("HOME", folder.path())]);
    let flag = Overrides { config: Some(missing.clone()), ..Overrides::default() };
    let errors = Config::load(&flag, &env).unwrap_err();
    assert!(errors.mistakes()[0].to_string().contains("missing.toml"), "{errors:?}");
    let env_named = Environment::from_pairs([
        ("HOME", folder.path().as_os_str()),
        (env::CONFIG, missing.as_os_str()),
    ]);
    assert!(Config::load(&Overrides::default(), &env_named).is_err());
    std::fs::write(&missing, "listen = '127.0.0.1:5'\n[upstream]\nca_bundle = 'corp.pem'").unwrap();
    let config = Config::load(&flag, &env_named).unwrap();
    assert_eq!(config.listeners[0], Listener::on("127.0.0.1:5".parse().unwrap()));
    assert_eq!(config.upstream.ca_bundles[0].path, folder.path().join("corp.pem"));
    std::fs::write(&missing, b"listen = '\xff'").unwrap();
    assert_eq!(Config::load(&flag, &env).unwrap_err().len(), 1);
}

#[test]
fn without_a_home_folder() {
    let env = Environment::from_pairs([("PATH", "/bin")]);
    let errors = Config::load(&Overrides::default(), &env).unwrap_err();
    let report = errors.render(false, 80);
    assert!(report.contains("HOME is not set"), "{report}");
}

proptest::proptest! {
    /// Whatever a file says, it is read or its mistakes are shown.
    #[test]
    fn no_text_is_too_odd(
        pieces in proptest::collection::vec(proptest::sample::select(PIECES), 0..30),
        start in proptest::sample::select(&["", "[[rules]]\nhost = ", "[upstream]\nproxy = '"]),
    ) {
        let text = format!("{start}{}", pieces.concat());
        let value = text.replace('\0', "");
        if let Err(errors) = load(&[&text], &[("HTTPS_PROXY", &value)]) {
            for mistake in errors.mistakes() {
                proptest::prop_assert!(mistake.underlined().is_some());
                proptest::prop_assert!(mistake.position().is_some());
            }
            proptest::prop_assert!(!errors.render(false, 40).is_empty());
        }
    }
}

const PIECES: &[&str] = &[
    "a",
    "rules",
    "host",
    "[",
    "]",
    "[[",
    "]]",
    "{",
    "}",
    "=",
    ".",
    ",",
    "'",
    "\"",
    "'''",
    "\"\"\"",
    "#",
    "\\",
    "\\u00",
    " ",
    "\n",
    "\r",
    "\r\n",
    "\t",
    "\0",
    "\u{e9}",
    "\u{1f511}",
    "\u{feff}",
    "://",
    "@",
    "1",
    "-",
    "_",
    "1979-05-27",
    "true",
    "0x",
];

fn target(host: &str) -> Target {
    Target::parse(&format!("{host}:443")).unwrap()
}

fn kinds(kind: Option<LoginKind>) -> BTreeMap<CredentialName, LoginKind> {
    kind.map(|kind| ("openai".parse().unwrap(), kind)).into_iter().collect()
}
