//! Who used which credential for what: a line for each exchange and each event of a credential, chained by hashes.

pub mod file;
mod line;
pub mod verify;

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use serde::Serialize;
use time::OffsetDateTime;

use crate::access::PassName;
use crate::clock::Clock;
use crate::credential::CredentialName;
use crate::sink::{Sink, Writer};
use file::AuditFile;
use line::{Chain, LOST};

/// What is written down goes here. Clones are the same audit, and change together.
///
/// Nobody waits for a line, and none fails an exchange: what cannot be written is counted, and told by the next line.
#[derive(Clone, Default)]
pub struct Audit(Arc<ArcSwapOption<On>>);

struct On {
    sink: Sink<Entry>,
    clock: Clock,
}

impl Audit {
    /// One that writes nothing down, until it is changed.
    pub fn off() -> Self {
        Self::default()
    }

    /// Whether anything is written down: what a line is made of need not be gathered otherwise.
    pub fn is_on(&self) -> bool {
        self.0.load().is_some()
    }

    /// Writes into this from now on; `None` for nowhere.
    ///
    /// # Errors
    ///
    /// Those of the system when it gives no thread; then nothing has changed.
    pub fn change(&self, trail: Option<Trail>, clock: Clock) -> io::Result<()> {
        let sink = match trail {
            Some(Trail::File(file)) => Some(Sink::start(THREAD, MOST_WAITING, file)?),
            Some(Trail::Lines(out)) => {
                let lines = Lines { chain: Chain::default(), out };
                Some(Sink::start(THREAD, MOST_WAITING, lines)?)
            }
            None => None,
        };
        self.0.store(sink.map(|sink| Arc::new(On { sink, clock })));
        Ok(())
    }

    /// Writes an exchange down, which has ended.
    pub fn exchange(&self, kind: Kind, exchange: Exchange) {
        self.note(kind.event(), || What::Exchange(exchange.bounded()));
    }

    /// Writes down what became of a credential. `detail` is a word or a code of ours or an issuer's.
    pub fn credential(&self, name: &CredentialName, event: CredentialEvent, detail: Option<&str>) {
        self.note(event.name(), || What::Credential {
            credential: bounded(name.as_str()),
            detail: detail.map(code),
        });
    }

    /// Writes down that a pass was made.
    pub fn pass_made(&self, name: &PassName) {
        self.note("pass_made", || What::Pass { pass: Some(bounded(name.as_str())) });
    }

    /// Writes down that a pass was revoked; `None` for all of them.
    pub fn pass_revoked(&self, name: Option<&PassName>) {
        let pass = name.map(|name| bounded(name.as_str()));
        self.note("pass_revoked", || What::Pass { pass });
    }

    /// Waits until all is written, for at most [`FLUSH_LIMIT`]. Whether it is; so it is when nothing is written down.
    pub fn flush(&self) -> bool {
        self.0.load_full().is_none_or(|on| on.sink.flush(FLUSH_LIMIT))
    }

    fn note(&self, event: &'static str, what: impl FnOnce() -> What) {
        if let Some(on) = &*self.0.load() {
            let entry = Entry { time: on.clock.now(), event, what: what() };
            let size = entry.size();
            // One that is lost is counted, and the next line says so.
            let _is_kept = on.sink.offer(entry, size);
        }
    }
}

impl fmt::Debug for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Audit({})", if self.is_on() { "on" } else { "off" })
    }
}

/// Where lines go.
pub enum Trail {
    /// Into a file, after those of all processes before.
    File(AuditFile),
    /// One by one into this, in a chain of this process alone. A write that fails loses its line.
    Lines(Box<dyn Write + Send>),
}

/// What has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A request that was looked into, or refused.
    Exchange,
    /// Bytes both ways that nobody looked at.
    Tunnel,
    /// A WebSocket.
    WebSocket,
}

impl Kind {
    fn event(self) -> &'static str {
        match self {
            Self::Exchange => "exchange",
            Self::Tunnel => "tunnel",
            Self::WebSocket => "websocket",
        }
    }
}

/// What became of a credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CredentialEvent {
    /// Somebody signed in.
    Login,
    /// Somebody signed out.
    Logout,
    /// `valetkey token` has printed the secret.
    HandedOut,
    /// A new token is asked for.
    RefreshBegun,
    /// There is one.
    RefreshEnded,
    /// There is none.
    RefreshFailed,
    /// The issuer has ended the login.
    Dead,
    /// The owner of the machine does not allow the login.
    Forbidden,
    /// A login that is not allowed was deleted.
    Deleted,
}

impl CredentialEvent {
    fn name(self) -> &'static str {
        match self {
            Self::Login => "login",
            Self::Logout => "logout",
            Self::HandedOut => "handed_out",
            Self::RefreshBegun => "refresh_begun",
            Self::RefreshEnded => "refresh_ended",
            Self::RefreshFailed => "refresh_failed",
            Self::Dead => "dead",
            Self::Forbidden => "forbidden",
            Self::Deleted => "deleted",
        }
    }
}

/// An exchange, a tunnel or a WebSocket: who asked for what, and what came of it. Never a field of a head, a query or a
/// body.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Exchange {
    /// The client's user, where the kernel tells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// The pass that let it in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pass: Option<String>,
    /// The rule that covered it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// The credential of that rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credential: Option<String>,
    /// The method.
    pub method: String,
    /// Host and port.
    pub host: String,
    /// The path, without its query; `None` for what has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The status that the client got; `None` where it got none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Bytes of bodies, or of a tunnel, from the client.
    pub up: u64,
    /// And to the client.
    pub down: u64,
    /// How long it took, in milliseconds.
    pub ms: u64,
    /// `ok`, the code of our refusal, or how it ended else.
    pub outcome: &'static str,
}

impl Exchange {
    /// The same with nothing in it that is longer than a line may bear.
    fn bounded(self) -> Self {
        Self {
            pass: self.pass.as_deref().map(bounded),
            rule: self.rule.as_deref().map(bounded),
            credential: self.credential.as_deref().map(bounded),
            method: bounded(&self.method),
            host: shortened(&self.host, LONGEST_HOST),
            path: self.path.as_deref().map(|path| shortened(path, LONGEST_PATH)),
            ..self
        }
    }
}

/// A line to be.
struct Entry {
    time: OffsetDateTime,
    event: &'static str,
    what: What,
}

impl Entry {
    /// That so many lines were lost before this.
    fn lost(lines: u64, time: OffsetDateTime) -> Self {
        Self { time, event: LOST, what: What::Lost { lines } }
    }

    /// About what it takes while it waits.
    fn size(&self) -> usize {
        let texts = match &self.what {
            What::Exchange(it) => {
                let some = |text: &Option<String>| text.as_ref().map_or(0, String::len);
                let names = some(&it.pass) + some(&it.rule) + some(&it.credential);
                names + it.method.len() + it.host.len() + some(&it.path)
            }
            _ => 0,
        };
        size_of::<Self>() + texts
    }
}

/// What a line says beside when.
#[derive(Serialize)]
#[serde(untagged)]
enum What {
    Exchange(Exchange),
    Credential {
        credential: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
    },
    Pass {
        #[serde(skip_serializing_if = "Option::is_none")]
        pass: Option<String>,
    },
    /// A file begins.
    File {
        version: &'static str,
    },
    /// What stands before this, back to the last whole line, has this SHA-256: a process has ended while it wrote.
    Torn {
        torn: String,
    },
    /// So many lines were lost before this one.
    Lost {
        lines: u64,
    },
}

/// Lines that go one by one to where nothing is known of those before.
struct Lines {
    chain: Chain,
    out: Box<dyn Write + Send>,
}

impl Writer<Entry> for Lines {
    fn write(&mut self, entries: Vec<Entry>, lost: u64) -> u64 {
        let mut untold = lost;
        for entry in &entries {
            if untold > 0 && self.put(&Entry::lost(untold, entry.time)) {
                untold = 0;
            }
            // Not before what is told, so that the chain shows where the gap is.
            if untold > 0 || !self.put(entry) {
                untold += 1;
            }
        }
        untold
    }
}

impl Lines {
    /// Whether it is written.
    fn put(&mut self, entry: &Entry) -> bool {
        let (line, chain) = self.chain.line(entry);
        let is_written = self.out.write_all(&line).is_ok();
        if is_written {
            self.chain = chain;
        }
        is_written
    }
}

/// A name, as long as a line bears it.
fn bounded(text: &str) -> String {
    shortened(text, LONGEST_NAME)
}

/// Visible ASCII stays, every other byte is percent-encoded; what is too long ends with `…`, which nothing else can.
fn shortened(text: &str, longest: usize) -> String {
    let mut out = String::with_capacity(text.len().min(longest));
    for byte in text.bytes() {
        if out.len() >= longest {
            out.push('…');
            break;
        }
        match byte.is_ascii_graphic() || byte == b' ' {
            true => out.push(char::from(byte)),
            false => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// A code that somebody else has given: a word of letters, or nothing that is repeated here.
fn code(text: &str) -> String {
    let is_of_code = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
    match text.len() <= LONGEST_CODE && !text.is_empty() && text.bytes().all(is_of_code) {
        true => text.to_owned(),
        false => "other".to_owned(),
    }
}

const THREAD: &str = "audit";

/// What may wait to be written: some ten thousand exchanges.
const MOST_WAITING: usize = 4 * 1024 * 1024;

/// How long the end of a program waits for its last lines: a disk that works takes far less.
pub const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// Longest path in a line; those of APIs have some 100 characters.
const LONGEST_PATH: usize = 1024;

/// Longest name of a host (RFC 1035 section 2.3.4 has 255 octets), with its port.
const LONGEST_HOST: usize = 264;

/// Longest other name: a pass has 64 characters, a rule has as many as its author likes.
const LONGEST_NAME: usize = 128;

/// Longest code of an issuer's; the longest of RFC 6749 has 25 characters.
const LONGEST_CODE: usize = 48;

#[cfg(test)]
mod tests;
