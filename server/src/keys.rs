//! API keys at rest: a JSON file of names, roles and BLAKE3 hashes. A key is 256 random bits, so one fast hash is enough:
//! there is nothing to guess. The plaintext is shown once, at creation, and exists nowhere else.
//!
//! The file is replaced atomically and read again when it changes, so `openlora key create` works beside a running
//! server and a revoked key stops working within a second.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use openlora_types::{Alias, InvalidField, Limits};
use serde::{Deserialize, Serialize};

/// What every key begins with, so that scanners of repositories and logs can find a leaked one.
pub const KEY_PREFIX: &str = "olk_";

const FILE_VERSION: u32 = 1;
const FILE_BYTES_MAX: u64 = 16 << 20;
const KEYS_MAX: usize = 50_000;
/// A key that is known is trusted this long before the file's time stamp is looked at again.
const REVOCATION_DELAY: Duration = Duration::from_secs(1);
/// An unknown key may be one created a moment ago; guesses still cause at most this many looks.
const DISCOVERY_DELAY: Duration = Duration::from_millis(50);

/// What a caller may do. See `auth.rs` for which call needs which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Inference, and seeing what there is to ask for.
    App,
    /// Also adapters under its own name.
    Owner,
    /// Seeing what its data has earned, and where epochs are.
    Contributor,
    /// Server information and metrics; epochs, and every account.
    Operator,
    /// Everything.
    Admin,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::App => "app",
            Self::Owner => "owner",
            Self::Contributor => "contributor",
            Self::Operator => "operator",
            Self::Admin => "admin",
        })
    }
}

impl std::str::FromStr for Role {
    type Err = InvalidField;

    fn from_str(text: &str) -> Result<Self, InvalidField> {
        match text {
            "app" => Ok(Self::App),
            "owner" => Ok(Self::Owner),
            "contributor" => Ok(Self::Contributor),
            "operator" => Ok(Self::Operator),
            "admin" => Ok(Self::Admin),
            _ => Err(InvalidField::new("role", "must be app, owner, contributor, operator or admin")),
        }
    }
}

/// What can go wrong with the key file. None of it says anything about a key's plaintext.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The file could not be read or written.
    #[error("key file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no key file.
    #[error("key file {}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and what.
        reason: String,
    },
    /// Other users of the machine may read or change the file.
    #[error("key file {} has mode {mode:o}; run: chmod 600 {}", path.display(), path.display())]
    Permissions {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A name that cannot be a key's.
    #[error(transparent)]
    Invalid(#[from] InvalidField),
    /// The name has a key of another role already.
    #[error("{name} has a key of role {role} already; revoke it first or choose another name")]
    RoleConflict {
        /// The name.
        name: String,
        /// The role it has.
        role: Role,
    },
    /// The file is full.
    #[error("key file {} holds {KEYS_MAX} keys, the most there may be; revoke some", path.display())]
    Full {
        /// The file.
        path: PathBuf,
    },
}

/// One key, without its plaintext.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyRecord {
    /// Whose key it is: the tenant that requests are accounted to. A name may have several keys of one role, so that a
    /// key can be replaced without a gap.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// BLAKE3 of the whole key, 64 hexadecimal digits.
    pub hash: String,
    /// When it was made.
    pub created_unix_s: u64,
}

impl KeyRecord {
    /// The first 12 digits of the hash: names one of several keys of a name.
    #[must_use]
    pub fn id(&self) -> &str {
        self.hash.get(..12).unwrap_or(&self.hash)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    version: u32,
    keys: Vec<KeyRecord>,
}

/// A key's plaintext, which `Debug` does not show.
#[derive(Clone, PartialEq, Eq)]
pub struct PlainKey(String);

impl PlainKey {
    fn draw() -> Self {
        let secret: [u8; 32] = rand::random();
        Self(format!("{KEY_PREFIX}{}", blake3::Hash::from_bytes(secret).to_hex()))
    }

    /// The key itself, to be printed once.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for PlainKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PlainKey(olk_…)")
    }
}

/// What tells one state of the file from another without reading it. The inode changes with every atomic replacement,
/// also where two fall into one tick of the file system's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    inode: u64,
    bytes: u64,
}

#[derive(Debug, Default)]
struct Loaded {
    stamp: Option<Stamp>,
    /// By the first eight bytes of the hash. The map's timing tells at most those, of a hash nobody can invert; the
    /// rest is compared in constant time.
    by_prefix: HashMap<u64, Vec<(blake3::Hash, KeyRecord)>>,
}

/// The key file and what was last read of it.
#[derive(Debug)]
pub struct KeyStore {
    path: PathBuf,
    loaded: RwLock<Loaded>,
    checked: Mutex<Option<Instant>>,
}

impl KeyStore {
    /// Opens the file; one that does not exist yet holds no keys.
    ///
    /// # Errors
    /// A file that cannot be read, that others may read, or that is no key file.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, KeyError> {
        let path = path.into();
        let loaded = load(&path)?;
        Ok(Self { path, loaded: RwLock::new(loaded), checked: Mutex::new(Some(Instant::now())) })
    }

    /// Draws a key for `name` and writes its hash. The returned plaintext is the only copy.
    ///
    /// # Errors
    /// A bad name, a name of another role, a file that cannot be written.
    pub fn create(&self, name: &str, role: Role) -> Result<PlainKey, KeyError> {
        check_name("name", name)?;
        let key = PlainKey::draw();
        self.change(|keys| {
            if let Some(other) = keys.iter().find(|key| key.name == name && key.role != role) {
                return Err(KeyError::RoleConflict { name: name.to_owned(), role: other.role });
            }
            if keys.len() >= KEYS_MAX {
                return Err(KeyError::Full { path: self.path.clone() });
            }
            keys.push(KeyRecord {
                name: name.to_owned(),
                role,
                hash: hash_of(key.reveal()).to_hex().to_string(),
                created_unix_s: unix_now_s(),
            });
            Ok(())
        })?;
        Ok(key)
    }

    /// Removes the keys named so, or the one key with this [`KeyRecord::id`]; says how many there were.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn revoke(&self, name_or_id: &str) -> Result<usize, KeyError> {
        let mut removed = 0;
        self.change(|keys| {
            let before = keys.len();
            keys.retain(|key| key.name != name_or_id && key.id() != name_or_id);
            removed = before - keys.len();
            Ok(())
        })?;
        Ok(removed)
    }

    /// All keys, in the order of the file.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn list(&self) -> Result<Vec<KeyRecord>, KeyError> {
        Ok(read_file(&self.path)?.map_or_else(Vec::new, |(file, _)| file.keys))
    }

    /// Whose key this is; `None` where nobody's. A file that became unreadable keeps the keys read last: a slip of an
    /// editor should not lock everybody out, and cannot let anybody in.
    #[must_use]
    pub fn verify(&self, key: &str) -> Option<KeyRecord> {
        if !key.starts_with(KEY_PREFIX) {
            return None;
        }
        let hash = hash_of(key);
        if self.find(&hash).is_some() {
            self.reload_if_changed(REVOCATION_DELAY);
        } else {
            self.reload_if_changed(DISCOVERY_DELAY);
        }
        self.find(&hash)
    }

    /// Reads the file again if it changed and was not looked at within `delay`.
    fn reload_if_changed(&self, delay: Duration) {
        let mut checked = lock(&self.checked);
        let now = Instant::now();
        if checked.is_some_and(|at| now.duration_since(at) < delay) {
            return;
        }
        *checked = Some(now);
        let known = self.loaded.read().unwrap_or_else(PoisonError::into_inner).stamp;
        if stamp_of(&self.path) == known {
            return;
        }
        match load(&self.path) {
            Ok(loaded) => *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = loaded,
            Err(error) => tracing::error!(%error, "keys not reloaded; the ones read last stay valid"),
        }
    }

    fn find(&self, hash: &blake3::Hash) -> Option<KeyRecord> {
        let loaded = self.loaded.read().unwrap_or_else(PoisonError::into_inner);
        // `blake3::Hash` compares in constant time.
        let candidates = loaded.by_prefix.get(&prefix_of(hash))?;
        candidates.iter().find(|(known, _)| known == hash).map(|(_, record)| record.clone())
    }

    /// Reads, changes and replaces the file under a lock that other processes respect as well.
    fn change(&self, change: impl FnOnce(&mut Vec<KeyRecord>) -> Result<(), KeyError>) -> Result<(), KeyError> {
        let mut checked = lock(&self.checked);
        let io = |source| KeyError::Io { path: self.path.clone(), source };
        let folder = folder_of(&self.path);
        std::fs::create_dir_all(folder).map_err(io)?;
        let lock_file = File::options().create(true).truncate(false).write(true).open(self.path.with_extension("lock"));
        let lock_file = lock_file.map_err(io)?;
        lock_file.lock().map_err(io)?;

        let mut keys = read_file(&self.path)?.map_or_else(Vec::new, |(file, _)| file.keys);
        change(&mut keys)?;
        let text = serde_json::to_string_pretty(&KeyFile { version: FILE_VERSION, keys }).map_err(|e| io(e.into()))?;
        // A temporary file is created with mode 0600.
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(io)?;
        file.write_all(text.as_bytes()).and_then(|()| file.as_file().sync_all()).map_err(io)?;
        file.persist(&self.path).map_err(|error| io(error.error))?;
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)?;

        let loaded = load(&self.path)?;
        *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        *checked = Some(Instant::now());
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

fn hash_of(key: &str) -> blake3::Hash {
    blake3::hash(key.as_bytes())
}

fn prefix_of(hash: &blake3::Hash) -> u64 {
    let bytes = hash.as_bytes();
    u64::from_le_bytes(std::array::from_fn(|i| bytes[i]))
}

fn unix_now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A key's name is the first segment of the aliases its owner may register, so it has the form of one.
pub(crate) fn check_name(field: &str, name: &str) -> Result<(), InvalidField> {
    Alias::parse(field, name, &Limits::default())?;
    if name.contains('/') {
        return Err(InvalidField::new(field, "must not contain '/': it is the part of an alias before it"));
    }
    Ok(())
}

fn stamp_of(path: &Path) -> Option<Stamp> {
    let metadata = std::fs::metadata(path).ok()?;
    Some(Stamp { modified: metadata.modified().ok(), inode: metadata.ino(), bytes: metadata.len() })
}

fn read_file(path: &Path) -> Result<Option<(KeyFile, Stamp)>, KeyError> {
    let io = |source| KeyError::Io { path: path.to_owned(), source };
    let malformed = |reason: String| KeyError::Malformed { path: path.to_owned(), reason };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    let metadata = file.metadata().map_err(io)?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeyError::Permissions { path: path.to_owned(), mode });
    }
    let stamp = Stamp { modified: metadata.modified().ok(), inode: metadata.ino(), bytes: metadata.len() };
    let mut text = String::new();
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(io)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(malformed(format!("is larger than {FILE_BYTES_MAX} bytes")));
    }
    // serde_json's messages quote field names and positions, and at worst the hash of a key.
    let file: KeyFile = serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
    if file.version != FILE_VERSION {
        return Err(malformed(format!("has version {}; this program reads version {FILE_VERSION}", file.version)));
    }
    if file.keys.len() > KEYS_MAX {
        return Err(malformed(format!("has {} keys; there may be {KEYS_MAX}", file.keys.len())));
    }
    Ok(Some((file, stamp)))
}

fn load(path: &Path) -> Result<Loaded, KeyError> {
    let Some((file, stamp)) = read_file(path)? else { return Ok(Loaded::default()) };
    let mut by_prefix: HashMap<u64, Vec<_>> = HashMap::with_capacity(file.keys.len());
    for (i, record) in file.keys.into_iter().enumerate() {
        let malformed =
            |reason: String| KeyError::Malformed { path: path.to_owned(), reason: format!("keys[{i}].{reason}") };
        check_name("name", &record.name).map_err(|error| malformed(error.to_string()))?;
        let hash = blake3::Hash::from_hex(&record.hash)
            .map_err(|_| malformed("hash must be 64 hexadecimal digits".to_owned()))?;
        by_prefix.entry(prefix_of(&hash)).or_default().push((hash, record));
    }
    Ok(Loaded { stamp: Some(stamp), by_prefix })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, PathBuf, KeyStore) {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("deep/keys.json");
        let store = KeyStore::open(&path).expect("a missing file is an empty store");
        (folder, path, store)
    }

    #[test]
    fn a_key_is_verified_and_its_plaintext_is_nowhere_on_disk() {
        let (_folder, path, store) = store();
        let key = store.create("acme", Role::Owner).expect("created");
        let record = store.verify(key.reveal()).expect("verified");
        assert_eq!((record.name.as_str(), record.role), ("acme", Role::Owner));
        let text = std::fs::read_to_string(&path).expect("file");
        assert!(!text.contains(&key.reveal()[KEY_PREFIX.len()..]));
        assert!(!format!("{key:?} {store:?}").contains(&key.reveal()[KEY_PREFIX.len()..]));
        let mode = std::fs::metadata(&path).expect("file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn near_misses_are_nobodys_keys() {
        let (_folder, _path, store) = store();
        let key = store.create("acme", Role::App).expect("created");
        let key = key.reveal();
        let upper = key.to_uppercase();
        let long = format!("{key}0");
        for bad in ["", KEY_PREFIX, &key[..key.len() - 1], &key[KEY_PREFIX.len()..], &upper, &long] {
            assert_eq!(store.verify(bad), None);
        }
    }

    #[test]
    fn keys_created_and_revoked_by_another_process_take_effect() {
        let (_folder, path, server) = store();
        assert_eq!(server.verify("olk_unknown"), None);
        let other = KeyStore::open(&path).expect("second store");
        let key = other.create("acme", Role::App).expect("created");
        *lock(&server.checked) = None;
        assert!(server.verify(key.reveal()).is_some(), "a key created beside the server works");
        assert_eq!(other.revoke("acme").expect("revoked"), 1);
        *lock(&server.checked) = None;
        assert_eq!(server.verify(key.reveal()), None, "a revoked key does not");
    }

    #[test]
    fn the_file_is_looked_at_no_more_often_than_promised() {
        let (_folder, path, server) = store();
        let other = KeyStore::open(&path).expect("second store");
        let key = other.create("acme", Role::App).expect("created");
        *lock(&server.checked) = Some(Instant::now() + Duration::from_secs(60));
        assert_eq!(server.verify(key.reveal()), None, "within the delay the old state holds");
    }

    #[test]
    fn a_name_may_have_two_keys_of_one_role_but_not_of_two() {
        let (_folder, _path, store) = store();
        let first = store.create("acme", Role::Owner).expect("first");
        let second = store.create("acme", Role::Owner).expect("second");
        assert!(matches!(store.create("acme", Role::Admin), Err(KeyError::RoleConflict { .. })));
        let first_id = store.verify(first.reveal()).expect("known").id().to_owned();
        assert_eq!(store.revoke(&first_id).expect("revoked"), 1);
        assert_eq!(store.verify(first.reveal()), None);
        assert!(store.verify(second.reveal()).is_some());
        for bad in ["", "a/b", "../x", "a b", "a,b"] {
            assert!(matches!(store.create(bad, Role::App), Err(KeyError::Invalid(_))), "{bad}");
        }
    }

    #[test]
    fn a_file_that_others_may_read_or_that_is_broken_is_refused() {
        let (_folder, path, store) = store();
        let key = store.create("acme", Role::App).expect("created");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("chmod");
        assert!(matches!(KeyStore::open(&path), Err(KeyError::Permissions { mode: 0o644, .. })));
        for bad in [
            "",
            "{",
            r#"{"version":2,"keys":[]}"#,
            r#"{"version":1,"keys":[{"name":"a","role":"god","hash":"","created_unix_s":0}]}"#,
            r#"{"version":1,"keys":[{"name":"a","role":"app","hash":"00","created_unix_s":0}]}"#,
            r#"{"version":1,"keys":[{"name":"a/b","role":"app","hash":"00","created_unix_s":0}]}"#,
        ] {
            std::fs::write(&path, bad).expect("written");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("chmod");
            assert!(matches!(KeyStore::open(&path), Err(KeyError::Malformed { .. })), "{bad}");
            *lock(&store.checked) = None;
            assert!(store.verify(key.reveal()).is_some(), "the keys read last stay valid");
        }
    }
}
