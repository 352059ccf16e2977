//! Keeps the passes: a file that can recognise each and shows none.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::record::moment;
use super::{StoreError, file};
use crate::access::{PassName, PassRecord, Reach};
use crate::secret::Fingerprint;

/// The file of all passes of one user.
#[derive(Clone, Debug)]
pub struct PassFile {
    folder: PathBuf,
}

impl PassFile {
    /// The one in this folder, which is made with the first pass.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.folder.join("passes.json")
    }

    /// Makes its folder, so that the first pass is heard of by who watches it.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when there can be none.
    pub fn make_folder(&self) -> Result<(), StoreError> {
        file::make_private_folder(&self.folder)
    }

    /// All passes, the oldest first; none where there is no file.
    ///
    /// # Errors
    ///
    /// [`StoreError`] for a file that cannot be read, is not ours, or makes no sense.
    pub fn read(&self) -> Result<Vec<PassRecord>, StoreError> {
        let path = self.path();
        let Some(bytes) = file::read(&path)? else { return Ok(Vec::new()) };
        let corrupt = |what: String| file::corrupt(&path, what);
        let list: PassList =
            serde_json::from_slice(&bytes).map_err(|error| corrupt(error.to_string()))?;
        list.passes.into_iter().map(|entry| entry.record().map_err(&corrupt)).collect()
    }

    /// Adds a pass. One of the same name that counts no more at `now` makes room for it. Whether it was added: not
    /// beside one of its name that still counts.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; then nothing was changed.
    pub fn add(&self, record: PassRecord, now: OffsetDateTime) -> Result<bool, StoreError> {
        let counts = |known: &PassRecord| {
            known.name == record.name && !known.has_expired(now) && !known.is_used_up()
        };
        self.change(|records| {
            if records.iter().any(counts) {
                return false;
            }
            records.retain(|known| known.name != record.name);
            records.push(record.clone());
            true
        })
        .map(|(_, is_added)| is_added)
    }

    /// Takes a pass out, or all of them. How many were taken out.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; then nothing was changed.
    pub fn remove(&self, name: Option<&PassName>) -> Result<usize, StoreError> {
        let removed = self.change(|records| {
            let before = records.len();
            records.retain(|record| name.is_some_and(|name| record.name != *name));
            before - records.len()
        });
        removed.map(|(_, count)| count)
    }

    /// Adds to how often passes were used; those that are gone meanwhile are passed over. The passes as they are then.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; then nothing was changed.
    pub fn count(&self, used: &[(Fingerprint, u64)]) -> Result<Vec<PassRecord>, StoreError> {
        let counted = self.change(|records| {
            for (digest, count) in used {
                for record in records.iter_mut().filter(|record| record.digest == *digest) {
                    record.used = record.used.saturating_add(*count);
                }
            }
        });
        counted.map(|(records, ())| records)
    }

    /// Changes the file in one step, with all other processes kept out.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut Vec<PassRecord>) -> T,
    ) -> Result<(Vec<PassRecord>, T), StoreError> {
        self.make_folder()?;
        let _ours = file::lock_folder(&self.folder, LOCK_LIMIT)?;
        file::sweep(&self.folder, &[FRESH]);
        let before = self.read()?;
        let mut records = before.clone();
        let outcome = change(&mut records);
        if records != before {
            let list = PassList { passes: records.iter().map(StoredPass::of).collect() };
            let json = serde_json::to_vec_pretty(&list)
                .map_err(|error| file::corrupt(&self.path(), error.to_string()))?;
            file::replace(&self.path(), FRESH, &json)?;
        }
        Ok((records, outcome))
    }
}

/// How the name of the file begins while it is being written.
const FRESH: &str = ".passes-";

/// How long another process may hold the file, which it does for one write.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// The file. What it does not know is a mistake: a limit that is passed over would let somebody in.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct PassList {
    passes: Vec<StoredPass>,
}

/// One pass in it.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct StoredPass {
    name: String,
    sha256: String,
    /// Null for all.
    rules: Option<Vec<String>>,
    tunnel: bool,
    allow_private: bool,
    #[serde(with = "moment")]
    created: Option<OffsetDateTime>,
    #[serde(with = "moment")]
    expires: Option<OffsetDateTime>,
    max_requests: Option<u64>,
    used: u64,
}

impl StoredPass {
    fn of(record: &PassRecord) -> Self {
        let PassRecord { name, digest, reach, created, expires, max_requests, used } =
            record.clone();
        let Reach { rules, tunnel, allow_private } = reach;
        let (name, sha256, created) = (name.to_string(), digest.to_hex(), Some(created));
        Self { name, sha256, rules, tunnel, allow_private, created, expires, max_requests, used }
    }

    fn record(self) -> Result<PassRecord, String> {
        let Self { name, sha256, rules, tunnel, allow_private, .. } = self;
        Ok(PassRecord {
            name: name.parse().map_err(|bad| format!("a pass is called `{name}`: {bad}"))?,
            digest: Fingerprint::from_hex(&sha256)
                .ok_or_else(|| format!("the `sha256` of `{name}` is none"))?,
            reach: Reach { rules, tunnel, allow_private },
            created: self.created.ok_or_else(|| format!("`{name}` has no `created`"))?,
            expires: self.expires,
            max_requests: self.max_requests,
            used: self.used,
        })
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;
    use crate::secret::Secret;

    const NOW: OffsetDateTime = datetime!(2026-11-29 12:00 UTC);

    fn record(name: &str) -> PassRecord {
        PassRecord {
            name: name.parse().unwrap(),
            digest: Secret::new(format!("vkp_{name}")).fingerprint(),
            reach: Reach {
                rules: Some(vec!["example".into()]),
                tunnel: true,
                allow_private: false,
            },
            created: NOW,
            expires: Some(NOW + time::Duration::HOUR),
            max_requests: Some(2),
            used: 0,
        }
    }

    #[test]
    fn passes_come_back_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let passes = PassFile::new(folder.path().join("passes"));
        assert_eq!(passes.read().unwrap(), []);
        assert!(!folder.path().join("passes").exists(), "reading makes nothing");
        assert!(passes.add(record("a"), NOW).unwrap() && passes.add(record("b"), NOW).unwrap());
        assert!(!passes.add(PassRecord { max_requests: None, ..record("a") }, NOW).unwrap());
        assert_eq!(passes.read().unwrap(), [record("a"), record("b")]);
        let text = std::fs::read_to_string(passes.path()).unwrap();
        assert!(!text.contains("vkp_"), "{text}");
        assert_eq!(passes.remove(Some(&"c".parse().unwrap())).unwrap(), 0);
        assert_eq!(passes.remove(Some(&"a".parse().unwrap())).unwrap(), 1);
        assert_eq!(passes.read().unwrap(), [record("b")]);
        assert_eq!(passes.remove(None).unwrap(), 1);
        assert_eq!(passes.read().unwrap(), []);
    }

    #[test]
    fn a_name_is_free_again_when_its_pass_counts_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let passes = PassFile::new(folder.path().join("passes"));
        passes.add(record("a"), NOW).unwrap();
        let another = PassRecord { digest: Secret::new("vkp_2").fingerprint(), ..record("a") };
        assert!(!passes.add(another.clone(), NOW).unwrap());
        passes.count(&[(record("a").digest, 2)]).unwrap();
        assert!(passes.add(another, NOW).unwrap(), "the first is used up");
        let later = NOW + time::Duration::HOUR;
        assert!(passes.add(record("a"), later).unwrap(), "the second has expired");
        assert_eq!(passes.read().unwrap(), [record("a")]);
    }

    #[test]
    fn uses_are_counted_by_many() {
        let folder = tempfile::tempdir().unwrap();
        let passes = PassFile::new(folder.path().join("passes"));
        passes.add(record("a"), NOW).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| passes.count(&[(record("a").digest, 3)]).unwrap());
            }
        });
        assert_eq!(passes.read().unwrap()[0].used, 24);
    }

    #[test]
    fn a_file_that_makes_no_sense_is_no_list_of_passes() {
        let folder = tempfile::tempdir().unwrap();
        let passes = PassFile::new(folder.path().to_owned());
        passes.add(record("a"), NOW).unwrap();
        let good = std::fs::read_to_string(passes.path()).unwrap();
        for (from, to) in [
            ("\"rules\"", "\"rule\""),
            ("\"used\": 0", "\"used\": -1"),
            ("\"name\": \"a\"", "\"name\": \"a b\""),
            ("\"sha256\": \"", "\"sha256\": \"0"),
            ("{", "["),
        ] {
            let bad = good.replacen(from, to, 1);
            std::fs::write(passes.path(), &bad).unwrap();
            assert!(matches!(passes.read(), Err(StoreError::Corrupt { .. })), "{bad}");
            assert!(passes.add(record("b"), NOW).is_err(), "{bad}");
            assert_eq!(std::fs::read_to_string(passes.path()).unwrap(), bad, "it is left alone");
        }
    }
}
