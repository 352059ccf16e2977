//! The keyring of a Linux desktop: the Secret Service on the session bus, asked so that it opens no dialogue.

use std::collections::HashMap;
use std::io::ErrorKind;

use secret_service::blocking::{Item, SecretService};
use secret_service::{EncryptionType, Error};
use zbus::blocking::Connection;
use zeroize::Zeroizing;

use super::{Entry, Ring, RingError};

/// The Secret Service of this user's session. Each question has a connection of its own, so that one
/// which comes later than we do is found.
///
/// The entries are those that the `keyring` crate of Codex (3.6) finds and writes. That crate unlocks what
/// is locked, which opens a dialogue and waits for it; here a lock is an answer.
pub(super) struct System;

impl Ring for System {
    fn get(&self, entry: &Entry) -> Result<Option<Zeroizing<Vec<u8>>>, RingError> {
        let service = connect()?;
        match items(&service, entry)?.as_slice() {
            [] => Ok(None),
            [item] => Ok(Some(Zeroizing::new(item.get_secret().map_err(refused)?))),
            [_, ..] => Err(RingError::Failed(AMBIGUOUS.to_owned())),
        }
    }

    fn set(&self, entry: &Entry, value: &[u8]) -> Result<(), RingError> {
        let service = connect()?;
        match items(&service, entry)?.as_slice() {
            [] => create(&service, entry, value),
            [item] => item.set_secret(value, CONTENT_TYPE).map_err(refused),
            [_, ..] => Err(RingError::Failed(AMBIGUOUS.to_owned())),
        }
    }

    fn delete(&self, entry: &Entry) -> Result<(), RingError> {
        let service = connect()?;
        items(&service, entry)?.iter().try_for_each(|item| item.delete().map_err(refused))
    }
}

/// Connects to the bus and to the service on it.
fn connect() -> Result<SecretService<'static>, RingError> {
    let bus = Connection::session().map_err(not_reached)?;
    introduce(&bus)?;
    SecretService::connect_with_existing(EncryptionType::Dh, bus).map_err(|error| match error {
        Error::Zbus(error) => not_reached(error),
        _ => RingError::Failed(error.to_string()),
    })
}

/// Where there is no bus of ours, or nobody on it offers the service, it is absent. An error of any other kind says
/// nothing of that: there may be a keyring with a login in it.
fn not_reached(error: zbus::Error) -> RingError {
    let said = error.to_string();
    let is_absent = match error {
        zbus::Error::Address(_) => true,
        zbus::Error::Connection(cause, _) => NO_BUS.contains(&cause.kind()),
        _ => NO_SERVICE.iter().any(|sign| said.contains(sign)),
    };
    if is_absent {
        return RingError::Absent(format!("{}: {said}", Error::Unavailable));
    }
    RingError::Failed(said)
}

/// Makes the service know this connection before a session is opened on it.
///
/// gnome-keyring (42 and 50) notes each connection when its first call comes in, and now and then answers that call
/// before it has noted it (once in 2,000 to 50,000 connections, measured). Where that call opens a session, the daemon
/// ends, and whatever it had unlocked is locked. A name that is no alias is looked up without the note, and once that
/// is answered, the note is there; what the service answers does not matter, if only it lives to answer: the bus would
/// say next that there is none.
fn introduce(bus: &Connection) -> Result<(), RingError> {
    let (service, path) = ("org.freedesktop.secrets", "/org/freedesktop/secrets");
    let (interface, name) = ("org.freedesktop.Secret.Service", env!("CARGO_PKG_NAME"));
    let answer = bus.call_method(Some(service), path, Some(interface), "ReadAlias", &name);
    match answer {
        Err(zbus::Error::MethodError(name, ..)) if !is_of_the_bus(&name) => Ok(()),
        Err(error) => Err(not_reached(error)),
        Ok(_) => Ok(()),
    }
}

/// Whether an error says that the service is not there, or is no longer.
fn is_of_the_bus(name: &str) -> bool {
    name.ends_with(".NoReply") || NO_SERVICE.iter().any(|sign| name.contains(sign))
}

/// The items of an entry, all of them unlocked: those made for the default target, else those of
/// older programs that knew no targets.
fn items<'a>(service: &'a SecretService<'_>, entry: &Entry) -> Result<Vec<Item<'a>>, RingError> {
    let wanted = HashMap::from([("service", &*entry.service), ("username", &*entry.account)]);
    let found = service.search_items(wanted).map_err(refused)?;
    if !found.locked.is_empty() {
        return Err(RingError::Locked);
    }
    let (mut current, mut old) = (Vec::new(), Vec::new());
    for item in found.unlocked {
        match item.get_attributes().map_err(refused)?.get("target").map(String::as_str) {
            Some(TARGET) => current.push(item),
            None => old.push(item),
            Some(_) => {}
        }
    }
    Ok(if current.is_empty() { old } else { current })
}

fn create(service: &SecretService<'_>, entry: &Entry, value: &[u8]) -> Result<(), RingError> {
    let collection = service.get_default_collection().map_err(refused)?;
    collection.ensure_unlocked().map_err(refused)?;
    let label = format!("{}: {}", entry.service, entry.account);
    let attributes = HashMap::from([
        ("service", &*entry.service),
        ("username", &*entry.account),
        ("target", TARGET),
        ("application", APPLICATION),
    ]);
    collection.create_item(&label, attributes, value, true, CONTENT_TYPE).map_err(refused)?;
    Ok(())
}

fn refused(error: Error) -> RingError {
    match error {
        // A prompt is asked for only where something is locked, and nobody answers it.
        Error::Locked | Error::Prompt | Error::PromptDisconnected => RingError::Locked,
        Error::NoResult => RingError::Absent("the keyring has no default collection".to_owned()),
        // A collection may be locked between two questions.
        _ if error.to_string().contains("IsLocked") => RingError::Locked,
        _ => RingError::Failed(error.to_string()),
    }
}

/// What the same crate writes into the entries that Codex makes, and looks for in them.
const TARGET: &str = "default";
const APPLICATION: &str = "rust-keyring";

/// Both Codex's values and ours are text.
const CONTENT_TYPE: &str = "text/plain";

/// What connecting ends with where there is no bus, nobody listens on it any more, or it is another user's.
const NO_BUS: [ErrorKind; 3] =
    [ErrorKind::NotFound, ErrorKind::ConnectionRefused, ErrorKind::PermissionDenied];

/// Parts of the names of the errors by which a bus says that nobody on it offers the service.
const NO_SERVICE: [&str; 3] = ["ServiceUnknown", "NameHasNoOwner", "Spawn"];

const AMBIGUOUS: &str = "there is more than one such entry";
