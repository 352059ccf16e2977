//! `valetkey init systemd`: a user's service and its socket, which starts it at the first client.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use super::place::{Arguments, Plan, Wanted, filled};
use super::service::{self, Service, text};
use crate::cli::Typed;
use crate::cli::output::{self, Failure};
use crate::config::paths::Paths;
use crate::config::{Config, ListenAddress};

const COMMAND: &str = "valetkey init systemd";

/// What gives the service variables of its own.
const EDIT: &str = "systemctl --user edit valetkey";

const SOCKET: &str = include_str!("../../../config/init/systemd/valetkey.socket");
const SERVICE: &str = include_str!("../../../config/init/systemd/valetkey.service");
const FILES_CLOSED: &str = include_str!("../../../config/init/systemd/files-closed");
const FILES_OPEN: &str = include_str!("../../../config/init/systemd/files-open");

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<(), Failure> {
    let config = typed.config()?;
    let exe = std::env::current_exe()?;
    let plan = plan(&Service::of(typed, &config, &exe)?, &Paths::find(&typed.env, None)?)?;
    let is_done = plan.carry_out(*arguments)?;
    service::warn(&config, &exe, Some(EDIT));
    if is_done {
        output::words(
            "then: systemctl --user daemon-reload && systemctl --user enable --now valetkey.socket",
        );
    }
    Ok(())
}

fn plan(service: &Service<'_>, paths: &Paths) -> Result<Plan, Failure> {
    let above = paths.config_file.parent().and_then(Path::parent).unwrap_or_else(|| Path::new("/"));
    let dir = above.join("systemd/user");
    let files = vec![
        Wanted::new(dir.join("valetkey.service"), unit(service)?),
        Wanted::new(dir.join("valetkey.socket"), socket(service.config)?),
    ];
    Ok(Plan { command: COMMAND, files, folders: service.folders() })
}

fn socket(config: &Config) -> Result<String, Failure> {
    let fixed = config.listeners.iter().filter_map(|it| match it.address {
        ListenAddress::Tcp(at) if at.port() != 0 => Some(at),
        _ => None,
    });
    let fixed: Vec<SocketAddr> = fixed.collect();
    let mut lines: Vec<String> = fixed.iter().map(|at| format!("ListenStream={at}")).collect();
    if lines.is_empty() {
        return Err(Failure::new("no listener has an address and a port of its own")
            .hint("in the configuration: listen = \"127.0.0.1:8377\""));
    }
    if fixed.iter().any(|at| may_come_later(at.ip())) {
        lines.extend(FREE_BIND.map(str::to_owned));
    }
    Ok(filled(SOCKET, &[("LISTEN", &lines.join("\n"))]))
}

/// Whether an address is one of a network, such as Docker's bridge, which may come up after the socket.
fn may_come_later(address: IpAddr) -> bool {
    !address.is_loopback() && !address.is_unspecified()
}

/// What has a socket wait for its address.
const FREE_BIND: [&str; 2] = [
    "# An address that is not there yet, such as that of Docker's bridge, may come later.",
    "FreeBind=yes",
];

fn unit(service: &Service<'_>) -> Result<String, Failure> {
    let config_file = match &service.config_file {
        Some(file) => format!(" --config {}", word(text(file)?).replace('$', "$$")),
        None => String::new(),
    };
    let line = |(name, value): &(&str, String)| {
        format!("Environment={}\n", word(&format!("{name}={value}")))
    };
    let environment: String = service.environment.iter().map(line).collect();
    Ok(filled(
        SERVICE,
        &[
            ("FILES", &files(service)?),
            ("EXE", &word(text(service.exe)?)),
            ("CONFIG", &config_file),
            ("ENVIRONMENT", &environment),
        ],
    ))
}

/// What the service may write, or why that is left open.
fn files(service: &Service<'_>) -> Result<String, Failure> {
    if let Some(because) = depends_on_owners(service) {
        return Ok(filled(FILES_OPEN, &[("BECAUSE", because)]));
    }
    let folders = service.folders();
    let written: Vec<String> =
        folders.iter().map(|dir| text(dir).map(word)).collect::<Result<_, _>>()?;
    Ok(filled(FILES_CLOSED, &[("WRITTEN", &written.join(" "))]))
}

/// What of a configuration asks whose a file or a connection is that is not our own.
fn depends_on_owners(service: &Service<'_>) -> Option<&'static str> {
    if service.is_managed {
        return Some("/etc/valetkey/managed.toml is there, and must be root's");
    }
    let lets_others_in = service.config.listeners.iter().any(|it| !it.allow_uids.is_empty());
    lets_others_in.then_some("`allow_uids` lets other users in")
}

/// A word of a unit: quoted where it must be, and without what systemd would replace (systemd.syntax(7)).
fn word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/_.-=:+@,%".contains(c);
    let text = text.replace('%', "%%");
    if text.chars().all(is_plain) {
        return text;
    }
    let escaped = text.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
    format!("\"{escaped}\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::init::place::tests::assert_golden;
    use crate::cli::init::service::tests::{configured, service};
    use crate::config::env::Environment;

    fn at_home() -> Environment {
        Environment::from_pairs([("HOME", "/home/me")])
    }

    #[test]
    fn units_of_the_usual_configuration() {
        let env = at_home();
        let config = configured("", &env);
        let service = service(&config, &env);
        assert_golden("systemd/valetkey.service", &unit(&service).unwrap());
        assert_golden("systemd/valetkey.socket", &socket(&config).unwrap());
        let plan = plan(&service, &Paths::find(&env, None).unwrap()).unwrap();
        let paths: Vec<_> = plan.files.iter().map(|it| it.path.to_str().unwrap()).collect();
        assert_eq!(
            paths,
            ["valetkey.service", "valetkey.socket"]
                .map(|it| format!("/home/me/.config/systemd/user/{it}"))
        );
    }

    #[test]
    fn units_of_an_unusual_one() {
        let env = Environment::from_pairs([
            ("HOME", "/home/me"),
            ("CODEX_HOME", "/srv/it's \"mine\" 100%"),
            ("CODEX_CA_CERTIFICATE", "/etc/corp.pem"),
            ("HTTPS_PROXY", "http://me:secret@proxy.example:3128"),
        ]);
        let listeners = "[[listeners]]\naddress = \"127.0.0.1:9000\"\nallow_uids = [1001]\n\
                         [[listeners]]\naddress = \"[::1]:9000\"\n\
                         [[listeners]]\naddress = \"172.17.0.1:9000\"\nrequire_pass = true\n";
        let config = configured(listeners, &env);
        let config_file = Some("/home/me/a $HOME.toml".into());
        let service = Service { config_file, ..service(&config, &env) };
        let unit = unit(&service).unwrap();
        assert!(!unit.contains("secret"), "{unit}");
        assert_golden("systemd/unusual.service", &unit);
        assert_golden("systemd/unusual.socket", &socket(&config).unwrap());
    }

    #[test]
    fn files_stay_open_where_owners_count() {
        let env = at_home();
        let config = configured("", &env);
        let service = Service { is_managed: true, ..service(&config, &env) };
        let unit = unit(&service).unwrap();
        assert!(unit.contains("managed.toml is there") && !unit.contains("ProtectSystem=strict"));
    }

    #[test]
    fn a_socket_needs_a_fixed_port() {
        let config = configured("listen = \"127.0.0.1:0\"\n", &at_home());
        assert!(socket(&config).unwrap_err().first_hint().unwrap().contains("127.0.0.1:8377"));
    }

    #[test]
    fn words_of_units() {
        let table = [
            ("/usr/bin/a-b_c", "/usr/bin/a-b_c"),
            ("/a b", "\"/a b\""),
            ("100%", "100%%"),
            ("a\"b\\c", "\"a\\\"b\\\\c\""),
            ("it's", "\"it's\""),
            ("a\nb", "\"a\\nb\""),
        ];
        for (text, expected) in table {
            assert_eq!(word(text), expected);
        }
    }
}
