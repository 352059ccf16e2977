//! A step: one command, shown as a person would type it and then carried out.

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::cli::output::{self, Failure};
use crate::cli::programs::Search;

/// A program with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    line: Vec<OsString>,
    as_root: bool,
    fed: Option<Fed>,
}

/// What a program reads from its standard input.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fed {
    text: String,
    /// Where a person has the same.
    file: OsString,
}

impl Step {
    /// A step that its user may do.
    pub(super) fn new<A: Into<OsString>>(line: impl IntoIterator<Item = A>) -> Self {
        Self { line: line.into_iter().map(Into::into).collect(), as_root: false, fed: None }
    }

    /// A step that root alone may do.
    pub(super) fn as_root<A: Into<OsString>>(line: impl IntoIterator<Item = A>) -> Self {
        Self { as_root: true, ..Self::new(line) }
    }

    /// The same with this text, which lies in a file, on its standard input. Root then opens no file of the user's,
    /// in whose place another program could have put a link to one of root's.
    #[must_use]
    pub(super) fn fed(self, text: String, file: &Path) -> Self {
        Self { fed: Some(Fed { text, file: file.into() }), ..self }
    }

    /// As it is typed by somebody who is root already, or is not.
    pub(super) fn shown(&self, is_root: bool) -> String {
        let sudo = (self.as_root && !is_root).then(|| "sudo".to_owned());
        let words = self.line.iter().map(|word| output::shell_word(&word.to_string_lossy()));
        // The shell opens it, before there is a root.
        let fed = self
            .fed
            .iter()
            .map(|fed| format!("< {}", output::shell_word(&fed.file.to_string_lossy())));
        sudo.into_iter().chain(words).chain(fed).collect::<Vec<_>>().join(" ")
    }
}

/// Carries steps out, or only shows them.
#[derive(Debug)]
pub(super) struct Hands {
    dry: bool,
    is_root: bool,
    sudo: Option<Sudo>,
    search: Search,
}

/// Whether sudo makes us root, which is found out when it is first needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sudo {
    /// It may ask at the terminal.
    Asks,
    /// It asks nobody, or there is nobody to ask.
    Silent,
    No,
}

impl Hands {
    pub(super) fn new(dry: bool, search: Search) -> Self {
        Self { dry, is_root: rustix::process::geteuid().is_root(), sudo: None, search }
    }

    /// Whether nothing is done.
    pub(super) fn are_tied(&self) -> bool {
        self.dry
    }

    /// A step as it is typed by whoever we are.
    pub(super) fn typed(&self, step: &Step) -> String {
        step.shown(self.is_root)
    }

    /// Shows and does the steps, in this order.
    ///
    /// # Errors
    ///
    /// [`Failure`] of the first step that fails, with what it said; or when root is needed and cannot be had, and
    /// then nothing is done.
    pub(super) fn carry_out(&mut self, steps: &[Step]) -> Result<(), Failure> {
        let needs_root = !self.is_root && steps.iter().any(|step| step.as_root);
        if needs_root && !self.dry && self.sudo() == Sudo::No {
            steps.iter().for_each(|step| self.show(step));
            let lines: Vec<_> = steps.iter().map(|step| step.shown(false)).collect();
            return Err(Failure::new("only root may do this, and sudo cannot be asked here")
                .hint(format!("type: {}", lines.join(" && ")))
                .hint("then the same command again looks whether all is well"));
        }
        for step in steps {
            self.show(step);
            if !self.dry {
                self.run(step)?;
            }
        }
        Ok(())
    }

    fn show(&self, step: &Step) {
        output::words(format_args!("  $ {}", self.typed(step)));
    }

    fn run(&self, step: &Step) -> Result<(), Failure> {
        let sudo: &[&str] = match self.sudo {
            Some(Sudo::Asks) if step.as_root => &["sudo"],
            // Should it want to ask after all, it fails and does not wait.
            Some(Sudo::Silent) if step.as_root => &["sudo", "-n"],
            _ => &[],
        };
        let mut line = sudo.iter().map(OsStr::new).chain(step.line.iter().map(OsString::as_os_str));
        let Some(program) = line.next() else { return Ok(()) };
        let mut command = Command::new(program);
        // Both ask for passwords at the terminal itself. What they tell is shown when it matters.
        let done = output_of(command.args(line), step.fed.as_ref().map(|fed| &*fed.text));
        let shown = self.typed(step);
        let done = done.map_err(|error| Failure::new(format!("`{shown}`: {error}")))?;
        if done.status.success() {
            return Ok(());
        }
        let said =
            [done.stdout, done.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
        let last = said.iter().rev().find_map(|said| said.trim_end().lines().last());
        let said = last.map(|said| format!(": {}", output::printable(said))).unwrap_or_default();
        Err(Failure::new(format!("`{shown}`: {}{said}", done.status)))
    }

    /// Says before the first time that sudo comes now.
    fn sudo(&mut self) -> Sudo {
        if let Some(known) = self.sudo {
            return known;
        }
        let found = if self.search.find("sudo").is_none() {
            Sudo::No
        } else if io::stdin().is_terminal() {
            output::words("  these lines need root: sudo may ask for your password");
            Sudo::Asks
        } else if sudo_is_silent() {
            output::words("  these lines need root: sudo gives it without asking");
            Sudo::Silent
        } else {
            Sudo::No
        };
        self.sudo = Some(found);
        found
    }
}

fn sudo_is_silent() -> bool {
    let mut sudo = Command::new("sudo");
    sudo.args(["-n", "true"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    sudo.status().is_ok_and(|status| status.success())
}

fn output_of(command: &mut Command, fed: Option<&str>) -> io::Result<Output> {
    let Some(text) = fed else { return command.stdin(stdin()).output() };
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that ends without reading says itself why. A certificate fits into the pipe, so nobody waits here.
        drop(stdin.write_all(text.as_bytes()));
    }
    child.wait_with_output()
}

/// A program that asks without a terminal gets an end of file and not our input.
fn stdin() -> Stdio {
    if io::stdin().is_terminal() { Stdio::inherit() } else { Stdio::null() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_shown_as_it_is_typed() {
        let table: [(&[&str], &str); 4] = [
            (
                &["certutil", "-t", "C,,", "-d", "sql:/home/u/.pki"],
                "certutil -t C,, -d sql:/home/u/.pki",
            ),
            (&["rm", "-f", "/a b/c"], "rm -f '/a b/c'"),
            (&["echo", ""], "echo ''"),
            (&["echo", "it's;"], r"echo 'it'\''s;'"),
        ];
        for (line, shown) in table {
            assert_eq!(Step::new(line.iter().copied()).shown(false), shown);
            let as_root = Step::as_root(line.iter().copied());
            assert_eq!(as_root.shown(false), format!("sudo {shown}"));
            assert_eq!(as_root.shown(true), shown);
        }
        let fed = Step::as_root(["tee", "/x"]).fed("text".to_owned(), Path::new("/a b"));
        assert_eq!(fed.shown(false), "sudo tee /x < '/a b'");
    }

    #[test]
    fn what_fails_says_what_it_said() {
        let mut hands = Hands { dry: false, is_root: true, sudo: None, search: Search::new(None) };
        let step = |script: &str| Step::new(["sh", "-c", script]);
        assert!(hands.carry_out(&[step("exit 0")]).is_ok());
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("mark");
        let touch = Step::new(["touch".into(), mark.clone().into_os_string()]);
        let failure = hands.carry_out(&[step("echo one; echo why >&2; exit 3"), touch.clone()]);
        let failure = failure.unwrap_err();
        assert!(failure.message().ends_with("exit status: 3: why"), "{failure:?}");
        assert!(!mark.exists(), "nothing is done after a failure");
        hands.dry = true;
        assert!(hands.carry_out(std::slice::from_ref(&touch)).is_ok() && !mark.exists());
        // Without root and without sudo nothing is done at all.
        let mut hands = Hands { dry: false, is_root: false, sudo: Some(Sudo::No), ..hands };
        let failure = hands.carry_out(&[touch.clone(), Step::as_root(["true"])]).unwrap_err();
        assert!(failure.first_hint().is_some() && !mark.exists());
        assert!(hands.carry_out(&[touch]).is_ok() && mark.exists());
    }
}
