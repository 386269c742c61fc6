//! Thousands of random adapters for a workload: written to disk once, then registered over gRPC as an owner would.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use openlora_proto::v1::RegisterAdapterRequest;
use openlora_proto::v1::adapters_client::AdaptersClient;
use openlora_types::{ModelShape, Module};
use tokio::task::JoinSet;
use tonic::transport::Endpoint;

use crate::adapters::write_random;
use crate::load::authorized;

/// Where adapters are registered.
#[derive(Clone, Debug)]
pub struct Registration {
    /// The server's gRPC address.
    pub url: String,
    /// An owner's API key, or empty.
    pub key: String,
    /// What [`write`] filled.
    pub folder: PathBuf,
    /// An alias is this and the adapter's five-digit number.
    pub prefix: String,
    /// Registrations at once.
    pub concurrency: usize,
}

/// Writes an adapter on q and v for each of `ranks` into `folder`, leaving alone those that are there.
///
/// # Errors
/// Writing fails.
pub fn write(ranks: &[u32], shape: &ModelShape, folder: &Path, mut progress: impl FnMut(usize)) -> Result<()> {
    for (number, rank) in ranks.iter().enumerate() {
        let adapter = folder.join(format!("{number:05}-r{rank}"));
        if !adapter.is_dir() {
            // Under another name until it is whole, so that an interrupted run is continued soundly.
            let partial = folder.join("partial");
            write_random(&partial, shape, *rank as usize, &[Module::Q, Module::V], number as u64)?;
            std::fs::rename(&partial, &adapter)?;
        }
        progress(number + 1);
    }
    Ok(())
}

/// Registers the first `count` adapters; returns the seconds it took.
///
/// # Errors
/// The server cannot be reached or refuses one.
pub async fn register(count: usize, to: &Registration, mut progress: impl FnMut(usize)) -> Result<f64> {
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(&to.folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    folders.sort();
    folders.truncate(count);
    if folders.len() < count || to.concurrency == 0 {
        bail!("{} has {} adapters, {count} are wanted, {} at once", to.folder.display(), folders.len(), to.concurrency);
    }
    let endpoint = Endpoint::from_shared(to.url.clone()).context("server address")?;
    let channel = endpoint.connect().await.with_context(|| format!("no server answers at {}", to.url))?;
    let began = Instant::now();
    let (mut running, mut done) = (JoinSet::new(), 0);
    for (number, folder) in folders.into_iter().enumerate() {
        while running.len() >= to.concurrency {
            running.join_next().await.context("a registration")???;
            done += 1;
            progress(done);
        }
        let alias = format!("{}{number:05}", to.prefix);
        let path = std::path::absolute(&folder)?.into_os_string().into_string();
        let Ok(path) = path else { bail!("{} is not UTF-8", folder.display()) };
        let message = RegisterAdapterRequest {
            alias: alias.clone(),
            path,
            replace: Some(true),
            ..RegisterAdapterRequest::default()
        };
        let (request, mut client) = (authorized(message, &to.key)?, AdaptersClient::new(channel.clone()));
        running.spawn(async move {
            client.register(request).await.map(drop).map_err(|status| anyhow::anyhow!("{alias}: {status}"))
        });
    }
    while let Some(ended) = running.join_next().await {
        ended??;
        done += 1;
        progress(done);
    }
    Ok(began.elapsed().as_secs_f64())
}
