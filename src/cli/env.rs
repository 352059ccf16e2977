//! `valetkey env`: the variables that put a shell behind the running proxy.

mod docker;

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::ValueEnum;
use serde_json::{Map, Value};

use super::output::{self, Failure};
use super::start::ca_dir;
use super::way_out::WayOut;
use super::{Typed, process, running};
use crate::client_env::{ClientEnv, Folder, ProxyUrl};
use crate::config::env::UPSTREAM_PROXY;
use crate::config::{self, Config};
use crate::tls::ca::LocalCa;

/// What `env` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The form to print them in [default: that of $SHELL]
    #[arg(long, value_enum)]
    shell: Option<Shell>,

    /// Where the tools find the proxy, when it is not where the running one says
    #[arg(long, value_name = "URL", value_parser = typed_url)]
    proxy_url: Option<ProxyUrl>,

    /// Print instead what takes the variables out of this shell again
    #[arg(long, conflicts_with = "proxy_url")]
    unset: bool,
}

fn typed_url(text: &str) -> Result<ProxyUrl, &'static str> {
    ProxyUrl::parse(text).ok_or("the form is http://HOST:PORT, or http://x:PASS@HOST:PORT")
}

/// The forms that the variables are printed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Shell {
    /// sh, bash, zsh: for `eval`
    #[value(aliases = ["sh", "zsh", "dash", "ksh"])]
    Bash,
    /// fish: for `| source`
    Fish,
    /// PowerShell: for `| Invoke-Expression`
    #[value(alias = "pwsh")]
    Powershell,
    /// A .env file
    Dotenv,
    /// One JSON object
    Json,
    /// Lines for the file that $GITHUB_ENV names
    Github,
    /// Arguments of `docker run`
    Docker,
    /// Arguments of `docker build`
    DockerBuild,
}

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    let shell = arguments.shell.unwrap_or_else(|| usual_shell(typed.env.text("SHELL")));
    if arguments.unset {
        output::raw(&unset(shell, typed)?);
        return Ok(ExitCode::SUCCESS);
    }
    let config = typed.config()?;
    let proxy = match &arguments.proxy_url {
        Some(proxy) => proxy.clone(),
        None => running_proxy(typed, &config)?,
    };
    let printed = match shell {
        Shell::Docker => docker::print_run(typed, &config, proxy)?,
        Shell::DockerBuild => docker::print_build(typed, &config, proxy)?,
        shell => {
            let dir = config.paths.runtime_dir.join("env");
            process::private_dir(&dir)?;
            let client_env = client_env(typed, &config, proxy, Folder::Here(&dir))?;
            shell.can_hold(texts(&client_env))?;
            shell.print(texts(&client_env))
        }
    };
    output::raw(&printed);
    Ok(ExitCode::SUCCESS)
}

/// What takes the variables back. It needs no proxy and no configuration: either may be gone.
fn unset(shell: Shell, typed: &Typed) -> Result<String, Failure> {
    if !ClientEnv::is_set_in(&typed.env) {
        output::words("this shell is not behind valetkey: there is nothing to take back");
        return Ok(String::new());
    }
    if matches!(shell, Shell::Docker | Shell::DockerBuild) {
        return Err(Failure::new("what a container was started with ends with it")
            .status(output::WRONG_USE)
            .hint("for a shell: valetkey env --unset"));
    }
    let back = ClientEnv::taken_back(&typed.env);
    let comes_back = |name: &&str| back.get(*name).is_some_and(Option::is_some);
    let chain = typed.env.text(UPSTREAM_PROXY);
    if let Some(Ok(chain)) = chain.as_deref().map(config::ProxyUrl::parse)
        && !["HTTPS_PROXY", "https_proxy", UPSTREAM_PROXY].iter().any(comes_back)
    {
        output::words(format_args!(
            "the company's proxy is taken out too; put it back: HTTPS_PROXY={chain}"
        ));
    }
    shell.can_hold(back.iter().filter_map(|(name, it)| Some((name.as_str(), it.clone()?))))?;
    Ok(shell.print_unset(back))
}

fn running_proxy(typed: &Typed, config: &Config) -> Result<ProxyUrl, Failure> {
    let Some(info) = running::find_soon(&config.paths.runtime_dir, &typed.env) else {
        return Err(Failure::new("no proxy is running")
            .hint("start one: valetkey serve")
            .hint("or run one program behind a proxy of its own: valetkey run -- PROGRAM"));
    };
    let address = info.address().filter(|_| info.proxy.starts_with("http://"));
    let address = address.ok_or_else(|| {
        Failure::new(format!("programs cannot be put behind {} by variables", info.proxy))
            .hint("give the proxy a listener for this machine too: [[listeners]] address = \"127.0.0.1:8377\"")
    })?;
    if info.needs_pass {
        output::warning("this proxy takes nobody without a pass, and these variables have none");
        output::hint(format_args!(
            "valetkey env --proxy-url http://NAME:PASS@{address}, with the pass of: valetkey pass new NAME"
        ));
    }
    Ok(address.into())
}

fn client_env(
    typed: &Typed,
    config: &Config,
    proxy: ProxyUrl,
    folder: Folder<'_>,
) -> Result<ClientEnv, Failure> {
    let roots = LocalCa::load_roots(&ca_dir(&config.paths)).map_err(output::hinted)?;
    let way_out = WayOut::new(config, &roots, &typed.env)?;
    way_out.client_env(&roots, proxy, &typed.env, folder)
}

fn texts(client_env: &ClientEnv) -> impl Iterator<Item = (&str, String)> {
    client_env.iter().map(|(name, value)| (name, value.to_string_lossy().into_owned()))
}

fn usual_shell(path: Option<String>) -> Shell {
    let name = path.as_deref().and_then(|path| path.rsplit('/').next());
    name.and_then(|name| Shell::from_str(name, true).ok()).unwrap_or(Shell::Bash)
}

impl Shell {
    fn print<'a>(self, pairs: impl Iterator<Item = (&'a str, String)>) -> String {
        if self == Self::Json {
            let object: Map<String, Value> =
                pairs.map(|(name, value)| (name.to_owned(), value.into())).collect();
            return format!("{:#}\n", Value::Object(object));
        }
        pairs.map(|(name, value)| self.line(name, &value)).collect()
    }

    /// Refuses a value that would be read as more variables: in a form without quotes a line's end is the value's.
    fn can_hold<'a>(
        self,
        mut pairs: impl Iterator<Item = (&'a str, String)>,
    ) -> Result<(), Failure> {
        let has_no_quotes = matches!(self, Self::Dotenv | Self::Github);
        match pairs.find(|(_, value)| has_no_quotes && value.contains(['\n', '\r'])) {
            Some((name, _)) => Err(Failure::new(format!("`{name}` would have more than one line"))
                .hint(
                    "take the line's end out of what the environment has for it, or: --shell json",
                )),
            None => Ok(()),
        }
    }

    fn print_unset(self, back: BTreeMap<String, Option<String>>) -> String {
        if self == Self::Json {
            let object: Map<String, Value> =
                back.into_iter().map(|(name, value)| (name, value.into())).collect();
            return format!("{:#}\n", Value::Object(object));
        }
        let line = |(name, value): (String, Option<String>)| match value {
            Some(value) => self.line(&name, &value),
            None => self.unset_line(&name),
        };
        back.into_iter().map(line).collect()
    }

    fn unset_line(self, name: &str) -> String {
        match self {
            Self::Bash => format!("unset {name}\n"),
            Self::Fish => format!("set -e {name}\n"),
            Self::Powershell => format!("Remove-Item Env:{name}\n"),
            // There is no way to say that a variable is not set: set to nothing it counts as that.
            _ => self.line(name, ""),
        }
    }

    fn line(self, name: &str, value: &str) -> String {
        match self {
            Self::Bash => format!("export {name}={}\n", output::shell_word(value)),
            Self::Fish => {
                format!("set -gx {name} '{}'\n", value.replace('\\', r"\\").replace('\'', r"\'"))
            }
            Self::Powershell => format!("$env:{name} = '{}'\n", value.replace('\'', "''")),
            // The form that both docker and the usual libraries read: no quotes, no escapes.
            Self::Dotenv | Self::Github => format!("{name}={value}\n"),
            Self::Json | Self::Docker | Self::DockerBuild => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_for_each_shell() {
        let odd = r"a b'c\d$e";
        let table = [
            (Shell::Bash, r"export N='a b'\''c\d$e'"),
            (Shell::Fish, r"set -gx N 'a b\'c\\d$e'"),
            (Shell::Powershell, r"$env:N = 'a b''c\d$e'"),
            (Shell::Dotenv, r"N=a b'c\d$e"),
            (Shell::Github, r"N=a b'c\d$e"),
        ];
        for (shell, expected) in table {
            assert_eq!(shell.print([("N", odd.to_owned())].into_iter()).trim_end(), expected);
        }
    }

    #[test]
    fn a_line_end_makes_no_other_variable() {
        let pairs = || [("N", "a\nLD_PRELOAD=b".to_owned())].into_iter();
        for shell in [Shell::Dotenv, Shell::Github] {
            assert!(shell.can_hold(pairs()).is_err());
        }
        assert!(Shell::Bash.can_hold(pairs()).is_ok());
    }

    #[test]
    fn variables_are_taken_back_in_each_shell() {
        let back = || [("A".to_owned(), None), ("B".to_owned(), Some("b c".to_owned()))].into();
        let table = [
            (Shell::Bash, "unset A\nexport B='b c'\n"),
            (Shell::Fish, "set -e A\nset -gx B 'b c'\n"),
            (Shell::Powershell, "Remove-Item Env:A\n$env:B = 'b c'\n"),
            (Shell::Dotenv, "A=\nB=b c\n"),
            (Shell::Github, "A=\nB=b c\n"),
            (Shell::Json, "{\n  \"A\": null,\n  \"B\": \"b c\"\n}\n"),
        ];
        for (shell, expected) in table {
            assert_eq!(shell.print_unset(back()), expected);
        }
    }

    #[test]
    fn the_usual_shell() {
        let table = [
            (Some("/usr/bin/fish"), Shell::Fish),
            (Some("/bin/zsh"), Shell::Bash),
            (Some("/bin/weird"), Shell::Bash),
            (None, Shell::Bash),
        ];
        for (path, shell) in table {
            assert_eq!(usual_shell(path.map(str::to_owned)), shell);
        }
    }
}
