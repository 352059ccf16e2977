//! `valetkey audit`: looks whether an audit is as it was written; and where one is written, for whoever writes it.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;

use super::Typed;
use super::output::{self, Failure, WRONG_USE, counted};
use crate::audit::file::{AuditError, AuditFile};
use crate::audit::verify::{self, Report, Sound};
use crate::audit::{Audit, Trail};
use crate::clock::Clock;
use crate::config::{AuditConfig, Config};
use crate::secret::Fingerprint;
use crate::telemetry;

/// What `audit` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Look whether every line follows on the one before it; exits 1 where one does not
    Verify(Verify),
}

#[derive(Debug, clap::Args)]
struct Verify {
    /// The files, the oldest first [default: those of the configuration]
    files: Vec<PathBuf>,

    /// What `head` was before, as this printed it: fails where no line has it any more
    #[arg(long, value_name = "HASH")]
    head: Option<String>,
}

pub(super) fn run(arguments: &Arguments, typed: &Typed) -> Result<ExitCode, Failure> {
    let Command::Verify(arguments) = &arguments.command;
    let kept = arguments.head.as_deref().map(str::to_lowercase);
    if kept.as_deref().is_some_and(|hash| Fingerprint::from_hex(hash).is_none()) {
        return Err(Failure::new("a head is 64 hexadecimal digits")
            .status(WRONG_USE)
            .hint("as it was printed by: valetkey audit verify"));
    }
    let report = verify::verify(files(arguments, typed)?, kept.as_deref())
        .map_err(|(path, error)| Failure::at(&path, error).hint(NAME_FILES))?;
    show(&report);
    judge(report, arguments.files.is_empty())?;
    output::words("every line follows on the one before it");
    if kept.is_some() {
        output::words("the head that you have kept is there: nothing up to its line was changed");
    }
    output::words("what was cut off behind the last line, or changed in it, no chain can show:");
    output::words("  keep the head elsewhere, and later: valetkey audit verify --head HASH");
    Ok(ExitCode::SUCCESS)
}

fn files(arguments: &Verify, typed: &Typed) -> Result<Vec<(PathBuf, File)>, Failure> {
    if !arguments.files.is_empty() {
        let open = |path: &PathBuf| match File::open(path) {
            Ok(file) => Ok((path.clone(), file)),
            Err(error) => Err(Failure::at(path, error).hint(NAME_FILES)),
        };
        return arguments.files.iter().map(open).collect();
    }
    let config = typed.config().map_err(|failure| {
        failure.hint("or name the files, the oldest first: valetkey audit verify FILE…")
    })?;
    let AuditConfig::File { path, .. } = &config.audit else {
        return Err(Failure::new("no audit is written into a file")
            .hint("name the files, the oldest first; or switch it on: [audit] to = \"file\""));
    };
    verify::files_of(path).map_err(|error| {
        let failure = Failure::at(path, &error);
        match error.kind() {
            io::ErrorKind::NotFound => failure
                .hint("it begins when a proxy starts, or a command has something to write down")
                .hint("if it was moved: name the files, the oldest first"),
            _ => failure,
        }
    })
}

/// What to do about a file that cannot be read.
const NAME_FILES: &str = "name files of an audit that you may read, the oldest first";

fn show(report: &Report) {
    for Sound { path, lines, torn } in &report.sound {
        let is_broken = report.broken.as_ref().is_some_and(|broken| broken.path == *path);
        let word = match (is_broken, lines) {
            (true, _) => "broken",
            (false, Some(_)) => "sound ",
            (false, None) => "empty ",
        };
        let lines = match lines {
            Some((first, last)) => format!("lines {first} to {last}"),
            None => "no line".to_owned(),
        };
        output::data(format_args!("{word}  {}  {lines}", path.display()));
        if *torn > 0 {
            let times = counted(*torn, "time");
            output::words(format_args!(
                "a process has ended {times} in it while it wrote a line, which is torn; or the end was cut off"
            ));
        }
    }
    if let Some((seq, _)) = &report.follows {
        output::words(format_args!(
            "nothing up to line {seq} is here: it is not kept any more, was taken out, or its file was not named"
        ));
    }
    if report.lost > 0 {
        let lines = counted(report.lost, "line");
        output::words(format_args!("{lines} could not be written then, as the audit itself says"));
    }
    if let (Some((seq, hash)), None) = (&report.head, &report.broken) {
        output::data(format_args!("head    line {seq}  {hash}"));
    }
}

/// `is_all` says that these are the files as they are written, and no parts of one.
fn judge(report: Report, is_all: bool) -> Result<(), Failure> {
    if let Some(broken) = report.broken {
        let at = format!("{}, line {}", broken.path.display(), broken.line);
        let failure = Failure::new(format!("{at}: {}", broken.why));
        let is_first = broken.line == 1 && report.sound.len() == 1;
        return Err(match is_first {
            true => failure.hint("nothing in it was found sound; is it an audit at all?"),
            false => failure.hint(
                "but for the last one, the lines before it are as they were written; what comes after it was not looked at",
            ),
        });
    }
    if report.head.is_none() {
        return Err(Failure::new("there is no line")
            .hint("every audit has one from its beginning: this was emptied, or is none"));
    }
    if is_all && report.follows.is_some() && !report.begins_a_file {
        return Err(Failure::new(
            "the first line is none that a file begins with: lines before it were taken out",
        )
        .hint("what comes after it is as it was written"));
    }
    if report.has_kept_head == Some(false) {
        return Err(Failure::new(
            "no line has this head: what was the last line is gone, or was changed",
        )
        .hint("or its file is not kept any more: [audit] keep = …"));
    }
    Ok(())
}

/// The audit of this configuration.
///
/// # Errors
///
/// [`Failure`] for a file that cannot be written now.
pub(super) fn open(config: &Config) -> Result<Audit, Failure> {
    let audit = Audit::off();
    change(&audit, config)?;
    Ok(audit)
}

/// Looks whether it could be opened, and makes nothing.
///
/// # Errors
///
/// As [`open`].
pub(super) fn look_ahead(config: &Config) -> Result<(), Failure> {
    match &config.audit {
        AuditConfig::Off | AuditConfig::Stderr => Ok(()),
        AuditConfig::File { path, .. } => AuditFile::look_ahead(path).map_err(unwritable),
    }
}

/// Has it written as this configuration says.
///
/// # Errors
///
/// As [`open`]; then nothing has changed.
pub(super) fn change(audit: &Audit, config: &Config) -> Result<(), Failure> {
    let trail = match &config.audit {
        AuditConfig::Off => None,
        AuditConfig::Stderr => Some(Trail::Lines(Box::new(telemetry::Lines))),
        AuditConfig::File { path, most, keep } => {
            let file = AuditFile::open(path, *most, *keep).map_err(unwritable)?;
            Some(Trail::File(file))
        }
    };
    Ok(audit.change(trail, Clock::system())?)
}

fn unwritable(error: AuditError) -> Failure {
    let hint = error.hint();
    Failure::new(format!("the audit cannot be written: {error}")).hint(hint)
}

/// The audit of a command, which does what it is for whether it can be written down or not.
pub(super) fn of_a_command(config: &Config) -> Audit {
    open(config).unwrap_or_else(|failure| {
        output::warning(failure.message());
        Audit::off()
    })
}

/// Writes down what a command has done.
pub(super) fn written(config: &Config, note: impl FnOnce(&Audit)) {
    let audit = of_a_command(config);
    note(&audit);
    if !audit.flush() {
        output::warning("the audit cannot be written: it takes too long");
    }
}
