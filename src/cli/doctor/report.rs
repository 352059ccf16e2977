//! What the doctor found: checks with an outcome, and one line of what to do about each that is not well.

use serde_json::{Value, json};

use crate::cli::output::{self, Failure};

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Outcome {
    Ok,
    Warning,
    Failed,
}

impl Outcome {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
        }
    }

    fn colour(self) -> &'static str {
        match self {
            Self::Ok => "\u{1b}[32m",
            Self::Warning => "\u{1b}[1;33m",
            Self::Failed => "\u{1b}[1;31m",
        }
    }
}

/// One check.
#[derive(Clone, Debug)]
pub(super) struct Check {
    /// Stable, for programs.
    id: &'static str,
    /// Which one of several: a host, a credential, a program.
    subject: Option<String>,
    outcome: Outcome,
    sentence: String,
    fix: Option<String>,
}

impl Check {
    pub(super) fn ok(id: &'static str, sentence: impl Into<String>) -> Self {
        let sentence = sentence.into();
        Self { id, subject: None, outcome: Outcome::Ok, sentence, fix: None }
    }

    /// What works and may not stay so, or works less well than it could.
    pub(super) fn warning(
        id: &'static str,
        sentence: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self { outcome: Outcome::Warning, fix: Some(fix.into()), ..Self::ok(id, sentence) }
    }

    /// What does not work.
    pub(super) fn failed(
        id: &'static str,
        sentence: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self { outcome: Outcome::Failed, fix: Some(fix.into()), ..Self::ok(id, sentence) }
    }

    /// A failure of something that every command would need.
    pub(super) fn of_failure(id: &'static str, failure: &Failure) -> Self {
        Self::failed(id, failure.message(), failure.first_hint().unwrap_or("see: valetkey check"))
    }

    /// The same about one of several.
    pub(super) fn about(mut self, subject: impl ToString) -> Self {
        self.subject = Some(subject.to_string());
        self
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "id": self.id,
            "subject": self.subject,
            "status": self.outcome.as_str(),
            "message": self.sentence,
            "fix": self.fix,
        })
    }

    /// As people read it. A sentence of several lines (mistakes of a managed file) stands below its line.
    fn to_text(&self, columns: Option<usize>) -> String {
        let subject = self.subject.as_deref().map(|it| format!(" {it}")).unwrap_or_default();
        let wrapped = |text: String| match columns {
            Some(columns) => output::wrapped(&text, columns.saturating_sub(INDENT))
                .replace('\n', &format!("\n{}", " ".repeat(INDENT))),
            None => text,
        };
        let name = format!("{}{subject}", self.id);
        let sentence = match self.sentence.trim_end() {
            long if long.contains('\n') => format!("{name}:\n{long}"),
            short => wrapped(format!("{name}: {}", output::printable(short))),
        };
        let fix =
            self.fix.as_deref().map(|fix| wrapped(format!("Fix: {}", output::printable(fix))));
        let fix = fix.map(|fix| format!("\n{}{fix}", " ".repeat(INDENT))).unwrap_or_default();
        format!("{}{:<8}\u{1b}[0m {sentence}{fix}", self.outcome.colour(), self.outcome.as_str())
    }
}

/// Columns of the outcome and the space behind it.
const INDENT: usize = 9;

/// All checks so far.
pub(super) struct Report {
    checks: Vec<Check>,
    /// Whether each is shown as it comes.
    speaks: bool,
    /// What was not looked at, because what it depends on has failed.
    left_out: Option<&'static str>,
}

impl Report {
    pub(super) fn new(speaks: bool) -> Self {
        Self { checks: Vec::new(), speaks, left_out: None }
    }

    pub(super) fn add(&mut self, check: Check) {
        if self.speaks {
            output::data(check.to_text(output::columns()));
        }
        self.checks.push(check);
    }

    /// Whether a check with this id has failed.
    pub(super) fn has_failed(&self, id: &str) -> bool {
        self.checks.iter().any(|check| check.id == id && check.outcome == Outcome::Failed)
    }

    /// Says what was not looked at.
    pub(super) fn leaves_out(&mut self, what: &'static str) {
        self.left_out = Some(what);
    }

    fn count(&self, outcome: Outcome) -> usize {
        self.checks.iter().filter(|check| check.outcome == outcome).count()
    }

    fn worst(&self) -> Outcome {
        self.checks.iter().map(|check| check.outcome).max().unwrap_or(Outcome::Ok)
    }

    /// 0 for nothing but ok, 1 with warnings, 2 with a failure.
    pub(super) fn exit_status(&self) -> u8 {
        match self.worst() {
            Outcome::Ok => 0,
            Outcome::Warning => 1,
            Outcome::Failed => 2,
        }
    }

    pub(super) fn summary(&self) -> String {
        let [ok, warnings, failed] =
            [Outcome::Ok, Outcome::Warning, Outcome::Failed].map(|outcome| self.count(outcome));
        let left_out = self.left_out.map(|what| format!("; not looked at: {what}"));
        let left_out = left_out.unwrap_or_default();
        format!("\n{ok} ok, {warnings} with a warning, {failed} failed{left_out}")
    }

    pub(super) fn to_json(&self) -> Value {
        let checks: Vec<Value> = self.checks.iter().map(Check::to_json).collect();
        let status = self.worst().as_str();
        json!({ "version": 1, "status": status, "checks": checks, "left_out": self.left_out })
    }
}
