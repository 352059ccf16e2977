//! Reads files of certificates, in whose place anybody may have put something else.

use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::path::Path;

/// All of a regular file. What it is, is asked of the open file: the name may lead to a pipe by now.
///
/// # Errors
///
/// That of the system; and for what is no regular file, or larger than 16 MiB.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        // Opening a pipe would wait for a writer.
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags);
    }
    let file = options.open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut content = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut content)?;
    if content.len() as u64 > LARGEST {
        return Err(io::Error::other("larger than 16 MiB, and no bundle of certificates is"));
    }
    Ok(content)
}

/// Largest file that is read, in bytes: all of Mozilla's roots have about 230 KB, and what was put in the place of a
/// bundle by mistake must not fill the memory.
const LARGEST: u64 = 16 << 20;

#[cfg(all(test, unix))]
mod tests {
    use std::fs::File;

    use super::*;

    /// What comes under the name after it was looked at neither holds up the reader nor fills the memory.
    #[expect(clippy::disallowed_methods, reason = "who opens a pipe may wait for ever")]
    #[test]
    fn only_regular_files_of_some_size_are_read() {
        let temp = tempfile::tempdir().unwrap();
        let (pipe, large) = (temp.path().join("pipe.pem"), temp.path().join("large.pem"));
        let is_made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success();
        assert!(is_made);
        for other in [pipe, "/dev/zero".into()] {
            let (sender, receiver) = std::sync::mpsc::channel();
            std::thread::spawn(move || sender.send(read(&other).unwrap_err().to_string()));
            let said = receiver.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
            assert_eq!(said, "not a regular file");
        }
        File::create(&large).unwrap().set_len(LARGEST + 1).unwrap();
        assert!(read(&large).unwrap_err().to_string().contains("larger than 16 MiB"));
    }
}
