//! The adapters' files: staged in a folder of this machine, verified there, then kept in an object store.
//!
//! ```text
//! <data_dir>/lock                        held while a process uses the folder
//! <data_dir>/staging/<random>/           adapters being copied or uploaded
//! <store>/adapters/<location>/           adapter_config.json, adapter_model.safetensors: never changed
//! ```
//! A location is used once: `<generation>-<random>`. So whoever removes the files of a location that the registry does not
//! name can hit nobody else's, even where another server registers the same bytes at the same time. In a folder the
//! files appear by one rename, flushed to the disk before; in S3 they are put one by one. Either way the registry names
//! them only afterwards.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Seek, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use futures_util::StreamExt as _;
use object_store::{
    GetResultPayload, ObjectStore, ObjectStoreExt as _, buffered::BufWriter, local::LocalFileSystem, path::Path as Key,
};
use openlora_database::kill;
use openlora_types::{Generation, Limits};
use tempfile::TempDir;
use tokio::{io::AsyncWriteExt as _, task::JoinHandle};

use crate::{
    error::AdapterError,
    folder::{FILES, check_size},
};

/// See the module.
pub(crate) struct Files {
    store: Arc<dyn ObjectStore>,
    /// The keys' beginning; empty for a folder.
    prefix: Key,
    /// Where the store is a folder.
    folder: Option<PathBuf>,
    staging: PathBuf,
    /// Unlocked when dropped.
    _locks: Vec<File>,
}

impl Files {
    /// Opens the store at `url`, which is empty for a folder in `data_dir`, and removes what a crash left in staging.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] on `adapters.store_url`, [`AdapterError::Io`]; also where another process holds a folder.
    pub(crate) fn open(data_dir: &Path, url: &str) -> Result<Self, AdapterError> {
        let failed = || AdapterError::io("create the adapters' data folder");
        fs::create_dir_all(data_dir).map_err(failed())?;
        let mut locks = vec![lock(data_dir)?];
        let (store, prefix, folder): (Arc<dyn ObjectStore>, _, _) = match url.split_once("://") {
            None if url.is_empty() => (local(data_dir)?, Key::default(), Some(data_dir.to_owned())),
            Some(("file", path)) if path.starts_with('/') => {
                let path = PathBuf::from(path);
                fs::create_dir_all(&path).map_err(failed())?;
                if path.canonicalize().ok() != data_dir.canonicalize().ok() {
                    locks.push(lock(&path)?);
                }
                (local(&path)?, Key::default(), Some(path))
            }
            Some(("s3", rest)) => {
                let (store, prefix) = s3(url, rest)?;
                (store, prefix, None)
            }
            _ => {
                let why = "must be s3://bucket/prefix, file:///folder, or empty for a folder in the data folder";
                return Err(AdapterError::invalid("adapters.store_url", why));
            }
        };
        // A rename does not cross file systems, so adapters for a folder are staged inside it.
        let staging = folder.as_deref().unwrap_or(data_dir).join("staging");
        let files = Self { store, prefix, folder, staging, _locks: locks };
        files.clean()?;
        Ok(files)
    }

    /// A store of any kind, for tests of what is not a folder.
    #[cfg(test)]
    pub(crate) fn over(store: Arc<dyn ObjectStore>, data_dir: &Path) -> Self {
        let staging = data_dir.join("staging");
        let files = Self { store, prefix: Key::from("some/prefix"), folder: None, staging, _locks: Vec::new() };
        files.clean().expect("a fresh folder");
        files
    }

    fn clean(&self) -> Result<(), AdapterError> {
        let failed = || AdapterError::io("clean the staging folder");
        fs::create_dir_all(&self.staging).map_err(failed())?;
        if let Some(folder) = &self.folder {
            fs::create_dir_all(folder.join("adapters")).map_err(failed())?;
        }
        for entry in fs::read_dir(&self.staging).map_err(failed())? {
            let path = entry.map_err(failed())?.path();
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(failed())?;
            tracing::warn!("removed the unfinished {}", path.display());
        }
        Ok(())
    }

    /// Whether other servers may use the store too.
    pub(crate) fn is_shared(&self) -> bool {
        self.folder.is_none()
    }

    /// A folder for files on their way in; removed when dropped.
    pub(crate) fn stage(&self) -> Result<TempDir, AdapterError> {
        let staged = tempfile::Builder::new().prefix("in-").tempdir_in(&self.staging);
        staged.map_err(AdapterError::io("create a staging folder"))
    }

    /// A location for `generation` that nothing has used.
    pub(crate) fn location(generation: Generation, staged: &TempDir) -> String {
        // The staging folder's name is random already, but short: time tells apart what random letters do not.
        let name = staged.path().file_name().unwrap_or_default().to_string_lossy();
        let random = name.strip_prefix("in-").unwrap_or(&name);
        let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        format!("{generation}-{:x}{random}", since.as_nanos())
    }

    /// Brings a staging folder and its files to the disk, at once: the file system's journal commits them together.
    /// Needed for a folder, before [`Self::put`].
    ///
    /// # Errors
    /// [`AdapterError::Io`].
    pub(crate) async fn flush(&self, staged: &TempDir) -> Result<(), AdapterError> {
        if self.folder.is_none() {
            return Ok(());
        }
        kill::point("before the flush");
        let dir = staged.path();
        let flushes = [dir.to_owned(), dir.join(FILES[0]), dir.join(FILES[1])].map(flush);
        for flushed in flushes {
            flushed.await.unwrap_or_else(|error| Err(error.into())).map_err(AdapterError::io("flush the adapter"))?;
        }
        Ok(())
    }

    /// Keeps a verified and flushed staging folder under `location`.
    ///
    /// # Errors
    /// [`AdapterError::Io`]; the location may hold a part then.
    pub(crate) async fn put(&self, staged: TempDir, location: &str) -> Result<(), AdapterError> {
        match &self.folder {
            Some(folder) => {
                let failed = || AdapterError::io("store the adapter");
                let adapters = folder.join("adapters");
                fs::rename(staged.path(), adapters.join(location)).map_err(failed())?;
                // The folder is no longer where the guard would remove it from.
                let _moved = staged.keep();
                kill::point("between rename and flush");
                flush(adapters).await.unwrap_or_else(|error| Err(error.into())).map_err(failed())
            }
            None => {
                for file in FILES {
                    let put = self.put_file(&staged.path().join(file), &self.key(location, file)).await;
                    put.map_err(AdapterError::io("store the adapter"))?;
                }
                Ok(())
            }
        }
    }

    /// One request for a small file, several for one of gigabytes, with bounded memory.
    async fn put_file(&self, path: &Path, key: &Key) -> io::Result<()> {
        let mut source = tokio::fs::File::open(path).await?;
        let mut target = BufWriter::new(Arc::clone(&self.store), key.clone());
        tokio::io::copy(&mut source, &mut target).await?;
        target.shutdown().await
    }

    /// The two files of `location` with their lengths; `None` where they are not there.
    ///
    /// # Errors
    /// [`AdapterError::Io`], [`AdapterError::Invalid`] where a file is larger than any that is registered.
    pub(crate) async fn open_both(
        &self,
        location: &str,
        limits: &Limits,
    ) -> Result<Option<[(File, u64); 2]>, AdapterError> {
        let [config, tensors] = FILES;
        let Some(config) = self.open_file(location, config, limits).await? else { return Ok(None) };
        let Some(tensors) = self.open_file(location, tensors, limits).await? else { return Ok(None) };
        Ok(Some([config, tensors]))
    }

    async fn open_file(
        &self,
        location: &str,
        file: &str,
        limits: &Limits,
    ) -> Result<Option<(File, u64)>, AdapterError> {
        let failed = || AdapterError::io(format!("read {file} from the store"));
        let found = match self.store.get(&self.key(location, file)).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            found => found.map_err(io::Error::from).map_err(failed())?,
        };
        check_size(file, found.meta.size, limits)?;
        match found.payload {
            GetResultPayload::File(opened, _) => {
                let length = opened.metadata().map_err(failed())?.len();
                Ok(Some((opened, length)))
            }
            // Spooled to a file without a name: hashing and parsing read it piece by piece, whatever its size.
            GetResultPayload::Stream(mut pieces) => {
                let mut spool = tempfile::tempfile_in(&self.staging).map_err(failed())?;
                let mut length = 0;
                while let Some(piece) = pieces.next().await {
                    let piece = piece.map_err(io::Error::from).map_err(failed())?;
                    length += piece.len() as u64;
                    check_size(file, length, limits)?;
                    spool.write_all(&piece).map_err(failed())?;
                }
                spool.rewind().map_err(failed())?;
                Ok(Some((spool, length)))
            }
        }
    }

    /// Removes what is under `location`; nothing being there is no error.
    pub(crate) async fn remove(&self, location: &str) -> Result<(), AdapterError> {
        let failed = || AdapterError::io("remove an adapter's files");
        if let Some(folder) = &self.folder {
            return match fs::remove_dir_all(folder.join("adapters").join(location)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed()(error)),
                _ => Ok(()),
            };
        }
        for file in FILES {
            match self.store.delete(&self.key(location, file)).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(failed()(error.into())),
            }
        }
        Ok(())
    }

    fn key(&self, location: &str, file: &str) -> Key {
        self.prefix.clone().join("adapters").join(location).join(file)
    }
}

fn lock(folder: &Path) -> Result<File, AdapterError> {
    let lock = File::create(folder.join("lock")).map_err(AdapterError::io("create the data folder's lock"))?;
    lock.try_lock().map_err(|error| {
        let why = match error {
            TryLockError::WouldBlock => io::Error::new(io::ErrorKind::ResourceBusy, "another process is using it"),
            TryLockError::Error(error) => error,
        };
        AdapterError::io("lock the adapters' data folder")(why)
    })?;
    Ok(lock)
}

fn local(folder: &Path) -> Result<Arc<dyn ObjectStore>, AdapterError> {
    let opened = LocalFileSystem::new_with_prefix(folder).map_err(io::Error::from);
    Ok(Arc::new(opened.map_err(AdapterError::io("open the adapters' store"))?))
}

/// Credentials, region and endpoint are the usual `AWS_*` variables.
#[cfg(feature = "s3")]
fn s3(url: &str, rest: &str) -> Result<(Arc<dyn ObjectStore>, Key), AdapterError> {
    let invalid = |error: object_store::Error| AdapterError::invalid("adapters.store_url", error.to_string());
    let prefix = rest.split_once('/').map_or("", |(_, prefix)| prefix);
    let prefix = Key::parse(prefix).map_err(|error| invalid(error.into()))?;
    let store = object_store::aws::AmazonS3Builder::from_env().with_url(url).build().map_err(invalid)?;
    Ok((Arc::new(store), prefix))
}

#[cfg(not(feature = "s3"))]
fn s3(_url: &str, _rest: &str) -> Result<(Arc<dyn ObjectStore>, Key), AdapterError> {
    let why = "names an S3 bucket, which this program was built without; build it with `cargo build --release -p \
               openlora-cli --features s3`";
    Err(AdapterError::invalid("adapters.store_url", why))
}

/// Flushes a file or folder, on a thread that may wait for the disk.
fn flush(path: PathBuf) -> JoinHandle<io::Result<()>> {
    tokio::task::spawn_blocking(move || File::open(path)?.sync_all())
}
