//! The store's folder on disk, and what makes it survive a `kill -9` at any instant.
//!
//! ```text
//! lock                      held while a process uses the folder
//! adapters/<generation>/    adapter_config.json, adapter_model.safetensors: as registered, never changed
//! aliases/<alias>.json      one record per alias ('/' written as '%', which no alias contains)
//! staging/<random>/         adapters being copied, and generations being removed
//! ```
//! A generation appears by one rename of a folder whose files are already on disk, an alias by one rename of its record,
//! in that order, so no alias ever names half an adapter. Removal goes the other way: record first, then the folder,
//! which leaves `adapters/` by one rename before its files go. Whatever a crash leaves is one of: a staging folder, a
//! generation that no alias names, a record that never got its name. [`Disk::open`] removes all three.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use openlora_types::{Generation, Limits};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::{error::AdapterError, folder::FILES};

/// Bytes of an alias record; a record holds module names and a short history.
const RECORD_BYTES_MAX: u64 = 1 << 20;
/// Version of the records' format.
const RECORD_FORMAT: u32 = 1;

/// What is known of a generation without opening its files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) rank_max: u32,
    /// Bytes of its tensors in memory.
    pub(crate) bytes: u64,
    pub(crate) sites: u32,
    pub(crate) dora: bool,
    /// Names of the modules adapted, such as `q_proj`, each once.
    pub(crate) modules: Vec<String>,
}

/// A generation with its summary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) generation: Generation,
    pub(crate) summary: Summary,
}

/// An alias as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) alias: String,
    pub(crate) owner: String,
    pub(crate) created_unix_s: u64,
    pub(crate) pinned: bool,
    pub(crate) current: Known,
    /// What the alias stood for before, latest first.
    pub(crate) history: Vec<Known>,
}

impl Record {
    /// Everything the alias stands for or may be pointed back at.
    pub(crate) fn generations(&self) -> impl Iterator<Item = &Known> {
        std::iter::once(&self.current).chain(&self.history)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordFile {
    format: u32,
    alias: String,
    owner: String,
    created_unix_s: u64,
    pinned: bool,
    /// The current generation first.
    generations: Vec<KnownFile>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KnownFile {
    generation: String,
    summary: Summary,
}

/// What [`Disk::open`] found.
pub(crate) struct Recovered {
    pub(crate) records: Vec<Record>,
    /// What was left out or cleaned up, in words.
    pub(crate) notes: Vec<String>,
}

/// The store's folder, locked for this process.
pub(crate) struct Disk {
    root: PathBuf,
    /// Unlocked when dropped.
    _lock: File,
}

impl Disk {
    /// Opens or creates the folder and finishes what a crash interrupted.
    ///
    /// # Errors
    /// [`AdapterError::Io`]; also where another process holds the folder.
    pub(crate) fn open(root: &Path, limits: &Limits) -> Result<(Self, Recovered), AdapterError> {
        for dir in ["adapters", "aliases", "staging"] {
            fs::create_dir_all(root.join(dir)).map_err(AdapterError::io("create the adapters' data folder"))?;
        }
        let lock = File::create(root.join("lock")).map_err(AdapterError::io("create the data folder's lock"))?;
        lock.try_lock().map_err(|error| {
            let why = match error {
                TryLockError::WouldBlock => io::Error::new(io::ErrorKind::ResourceBusy, "another process is using it"),
                TryLockError::Error(error) => error,
            };
            AdapterError::io("lock the adapters' data folder")(why)
        })?;
        let disk = Self { root: root.to_owned(), _lock: lock };
        let recovered = disk.recover(limits)?;
        Ok((disk, recovered))
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Where a generation's files are.
    pub(crate) fn generation_dir(&self, generation: Generation) -> PathBuf {
        self.dir("adapters").join(generation.to_string())
    }

    fn record_path(&self, alias: &str) -> PathBuf {
        self.dir("aliases").join(format!("{}.json", alias.replace('/', "%")))
    }

    fn recover(&self, limits: &Limits) -> Result<Recovered, AdapterError> {
        let failed = || AdapterError::io("read the adapters' data folder");
        let mut notes = Vec::new();
        for entry in fs::read_dir(self.dir("staging")).map_err(failed())? {
            let path = entry.map_err(failed())?.path();
            notes.push(format!("removed the unfinished {}", path.display()));
            remove(&path).map_err(AdapterError::io("clean the staging folder"))?;
        }
        let present = self.present()?;
        let mut records = Vec::new();
        // A record that cannot be read may name any generation, so nothing is collected beside one.
        let mut collect = true;
        for entry in fs::read_dir(self.dir("aliases")).map_err(failed())? {
            let path = entry.map_err(failed())?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with('.') {
                notes.push(format!("removed the unfinished record {name}"));
                remove(&path).map_err(AdapterError::io("clean the aliases folder"))?;
                continue;
            }
            match read_record(&path, limits) {
                Ok(mut record) => {
                    record.history.retain(|known| present.contains(&known.generation));
                    if present.contains(&record.current.generation) {
                        records.push(record);
                    } else {
                        let generation = record.current.generation.short();
                        notes.push(format!("left out {}: generation {generation} is missing", record.alias));
                    }
                }
                Err(error) => {
                    collect = false;
                    notes.push(format!("left out the record {name}: {error}"));
                }
            }
        }
        if collect {
            let wanted: HashSet<_> =
                records.iter().flat_map(Record::generations).map(|known| known.generation).collect();
            for generation in present.difference(&wanted) {
                notes.push(format!("removed generation {}, which no alias names", generation.short()));
                self.remove_generation(*generation)?;
            }
        }
        Ok(Recovered { records, notes })
    }

    /// Generations that have a folder.
    fn present(&self) -> Result<HashSet<Generation>, AdapterError> {
        let failed = || AdapterError::io("read the adapters' data folder");
        let mut present = HashSet::new();
        for entry in fs::read_dir(self.dir("adapters")).map_err(failed())? {
            let entry = entry.map_err(failed())?;
            let generation = entry.file_name().to_str().map(Generation::from_hex);
            present.extend(generation.and_then(Result::ok));
        }
        Ok(present)
    }

    /// A folder for files on their way in; removed when dropped.
    pub(crate) fn stage(&self) -> Result<TempDir, AdapterError> {
        let staged = tempfile::Builder::new().prefix("in-").tempdir_in(self.dir("staging"));
        staged.map_err(AdapterError::io("create a staging folder"))
    }

    /// Moves a verified staging folder to its generation's place. The caller holds the store's change lock and has seen
    /// to it that the place is free.
    pub(crate) fn publish(&self, staged: TempDir, generation: Generation) -> Result<(), AdapterError> {
        let failed = || AdapterError::io("publish the adapter");
        for file in FILES {
            File::open(staged.path().join(file)).and_then(|file| file.sync_all()).map_err(failed())?;
        }
        sync_dir(staged.path()).map_err(failed())?;
        fs::rename(staged.path(), self.generation_dir(generation)).map_err(failed())?;
        // The folder is no longer where the guard would remove it from.
        let _moved = staged.keep();
        sync_dir(&self.dir("adapters")).map_err(failed())
    }

    /// Takes a generation's folder away, whole.
    pub(crate) fn remove_generation(&self, generation: Generation) -> Result<(), AdapterError> {
        let failed = || AdapterError::io("remove a generation");
        let grave = tempfile::Builder::new().prefix("out-").tempdir_in(self.dir("staging")).map_err(failed())?;
        match fs::rename(self.generation_dir(generation), grave.path().join("generation")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed()(error)),
            _ => grave.close().map_err(failed()),
        }
    }

    /// Writes an alias's record in place of the one there was.
    pub(crate) fn write_record(&self, record: &Record) -> Result<(), AdapterError> {
        let failed = || AdapterError::io(format!("write the record of {}", record.alias));
        let generations = record
            .generations()
            .map(|known| KnownFile { generation: known.generation.to_string(), summary: known.summary.clone() });
        let file = RecordFile {
            format: RECORD_FORMAT,
            alias: record.alias.clone(),
            owner: record.owner.clone(),
            created_unix_s: record.created_unix_s,
            pinned: record.pinned,
            generations: generations.collect(),
        };
        let text = serde_json::to_vec_pretty(&file).map_err(|error| failed()(error.into()))?;
        let dir = self.dir("aliases");
        let mut temporary =
            tempfile::Builder::new().prefix(".new-").suffix(".json").tempfile_in(&dir).map_err(failed())?;
        temporary.write_all(&text).map_err(failed())?;
        temporary.as_file().sync_all().map_err(failed())?;
        temporary.persist(self.record_path(&record.alias)).map_err(|error| failed()(error.error))?;
        sync_dir(&dir).map_err(failed())
    }

    /// Removes an alias's record.
    pub(crate) fn remove_record(&self, alias: &str) -> Result<(), AdapterError> {
        let removed = fs::remove_file(self.record_path(alias)).and_then(|()| sync_dir(&self.dir("aliases")));
        removed.map_err(AdapterError::io(format!("remove the record of {alias}")))
    }
}

fn read_record(path: &Path, limits: &Limits) -> Result<Record, String> {
    let mut text = Vec::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take(RECORD_BYTES_MAX).read_to_end(&mut text).map_err(|error| error.to_string())?;
    let file: RecordFile = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    if file.format != RECORD_FORMAT {
        return Err(format!("its format is {} and this program reads {RECORD_FORMAT}", file.format));
    }
    let alias = openlora_types::Alias::parse("alias", &file.alias, limits).map_err(|error| error.to_string())?;
    let expected = format!("{}.json", alias.as_str().replace('/', "%"));
    if path.file_name().is_none_or(|name| name != expected.as_str()) {
        return Err(format!("it holds the alias {alias}"));
    }
    let known = |known: KnownFile| {
        let generation = Generation::from_hex(&known.generation).map_err(|error| error.to_string())?;
        Ok(Known { generation, summary: known.summary })
    };
    let mut generations = file.generations.into_iter().map(known).collect::<Result<Vec<_>, String>>()?.into_iter();
    Ok(Record {
        alias: file.alias,
        owner: file.owner,
        created_unix_s: file.created_unix_s,
        pinned: file.pinned,
        current: generations.next().ok_or("it names no generation")?,
        history: generations.collect(),
    })
}

fn remove(path: &Path) -> io::Result<()> {
    if path.symlink_metadata()?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// How many aliases name each generation.
#[derive(Default)]
pub(crate) struct References(HashMap<Generation, usize>);

impl References {
    /// Counts everything `record` names.
    pub(crate) fn add(&mut self, record: &Record) {
        for known in record.generations() {
            *self.0.entry(known.generation).or_default() += 1;
        }
    }

    /// Takes `record`'s counts back; returns the generations that nothing names any more.
    pub(crate) fn remove(&mut self, record: &Record) -> Vec<Generation> {
        let mut orphans = Vec::new();
        for known in record.generations() {
            if let Some(count) = self.0.get_mut(&known.generation) {
                *count -= 1;
                if *count == 0 {
                    self.0.remove(&known.generation);
                    orphans.push(known.generation);
                }
            }
        }
        orphans
    }

    /// Whether any alias names `generation`.
    pub(crate) fn contains(&self, generation: Generation) -> bool {
        self.0.contains_key(&generation)
    }

    /// How many generations are named.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}
