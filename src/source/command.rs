//! Has a program tell a value.

use std::fs::File;
use std::io::{self, Read as _};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::process::Command;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::SourceError;
use crate::group::Group;
use crate::secret::{Secret, UnfitSecret};

/// Runs a line in the shell, with these variables set or taken out of our own, and takes what it has printed by its
/// end, without one newline at the end. What it says on standard error goes to ours. What it leaves running is killed.
///
/// # Errors
///
/// [`SourceError`] for one that fails, takes too long, prints too much or no text. None quotes what it printed.
pub async fn tell(line: &str, variables: &[Variable]) -> Result<Secret, SourceError> {
    let place = || "the output of the command".to_owned();
    let unreadable = |reason| SourceError::Unreadable { place: place(), reason };
    let mut command = Command::new("/bin/sh");
    command.args(["-c", line]);
    for (name, value) in variables {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    // What it says itself is for whoever started us.
    command.stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = timeout(LIMIT, output(command)).await;
    let (status, told) = output.map_err(|_late| unreadable(late()))?.map_err(unreadable)?;
    if !status.success() {
        return Err(unreadable(io::Error::other(format!("{status}"))));
    }
    let unfit = |reason| SourceError::Unfit { place: place(), reason };
    let text = std::str::from_utf8(&told)
        .map_err(|error| unfit(UnfitSecret::Octet { at: error.valid_up_to() }))?;
    let text = text.strip_suffix('\n').map_or(text, |line| line.strip_suffix('\r').unwrap_or(line));
    super::check_text(text).map_err(unfit)?;
    Ok(Secret::new(text))
}

/// A variable, and what it is set to; `None` takes it out.
pub type Variable = (String, Option<String>);

/// What the program has printed by its own end. The end of the pipe is not waited for: what it leaves running may
/// hold that open.
async fn output(mut command: Command) -> io::Result<(ExitStatus, Zeroizing<Vec<u8>>)> {
    let (reader, writer) = io::pipe()?;
    // The command holds the writer too, so that a read that gives nothing is never its end.
    let (mut child, _group) = Group::start(command.stdout(writer))?;
    let mut pipe = pipe::Receiver::from_owned_fd(reader.into())?.take(MAX_BYTES as u64 + 1);
    // Never grows, so that no copy is left behind.
    let mut told = Zeroizing::new(Vec::with_capacity(MAX_BYTES + 64));
    let status = loop {
        tokio::select! {
            status = child.wait() => break status?,
            read = pipe.read_buf(&mut *told) => drop(read?),
        }
        if told.len() > MAX_BYTES {
            return Err(too_much());
        }
    };
    let left = pipe.limit();
    let rest =
        File::from(pipe.into_inner().into_nonblocking_fd()?).take(left).read_to_end(&mut told);
    match rest {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ if told.len() > MAX_BYTES => Err(too_much()),
        _ => Ok((status, told)),
    }
}

fn late() -> io::Error {
    io::Error::other(format!("it took more than {} s", LIMIT.as_secs()))
}

fn too_much() -> io::Error {
    io::Error::other(format!("it printed more than {} KiB", MAX_BYTES / 1024))
}

/// Longest time for the program. A request waits for it, and a program that asks a server has time enough.
const LIMIT: Duration = Duration::from_secs(10);

/// More than this is something else than a login, and must not fill the memory; as much as a file may hold.
const MAX_BYTES: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn what_commands_tell() {
        let table = [
            ("printf 'user:pass word'", Ok("user:pass word")),
            ("echo user:password", Ok("user:password")),
            ("echo \"$WHO:x\"", Ok("me:x")),
            ("echo \"${HOME-none}:x\"", Ok("none:x")),
            ("printf 'a\\nb\\n'", Err("cannot be used")),
            ("printf 'a\\377'", Err("cannot be used")),
            ("true", Err("cannot be used")),
            ("echo secret; exit 3", Err("cannot be read")),
            ("no-such-program-here 2>/dev/null", Err("cannot be read")),
            // Whoever is left behind with the pipe is not waited for, not even one that has left the group.
            ("sleep 61 & echo user:pw", Ok("user:pw")),
            (
                "exec 3>&1; (setsid sh -c 'echo up; exec sleep 11 >&3 2>&3' &) | read up; echo user:pw",
                Ok("user:pw"),
            ),
        ];
        for (line, expected) in table {
            let variables = [("WHO", Some("me")), ("HOME", None)];
            let variables =
                variables.map(|(name, value)| (name.to_owned(), value.map(str::to_owned)));
            let told = tell(line, &variables).await;
            match (told, expected) {
                (Ok(told), Ok(expected)) => assert_eq!(told.expose(), expected, "{line}"),
                (Err(error), Err(expected)) => {
                    assert!(error.to_string().contains(expected), "{line}: {error}");
                    assert!(!format!("{error:?}").contains("secret"), "{line}");
                }
                (told, expected) => panic!("{line}: {told:?}, not {expected:?}"),
            }
        }
    }

    #[tokio::test]
    async fn no_more_than_64_kib_is_taken() {
        let line = |length| format!("head -c {length} /dev/zero | tr '\\0' x");
        assert_eq!(tell(&line(MAX_BYTES), &[]).await.unwrap().expose().len(), MAX_BYTES);
        // What does not fit into the pipe, and what does.
        for length in [10 * MAX_BYTES, MAX_BYTES + 1] {
            let error = tell(&line(length), &[]).await.unwrap_err();
            let reason = std::error::Error::source(&error).unwrap().to_string();
            assert_eq!(reason, "it printed more than 64 KiB");
        }
    }

    /// However it ends, what it has started ends with it.
    #[expect(clippy::disallowed_methods, reason = "who opens a pipe may wait for ever")]
    #[tokio::test]
    async fn nothing_that_it_starts_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let table =
            [("true", "ended"), ("exit 3", "failed"), ("wait", "late"), ("wait", "dropped")];
        for (end, how) in table {
            let pipe = folder.path().join(how);
            assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
            let line =
                format!("exec 3>'{}'; sleep 61 & echo >&3; echo user:pw; {end}", pipe.display());
            let ((begin, begun), (leave, left)) = (oneshot::channel(), oneshot::channel());
            std::thread::spawn(move || {
                let mut pipe = File::open(pipe).unwrap();
                pipe.read_exact(&mut [0]).unwrap();
                begin.send(()).unwrap();
                // Its end comes when nobody holds it any more.
                leave.send(pipe.read(&mut [0]).unwrap()).unwrap();
            });
            {
                let mut telling = pin!(tell(&line, &[]));
                if end == "wait" {
                    tokio::select! {
                        told = &mut telling => panic!("{how}: {told:?}"),
                        begun = begun => begun.unwrap(),
                    }
                    tokio::time::pause();
                    if how == "late" {
                        assert!(telling.await.is_err());
                    }
                    tokio::time::resume();
                } else {
                    assert_eq!(telling.await.is_ok(), how == "ended");
                }
            }
            assert_eq!(timeout(LIMIT, left).await.expect(how).unwrap(), 0);
        }
    }
}
