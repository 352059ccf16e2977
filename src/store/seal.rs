//! Seals bytes with AES-256-GCM, bound to what they are for.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::rand;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

/// What a key is: 32 bytes, wiped on drop.
pub(super) type Key = Zeroizing<[u8; 32]>;

/// A new key; `None` when the system gives no random bytes.
pub(super) fn new_key() -> Option<Key> {
    let mut key = Key::default();
    rand::fill(&mut *key).ok()?;
    Some(key)
}

/// The key that these bytes are, if they are one.
pub(super) fn key_of(bytes: &[u8]) -> Option<Key> {
    let mut key = Key::default();
    if bytes.len() != key.len() {
        return None;
    }
    key.copy_from_slice(bytes);
    Some(key)
}

/// Nonce and sealed bytes, in Base64.
pub(super) fn seal(bytes: &[u8], key: &Key, bound_to: &[u8]) -> Result<String, String> {
    let failed = |_| "it could not be sealed".to_owned();
    let mut nonce = [0; NONCE];
    rand::fill(&mut nonce).map_err(failed)?;
    // Overwritten in place by what is sealed; the room is for the tag, so that no copy is left behind.
    let mut sealed = Zeroizing::new(Vec::with_capacity(bytes.len() + AES_256_GCM.tag_len()));
    sealed.extend_from_slice(bytes);
    let unique = Nonce::assume_unique_for_key(nonce);
    let sealing = cipher(key).map_err(failed)?;
    sealing.seal_in_place_append_tag(unique, Aad::from(bound_to), &mut *sealed).map_err(failed)?;
    Ok(STANDARD.encode([&nonce[..], &sealed].concat()))
}

/// What was sealed with this key and is bound to the same. Nothing else opens, nor does half of it.
pub(super) fn open(sealed: &str, key: &Key, bound_to: &[u8]) -> Result<Zeroizing<Vec<u8>>, String> {
    let failed = || "it was changed, or sealed with another key or for another record".to_owned();
    let mut bytes = Zeroizing::new(STANDARD.decode(sealed).map_err(|_| failed())?);
    let (nonce, rest) = bytes.split_at_mut_checked(NONCE).ok_or_else(failed)?;
    let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| failed())?;
    let opening = cipher(key).map_err(|_| failed())?;
    let opened = opening.open_in_place(nonce, Aad::from(bound_to), rest).map_err(|_| failed())?;
    Ok(Zeroizing::new(opened.to_vec()))
}

fn cipher(key: &Key) -> Result<LessSafeKey, aws_lc_rs::error::Unspecified> {
    UnboundKey::new(&AES_256_GCM, key.as_slice()).map(LessSafeKey::new)
}

/// 96 random bits for each write, which are enough for four billion writes under one key (NIST SP 800-38D,
/// 8.3).
const NONCE: usize = 12;
