//! The one key that logins of ours are sealed with: 32 random bytes in the keyring.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

use super::super::StoreError;
use super::super::keyring::{Entry, Keyring};
use super::super::seal::{Key, key_of, new_key};

/// The key, if there is one.
pub(in crate::store) fn find(keyring: &Keyring) -> Result<Option<Key>, StoreError> {
    let entry = entry();
    let found = keyring.get(&entry).map_err(|error| error.into_store_error(&entry))?;
    found.map(|text| decode(&text)).transpose()
}

/// The key, which is made where there is none. The caller holds the lock of its folder; between folders the
/// keyring decides: the key that it has in the end is the key.
pub(in crate::store) fn find_or_make(keyring: &Keyring) -> Result<Key, StoreError> {
    if let Some(key) = find(keyring)? {
        return Ok(key);
    }
    let entry = entry();
    let fresh = new_key().ok_or_else(|| unavailable("the system gives no random bytes"))?;
    let text = Zeroizing::new(STANDARD.encode(*fresh));
    let set = keyring.set(&entry, text.as_bytes());
    set.map_err(|error| error.into_store_error(&entry))?;
    find(keyring)?.ok_or_else(|| unavailable("it does not keep what is put there"))
}

fn decode(text: &[u8]) -> Result<Key, StoreError> {
    let corrupt = || StoreError::NoKeyring {
        place: entry().to_string(),
        what: "what is there is no key of valetkey; delete that entry".to_owned(),
    };
    let bytes = Zeroizing::new(STANDARD.decode(text.trim_ascii()).map_err(|_| corrupt())?);
    key_of(&bytes).ok_or_else(corrupt)
}

fn unavailable(what: &str) -> StoreError {
    StoreError::Unavailable { place: entry().to_string(), what: what.to_owned() }
}

fn entry() -> Entry {
    Entry { service: "valetkey".to_owned(), account: "sealing-key".to_owned() }
}
