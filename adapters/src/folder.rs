//! Opening an adapter's folder so that nothing outside it can be read through it.
//!
//! A path is canonicalised and must lie under an allowed root; then it is walked again from the root's descriptor, one
//! component at a time, refusing symbolic links, so that a link put in place between the two steps does not help. Files
//! are opened relative to the folder's descriptor, never following a link.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};

use openlora_types::Limits;
use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags},
    io::Errno,
};

use crate::{config::CONFIG_FILE, error::AdapterError, safetensors_file::TENSORS_FILE};

/// The two files of an adapter; everything else in a folder is left alone.
pub(crate) const FILES: [&str; 2] = [CONFIG_FILE, TENSORS_FILE];

/// Names of pickled weights. They are programs and are never opened.
const PICKLES: [&str; 3] = ["adapter_model.bin", "adapter_model.pt", "adapter_model.pth"];

/// An adapter's folder, held open.
pub(crate) struct AdapterFolder {
    dir: OwnedFd,
}

/// The largest file accepted under each name.
pub(crate) fn bytes_max(file: &str, limits: &Limits) -> (u64, &'static str) {
    if file == CONFIG_FILE {
        (limits.adapter_config_bytes_max as u64, "adapter_config_bytes_max")
    } else {
        (limits.adapter_bytes_max, "adapter_bytes_max")
    }
}

/// Refuses a file of `bytes` bytes where that is over its limit.
pub(crate) fn check_size(file: &str, bytes: u64, limits: &Limits) -> Result<(), AdapterError> {
    let (max, name) = bytes_max(file, limits);
    if bytes <= max {
        return Ok(());
    }
    Err(AdapterError::invalid(file, format!("is {bytes} bytes long; the limit {name} is {max}")))
}

/// The refusal of a folder or upload that holds `pickle` instead of safetensors.
pub(crate) fn refuse_pickle(pickle: &str) -> AdapterError {
    AdapterError::invalid(
        pickle,
        "is a pickle, which can run programs, and is never opened; convert it where you trust it: python -c \"import \
         torch; from safetensors.torch import save_file; w = torch.load('adapter_model.bin', map_location='cpu', \
         weights_only=True); save_file({k: v.contiguous() for k, v in w.items()}, 'adapter_model.safetensors')\"",
    )
}

fn outside() -> AdapterError {
    // One answer for all reasons: who may register adapters need not learn which files exist elsewhere.
    AdapterError::invalid("path", "must be the absolute path of a folder under one of the allowed roots")
}

impl AdapterFolder {
    /// Opens `path` where it lies under one of `roots`, which are canonical.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] on `path`.
    pub(crate) fn open_under(path: &Path, roots: &[PathBuf]) -> Result<Self, AdapterError> {
        if !path.is_absolute() {
            return Err(outside());
        }
        let path = path.canonicalize().map_err(|_| outside())?;
        let root = roots.iter().find(|root| path.starts_with(root)).ok_or_else(outside)?;
        let below = path.strip_prefix(root).map_err(|_| outside())?;
        let mut dir = open_dir(rustix::fs::CWD, root.as_os_str()).map_err(|_| outside())?;
        for component in below.components() {
            let Component::Normal(name) = component else { return Err(outside()) };
            dir = open_dir(&dir, name).map_err(|_| outside())?;
        }
        Ok(Self { dir })
    }

    /// Opens a folder of the caller's own.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] on `path`.
    pub(crate) fn open_own(path: &Path) -> Result<Self, AdapterError> {
        let opened = path.canonicalize().and_then(|path| Ok(open_dir(rustix::fs::CWD, path.as_os_str())?));
        let dir =
            opened.map_err(|error| AdapterError::invalid("path", format!("is not a readable folder: {error}")))?;
        Ok(Self { dir })
    }

    /// Refuses a folder that holds a symbolic link, or pickled weights alone.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] naming the entry.
    pub(crate) fn check_entries(&self, limits: &Limits) -> Result<(), AdapterError> {
        let failed = |error: Errno| AdapterError::io("list the adapter's folder")(error.into());
        let (mut pickle, mut tensors) = (None, false);
        let max = limits.adapter_list_max;
        for (count, entry) in Dir::read_from(&self.dir).map_err(failed)?.enumerate() {
            let entry = entry.map_err(failed)?;
            if count > max {
                return Err(AdapterError::invalid("path", format!("holds more files than adapter_list_max, {max}")));
            }
            let mut kind = entry.file_type();
            if kind == FileType::Unknown {
                let stat =
                    rustix::fs::statat(&self.dir, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
                kind = FileType::from_raw_mode(stat.st_mode);
            }
            let name = entry.file_name().to_string_lossy();
            if kind == FileType::Symlink {
                return Err(refuse_link(&name));
            }
            tensors |= name == TENSORS_FILE;
            pickle = pickle.or(PICKLES.into_iter().find(|pickle| name == *pickle));
        }
        match pickle {
            Some(pickle) if !tensors => Err(refuse_pickle(pickle)),
            _ => Ok(()),
        }
    }

    /// Opens one of [`FILES`]: a regular file of the folder itself, no larger than its limit. Returns its length.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] naming the file, [`AdapterError::Io`].
    pub(crate) fn open(&self, name: &'static str, limits: &Limits) -> Result<(File, u64), AdapterError> {
        // NONBLOCK: opening a pipe must not wait for somebody to write to it.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.dir, name, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::LOOP | Errno::MLINK) => return Err(refuse_link(name)),
            Err(Errno::NOENT) => return Err(AdapterError::invalid(name, "is missing from the adapter's folder")),
            Err(error) => return Err(AdapterError::io(format!("open {name}"))(io::Error::from(error))),
        };
        let metadata = file.metadata().map_err(AdapterError::io(format!("open {name}")))?;
        if !metadata.is_file() {
            return Err(AdapterError::invalid(name, "is not a regular file"));
        }
        check_size(name, metadata.len(), limits)?;
        Ok((file, metadata.len()))
    }
}

fn refuse_link(name: &str) -> AdapterError {
    AdapterError::invalid(
        crate::json::shown(name),
        "is a symbolic link; an adapter's folder must hold the files themselves (`cp -rL` copies them)",
    )
}

fn open_dir(at: impl std::os::fd::AsFd, name: &std::ffi::OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::empty())
}
