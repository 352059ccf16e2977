//! What is typed behind `--`, and how much of everything that means.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// How much is measured, and of what.
#[derive(Debug)]
pub(crate) struct Form {
    /// The program that is measured.
    pub(crate) binary: PathBuf,
    /// How often each work is done on each way.
    pub(crate) rounds: usize,
    /// How long each time.
    pub(crate) time: Duration,
    /// How long one body is.
    pub(crate) bulk: usize,
    /// New hosts in each round.
    pub(crate) unseen: usize,
    /// Connections that idle.
    pub(crate) idle: usize,
    /// Starts.
    pub(crate) starts: usize,
    /// To how many rules and leaves, and open tunnels, the proxy grows.
    pub(crate) grown: usize,
    pub(crate) open: usize,
    /// Whether haproxy does the same beside it.
    pub(crate) has_haproxy: bool,
    /// Whether the figures may be held against the saved ones.
    pub(crate) compares: bool,
    pub(crate) saves: bool,
    only: Vec<String>,
}

impl Form {
    /// The usual one, of the program that is built along.
    fn full() -> Self {
        Self {
            binary: env!("CARGO_BIN_EXE_valetkey").into(),
            rounds: 5,
            time: Duration::from_secs(1),
            bulk: 32 << 20,
            unseen: 60,
            idle: 1000,
            starts: 5,
            grown: 10_000,
            open: 5000,
            has_haproxy: false,
            compares: true,
            saves: false,
            only: Vec::new(),
        }
    }

    /// For a look.
    fn quick() -> Self {
        Self {
            rounds: 3,
            time: Duration::from_millis(300),
            unseen: 20,
            idle: 300,
            starts: 3,
            grown: 2000,
            open: 500,
            ..Self::full()
        }
    }

    /// Shows that everything can be measured, in any build; its figures mean nothing.
    fn smoke() -> Self {
        Self {
            rounds: 1,
            time: Duration::from_millis(40),
            bulk: 1 << 20,
            unseen: 3,
            idle: 20,
            starts: 1,
            grown: 50,
            open: 20,
            compares: false,
            ..Self::full()
        }
    }

    /// Reads the arguments.
    ///
    /// # Errors
    ///
    /// What is wrong with them, and what to type.
    pub(crate) fn read(arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let arguments: Vec<String> = arguments.filter(|it| it != "--bench").collect();
        let has = |flag: &str| arguments.iter().any(|it| it == flag);
        let mut form = match (has("--smoke"), has("--quick")) {
            (true, _) => Self::smoke(),
            (false, true) => Self::quick(),
            (false, false) => Self::full(),
        };
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match (argument.as_str(), rest.as_slice().first().map(String::as_str)) {
                ("--quick" | "--smoke", _) => continue,
                ("--save", _) => {
                    form.saves = true;
                    continue;
                }
                ("--binary", Some(file)) => form.binary = program(file)?,
                ("--only", Some(name)) => form.only.push(name.to_owned()),
                ("--against", Some("haproxy")) => (form.has_haproxy, form.compares) = (true, false),
                ("--rounds", Some(count)) => {
                    let wrong = |_| format!("error: --rounds {count}: not a number\n{USAGE}");
                    form.rounds = count.parse::<usize>().map_err(wrong)?.clamp(1, MOST_ROUNDS);
                }
                ("--binary" | "--only" | "--rounds", None) => {
                    return Err(format!("error: nothing stands behind {argument}\n{USAGE}"));
                }
                _ => return Err(format!("error: {argument} makes no sense here\n{USAGE}")),
            }
            rest.next();
        }
        let is_less = ["--quick", "--smoke", "--only", "--rounds"].into_iter().any(has);
        if form.saves && (is_less || form.has_haproxy) {
            return Err(format!("error: only the figures of the long form are saved\n{USAGE}"));
        }
        Ok(form)
    }

    /// The first of `--only` with which none of these names begins.
    pub(crate) fn unknown(&self, names: &[&str]) -> Option<&str> {
        let is_unknown = |only: &&String| !names.iter().any(|name| name.starts_with(only.as_str()));
        self.only.iter().find(is_unknown).map(String::as_str)
    }

    /// Whether what is called so is to be measured.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| name.starts_with(only.as_str()))
    }
}

/// The program to measure, seen from the folder of the project.
fn program(file: &str) -> Result<PathBuf, String> {
    let found = fs::canonicalize(file).map_err(|error| error.to_string());
    let found =
        found.and_then(|path| path.is_file().then_some(path).ok_or_else(|| "not a file".into()));
    found.map_err(|error| {
        format!(
            "error: --binary {file}: {error}\nhint: benches/pgo/run makes target/pgo/valetkey; \
             without --binary the one that is built along is measured"
        )
    })
}

const USAGE: &str = "hint: cargo bench --bench end_to_end -- \
    [--quick | --smoke] [--binary FILE] [--rounds N] [--only NAME]... [--against haproxy | --save]";

/// An hour of each work.
const MOST_ROUNDS: usize = 1000;
