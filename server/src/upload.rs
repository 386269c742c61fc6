//! `Adapters.Upload`: a PEFT folder as a stream of chunks. The order and the sizes are checked here, on bytes as they
//! come; what is in them is the adapters room's. Writing happens on a thread that may block, behind a short queue, so
//! network and disk overlap and a fast client waits for a slow disk.
//!
//! Whatever ends an upload early (the client, a limit, silence, shutdown) drops the store's `Upload`, which removes what
//! was written.

use std::sync::Arc;
use std::time::{Duration, Instant};

use openlora_adapters::{AdapterInfo, Registration, Upload};
use openlora_proto::v1 as wire;
use openlora_proto::v1::upload_adapter_request::Part;
use openlora_types::{Alias, InvalidField, Limits};
use tokio::sync::mpsc;
use tonic::Streaming;

use crate::ServerError;
use crate::adapters::registration;
use crate::app::State;
use crate::auth::Caller;
use crate::edge::transport_error;

/// Chunks on their way to the disk, each at most one message.
const CHUNKS_IN_FLIGHT: usize = 2;
/// Messages of one upload, so that one byte at a time cannot go on for ever.
const CHUNKS_MAX: u64 = 1 << 20;

/// The files of a PEFT folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum File {
    Config,
    Tensors,
}

impl File {
    fn parse(name: &str) -> Result<Self, InvalidField> {
        match name {
            "adapter_config.json" => Ok(Self::Config),
            "adapter_model.safetensors" => Ok(Self::Tensors),
            _ => Err(InvalidField::new("chunk.file", "must be adapter_config.json or adapter_model.safetensors")),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Config => "adapter_config.json",
            Self::Tensors => "adapter_model.safetensors",
        }
    }

    fn limit(self, limits: &Limits) -> (&'static str, u64) {
        match self {
            Self::Config => ("adapter_config_bytes_max", limits.adapter_config_bytes_max as u64),
            Self::Tensors => ("adapter_bytes_max", limits.adapter_bytes_max),
        }
    }
}

/// Which chunks may follow which.
#[derive(Debug, Default)]
struct Order {
    /// Files begun, in order, with their bytes so far.
    files: Vec<(File, u64)>,
    chunks: u64,
}

impl Order {
    /// The header was taken already: only chunks may follow.
    fn next(&mut self, part: Option<Part>, limits: &Limits) -> Result<(File, Vec<u8>), InvalidField> {
        let chunk = match part {
            Some(Part::Chunk(chunk)) => chunk,
            Some(Part::Header(_)) => return Err(InvalidField::new("header", "must be the first part only")),
            None => return Err(InvalidField::new("part", "must be a header or a chunk")),
        };
        let file = File::parse(&chunk.file)?;
        if chunk.data.is_empty() {
            return Err(InvalidField::new("chunk.data", "must not be empty"));
        }
        self.chunks += 1;
        if self.chunks > CHUNKS_MAX {
            return Err(InvalidField::new("chunk", format!("is one of more than {CHUNKS_MAX}: send larger ones")));
        }
        let begun = self.files.iter().position(|&(begun, _)| begun == file);
        match begun {
            None => self.files.push((file, 0)),
            Some(at) if at + 1 == self.files.len() => {}
            Some(_) => {
                let why = format!("goes back to {}: all chunks of a file must follow each other", file.name());
                return Err(InvalidField::new("chunk.file", why));
            }
        }
        let (_, bytes) = self.files.last_mut().expect("the chunk's file is the last");
        *bytes += chunk.data.len() as u64;
        let (limit, max) = file.limit(limits);
        if *bytes > max {
            return Err(InvalidField::new(
                "chunk.data",
                format!("makes {} larger than the limit {limit}, {max} bytes", file.name()),
            ));
        }
        Ok((file, chunk.data))
    }

    fn finish(&self) -> Result<(), InvalidField> {
        for file in [File::Config, File::Tensors] {
            if !self.files.iter().any(|&(begun, _)| begun == file) {
                return Err(InvalidField::new(
                    "chunk.file",
                    format!("never was {}: both files are needed", file.name()),
                ));
            }
        }
        Ok(())
    }
}

/// What the writing thread is told. That it is told nothing more means that the upload was given up.
enum Work {
    Write(File, Vec<u8>),
    Finish,
}

/// The client's side of an upload, with its timeouts.
struct Incoming {
    stream: Streaming<wire::UploadAdapterRequest>,
    state: Arc<State>,
    until: Instant,
}

impl Incoming {
    async fn next(&mut self) -> Result<Option<wire::UploadAdapterRequest>, ServerError> {
        let idle = self.state.config.upload_idle_timeout;
        let left = self.until.saturating_duration_since(Instant::now());
        let (what, limit) = match left < idle {
            true => ("the whole upload", self.state.config.upload_timeout),
            false => ("the next part of the upload", idle),
        };
        match tokio::time::timeout(left.min(idle), self.stream.message()).await {
            Err(_) => Err(ServerError::Idle { what, limit }),
            Ok(Ok(message)) => Ok(message),
            // A client that went away gets no answer; the words are for the log.
            Ok(Err(status)) => Err(transport_error(&status, &self.state).unwrap_or(ServerError::Undecodable)),
        }
    }
}

/// Serves one upload.
pub(crate) async fn receive(
    state: &Arc<State>,
    caller: &Caller,
    stream: Streaming<wire::UploadAdapterRequest>,
) -> Result<AdapterInfo, ServerError> {
    let limits = &state.config.limits;
    let permit = Arc::clone(&state.uploads).try_acquire_owned().map_err(|_| ServerError::Busy {
        what: "uploads are in progress",
        limit: "uploads_max",
        max: limits.uploads_max,
        retry_after: Duration::from_secs(5),
    })?;
    let mut incoming =
        Incoming { stream, state: Arc::clone(state), until: Instant::now() + state.config.upload_timeout };
    let (alias, registration) = header(incoming.next().await?, limits)?;
    caller.check_namespace(&alias)?;

    let (work, inbox) = mpsc::channel(CHUNKS_IN_FLIGHT);
    let store = Arc::clone(&state.app.store);
    let actor = caller.actor();
    let writer = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        write(store.begin_upload(&alias, &actor, registration)?, inbox)
    });
    let mut order = Order::default();
    let sent = async {
        while let Some(message) = incoming.next().await? {
            let (file, data) = order.next(message.part, &incoming.state.config.limits)?;
            if work.send(Work::Write(file, data)).await.is_err() {
                // The writer has failed, and says why below.
                return Ok(());
            }
        }
        order.finish()?;
        let _ = work.send(Work::Finish).await;
        Ok::<(), ServerError>(())
    }
    .await;
    drop(work);
    let written = writer.await.map_err(|_| ServerError::Internal("writing an upload panicked"))?;
    sent?;
    written?.ok_or(ServerError::Internal("an upload ended without a result"))
}

fn header(first: Option<wire::UploadAdapterRequest>, limits: &Limits) -> Result<(Alias, Registration), ServerError> {
    match first.and_then(|message| message.part) {
        Some(Part::Header(header)) => {
            let alias = Alias::parse("header.alias", &header.alias, limits)?;
            Ok((alias, registration(header.replace, header.tags, header.lineage)?))
        }
        _ => Err(InvalidField::new("header", "must be the first part").into()),
    }
}

/// Writes until told to finish; `None` where the upload was given up.
fn write(mut upload: Upload, mut inbox: mpsc::Receiver<Work>) -> Result<Option<AdapterInfo>, ServerError> {
    while let Some(work) = inbox.blocking_recv() {
        match work {
            Work::Write(file, data) => upload.write(file.name(), &data)?,
            Work::Finish => return Ok(Some(upload.finish()?)),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(file: &str, len: usize) -> Option<Part> {
        Some(Part::Chunk(wire::UploadChunk { file: file.into(), data: vec![0; len] }))
    }

    fn run(parts: Vec<Option<Part>>) -> Result<(), InvalidField> {
        let limits = Limits { adapter_config_bytes_max: 10, adapter_bytes_max: 20, ..Limits::default() };
        let mut order = Order::default();
        for part in parts {
            order.next(part, &limits)?;
        }
        order.finish()
    }

    const CONFIG: &str = "adapter_config.json";
    const TENSORS: &str = "adapter_model.safetensors";

    #[test]
    fn both_files_in_either_order_and_any_chunks_make_an_upload() {
        assert_eq!(run(vec![chunk(CONFIG, 5), chunk(CONFIG, 5), chunk(TENSORS, 20)]), Ok(()));
        assert_eq!(run(vec![chunk(TENSORS, 20), chunk(CONFIG, 10)]), Ok(()));
    }

    #[test]
    fn parts_out_of_order_or_over_a_limit_are_refused_by_name() {
        let header = Some(Part::Header(wire::UploadHeader::default()));
        for (parts, field) in [
            (vec![chunk(CONFIG, 1), header], "header"),
            (vec![None], "part"),
            (vec![chunk("../adapter_config.json", 1)], "chunk.file"),
            (vec![chunk("adapter_model.bin", 1)], "chunk.file"),
            (vec![chunk("", 1)], "chunk.file"),
            (vec![chunk(CONFIG, 0)], "chunk.data"),
            (vec![chunk(CONFIG, 1), chunk(TENSORS, 1), chunk(CONFIG, 1)], "chunk.file"),
            (vec![chunk(CONFIG, 6), chunk(CONFIG, 5)], "chunk.data"),
            (vec![chunk(TENSORS, 21)], "chunk.data"),
            (vec![chunk(TENSORS, 1)], "chunk.file"),
            (vec![chunk(CONFIG, 1)], "chunk.file"),
            (vec![], "chunk.file"),
        ] {
            assert_eq!(run(parts).expect_err(field).field, field);
        }
    }

    #[test]
    fn an_upload_begins_with_its_header() {
        let limits = Limits::default();
        let message = |part| Some(wire::UploadAdapterRequest { part });
        let with_alias =
            |alias: &str| message(Some(Part::Header(wire::UploadHeader { alias: alias.into(), ..Default::default() })));
        let (alias, registration) = header(with_alias("acme/cwe"), &limits).expect("a header");
        assert_eq!((alias.as_str(), registration), ("acme/cwe", Registration::default()));
        for (first, field) in [
            (None, "header"),
            (message(None), "header"),
            (message(chunk(CONFIG, 1)), "header"),
            (with_alias("../x"), "header.alias"),
        ] {
            let error = header(first, &limits).expect_err(field);
            assert!(matches!(&error, ServerError::Invalid(invalid) if invalid.field == field), "{error}");
        }
    }
}
