//! An adapter that arrives in pieces.

use std::{
    fs::File,
    io::Write,
    sync::{Arc, atomic::Ordering},
};

use openlora_types::Alias;
use tempfile::TempDir;

use crate::{
    error::AdapterError,
    folder::{FILES, check_size, refuse_pickle},
    info::{Actor, AdapterInfo, Registration},
    json::shown,
    store::Inner,
};

/// Files on their way into the store. Dropping it removes what was sent.
pub struct Upload {
    staged: TempDir,
    alias: Alias,
    actor: Actor,
    registration: Registration,
    /// The file being written and its bytes so far.
    open: Option<(&'static str, File, u64)>,
    /// Files that were begun; none may be begun twice.
    begun: Vec<&'static str>,
    permit: Permit,
}

/// One of [`openlora_types::Limits::uploads_max`].
struct Permit(Arc<Inner>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.uploads.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Upload {
    pub(crate) fn begin(
        inner: Arc<Inner>,
        alias: Alias,
        actor: Actor,
        registration: Registration,
    ) -> Result<Self, AdapterError> {
        let max = inner.limits.uploads_max;
        let running = inner.uploads.fetch_add(1, Ordering::AcqRel);
        let permit = Permit(inner);
        if running >= max {
            return Err(AdapterError::LimitReached {
                limit: "uploads_max",
                max: max as u64,
                reason: format!("{running} uploads are in progress"),
                passes: true,
            });
        }
        let staged = permit.0.core.files.stage()?;
        Ok(Self { staged, alias, actor, registration, open: None, begun: Vec::new(), permit })
    }

    /// Appends `data` to `file`, which is `adapter_config.json` or `adapter_model.safetensors`. The pieces of a file
    /// follow each other.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] on `chunk.file` or naming the file that is over its limit, [`AdapterError::Io`].
    pub fn write(&mut self, file: &str, data: &[u8]) -> Result<(), AdapterError> {
        let Some(name) = FILES.into_iter().find(|name| *name == file) else {
            if file.starts_with("adapter_model.") {
                return Err(refuse_pickle(&shown(file)));
            }
            let why = format!("is `{}`; an adapter has the files {} and {}", shown(file), FILES[0], FILES[1]);
            return Err(AdapterError::invalid("chunk.file", why));
        };
        if self.open.as_ref().is_none_or(|(open, ..)| *open != name) {
            if self.begun.contains(&name) {
                let why = format!("comes back to {name}; the pieces of a file must follow each other");
                return Err(AdapterError::invalid("chunk.file", why));
            }
            let created = File::create_new(self.staged.path().join(name));
            self.open = Some((name, created.map_err(AdapterError::io(format!("store {name}")))?, 0));
            self.begun.push(name);
        }
        let (_, target, total) = self.open.as_mut().expect("the file was opened above");
        *total += data.len() as u64;
        check_size(name, *total, &self.permit.0.limits)?;
        target.write_all(data).map_err(AdapterError::io(format!("store {name}")))
    }

    /// Verifies what was sent and publishes it.
    ///
    /// # Errors
    /// As [`crate::AdapterStore::register_folder`]. Nothing is left behind.
    pub fn finish(self) -> Result<AdapterInfo, AdapterError> {
        let Self { staged, alias, actor, registration, open, begun: _, permit } = self;
        drop(open);
        permit.0.admit(staged, &alias, &actor, &registration)
    }
}
