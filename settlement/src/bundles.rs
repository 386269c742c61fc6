//! Where bundles are published: a folder or a bucket, one object `epoch-N.json` for each epoch, put in one piece and never
//! changed afterwards.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use object_store::{
    GetOptions, GetRange, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, local::LocalFileSystem,
    path::Path as Key,
};
use openlora_database::kill;
use openlora_ledger::{Asset, Ledger};
use openlora_types::InvalidField;

use crate::bundle::{Bundle, Manifest};
use crate::epochs::bundle_of;
use crate::error::SettlementError;
use crate::rpc::client;
use crate::tree::Settles;

/// Bytes of a bundle that are read at most.
pub const BUNDLE_BYTES_MAX: u64 = 4 << 30;
/// Bytes at a bundle's beginning that hold its manifest.
const MANIFEST_BYTES_MAX: u64 = 4 << 10;
/// How long somebody else's server may take to hand over a bundle.
const FETCH: Duration = Duration::from_secs(600);

/// See the module.
#[derive(Clone, Debug)]
pub struct Bundles {
    store: Arc<dyn ObjectStore>,
    /// The keys' beginning; empty for a folder.
    prefix: Key,
    /// What people call the place, without a slash at its end.
    shown: String,
}

impl Bundles {
    /// The store at `url`: `s3://bucket/prefix` or `file:///folder`; empty: `folder`. A folder is made where there is none.
    ///
    /// # Errors
    /// [`SettlementError::Invalid`] on `settlement.bundles_url`; [`SettlementError::Bundles`] for a folder that cannot be used.
    pub fn open(url: &str, folder: &Path) -> Result<Self, SettlementError> {
        match url.split_once("://") {
            None if url.is_empty() => Self::local(folder),
            Some(("file", path)) if path.starts_with('/') => Self::local(Path::new(path)),
            Some(("s3", rest)) => s3(url, rest),
            _ => Err(invalid("must be s3://bucket/prefix, file:///folder, or empty for settlement.bundles_dir")),
        }
    }

    fn local(folder: &Path) -> Result<Self, SettlementError> {
        let shown = folder.display().to_string();
        let failed = |source: object_store::Error| SettlementError::Bundles { place: shown.clone(), source };
        let made = fs::create_dir_all(folder)
            .map_err(|error| object_store::Error::Generic { store: "folder", source: error.into() });
        made.map_err(failed)?;
        // Flushes the file before it has its name, and the folder after.
        let store = LocalFileSystem::new_with_prefix(folder).map_err(failed)?.with_fsync(true);
        Ok(Self { store: Arc::new(store), prefix: Key::default(), shown })
    }

    /// Where an epoch's bundle is, for people.
    #[must_use]
    pub fn place(&self, epoch: u64) -> String {
        format!("{}/{}", self.shown, name(epoch))
    }

    /// A published bundle, recomputed from its lists; nothing where there is none.
    ///
    /// # Errors
    /// [`SettlementError::Bundles`] where the store does not answer; what [`Bundle::from_json`] refuses; a file that is too large
    /// or of another epoch.
    pub async fn get(&self, epoch: u64) -> Result<Option<Bundle>, SettlementError> {
        let Some(json) = self.read(epoch).await? else { return Ok(None) };
        // Hashing a large epoch takes a while, which a server's other tasks are not to wait for.
        let parsed = tokio::task::spawn_blocking(move || Bundle::from_json(&json)).await;
        let bundle = parsed.unwrap_or_else(|died| std::panic::resume_unwind(died.into_panic()))?;
        if bundle.manifest().epoch != epoch {
            let reason = format!("{} is of epoch {}", self.place(epoch), bundle.manifest().epoch);
            return Err(SettlementError::BundleFormat { reason });
        }
        Ok(Some(bundle))
    }

    /// The manifest of a published bundle as its file says it, without the lists that it sums up; nothing where there is none.
    ///
    /// # Errors
    /// [`SettlementError::Bundles`] where the store does not answer; [`SettlementError::BundleFormat`].
    pub async fn manifest(&self, epoch: u64) -> Result<Option<Manifest>, SettlementError> {
        let beginning = GetOptions { range: Some(GetRange::Bounded(0..MANIFEST_BYTES_MAX)), ..GetOptions::default() };
        let found = match self.store.get_opts(&self.key(epoch), beginning).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            found => found.map_err(|source| self.failed(epoch, source))?,
        };
        let json = found.bytes().await.map_err(|source| self.failed(epoch, source))?;
        let manifest = json.strip_prefix(br#"{"manifest":"#).and_then(|json| {
            // One value, whatever follows it.
            serde_json::Deserializer::from_slice(json).into_iter::<Manifest>().next()?.ok()
        });
        let manifest = manifest.filter(|manifest| manifest.epoch == epoch);
        let reason = || format!("{} does not begin with the manifest of epoch {epoch}", self.place(epoch));
        manifest.map(Some).ok_or_else(|| SettlementError::BundleFormat { reason: reason() })
    }

    /// Publishes a bundle, durable and in one piece. The same once more is fine.
    ///
    /// # Errors
    /// [`SettlementError::BundleTaken`] where another is published for its epoch, which stays; [`SettlementError::Bundles`].
    pub async fn put(&self, bundle: &Bundle) -> Result<(), SettlementError> {
        let (epoch, json) = (bundle.manifest().epoch, bundle.to_json());
        // Whoever is first makes the object; nobody replaces it.
        let create = PutOptions::from(PutMode::Create);
        match self.store.put_opts(&self.key(epoch), json.clone().into(), create).await {
            Err(object_store::Error::AlreadyExists { .. }) => match self.read(epoch).await? {
                Some(there) if there == json => Ok(()),
                _ => Err(SettlementError::BundleTaken { epoch, place: self.place(epoch) }),
            },
            put => put.map(drop).map_err(|source| self.failed(epoch, source)),
        }
    }

    async fn has(&self, epoch: u64) -> Result<bool, SettlementError> {
        match self.store.head(&self.key(epoch)).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(source) => Err(self.failed(epoch, source)),
        }
    }

    async fn read(&self, epoch: u64) -> Result<Option<Vec<u8>>, SettlementError> {
        let failed = |source| self.failed(epoch, source);
        let found = match self.store.get(&self.key(epoch)).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            found => found.map_err(failed)?,
        };
        if found.meta.size > BUNDLE_BYTES_MAX {
            let (place, bytes) = (self.place(epoch), found.meta.size);
            let reason = format!("{place} has {bytes} bytes; at most {BUNDLE_BYTES_MAX} are read");
            return Err(SettlementError::BundleFormat { reason });
        }
        Ok(Some(found.bytes().await.map_err(failed)?.into()))
    }

    fn key(&self, epoch: u64) -> Key {
        self.prefix.clone().join(name(epoch))
    }

    fn failed(&self, epoch: u64, source: object_store::Error) -> SettlementError {
        SettlementError::Bundles { place: self.place(epoch), source }
    }
}

/// Publishes every epoch after the last one published, so also those sealed before a crash; says which. They are published in
/// order: what is missing is at the end.
///
/// # Errors
/// [`bundle_of`]'s and [`Bundles::put`]'s; those before the one that failed are published.
pub async fn publish_missing(
    ledger: &Ledger,
    settles: &Settles,
    asset: &Asset,
    bundles: &Bundles,
) -> Result<Vec<Manifest>, SettlementError> {
    let last = ledger.last_epoch().await?;
    let mut published = last;
    while published > 0 && !bundles.has(published).await? {
        published -= 1;
    }
    let mut manifests = Vec::new();
    for epoch in published + 1..=last {
        let bundle = bundle_of(ledger, epoch, settles, asset).await?;
        kill::point("before a bundle is put");
        bundles.put(&bundle).await?;
        kill::point("after a bundle was put");
        manifests.push(bundle.manifest().clone());
    }
    Ok(manifests)
}

/// A bundle that somebody publishes at a URL of HTTP, recomputed from its lists.
///
/// # Errors
/// [`SettlementError::BundleFormat`], which does not repeat the URL; what [`Bundle::from_json`] refuses.
pub async fn fetch(url: &str) -> Result<Bundle, SettlementError> {
    let unread = |reason: String| SettlementError::BundleFormat { reason };
    let failed = |error: reqwest::Error| unread(error.without_url().to_string());
    let mut response = client(FETCH).map_err(failed)?.get(url).send().await.map_err(failed)?;
    if !response.status().is_success() {
        return Err(unread(format!("the server answers {}", response.status())));
    }
    let too_long = || unread(format!("it has more than {BUNDLE_BYTES_MAX} bytes"));
    if response.content_length().is_some_and(|length| length > BUNDLE_BYTES_MAX) {
        return Err(too_long());
    }
    let mut json = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        if (json.len() + chunk.len()) as u64 > BUNDLE_BYTES_MAX {
            return Err(too_long());
        }
        json.extend_from_slice(&chunk);
    }
    Bundle::from_json(&json)
}

fn name(epoch: u64) -> String {
    format!("epoch-{epoch}.json")
}

fn invalid(reason: impl Into<String>) -> SettlementError {
    SettlementError::Invalid(InvalidField::new("settlement.bundles_url", reason))
}

/// Credentials, region and endpoint are the usual `AWS_*` variables.
#[cfg(feature = "s3")]
fn s3(url: &str, rest: &str) -> Result<Bundles, SettlementError> {
    let prefix = rest.split_once('/').map_or("", |(_, prefix)| prefix);
    let prefix = Key::parse(prefix).map_err(|error| invalid(error.to_string()))?;
    let store = object_store::aws::AmazonS3Builder::from_env().with_url(url).build();
    let store = Arc::new(store.map_err(|error| invalid(error.to_string()))?);
    Ok(Bundles { store, prefix, shown: url.trim_end_matches('/').to_owned() })
}

#[cfg(not(feature = "s3"))]
fn s3(_url: &str, _rest: &str) -> Result<Bundles, SettlementError> {
    Err(invalid(
        "names an S3 bucket, which this program was built without; build it with `cargo build --release -p openlora-cli \
         --features s3`",
    ))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use alloy::primitives::{Address, B256};
    use object_store::memory::InMemory;

    use super::*;
    use crate::bundle::Epoch;
    use crate::tree::Payout;

    fn bundle(epoch: u64, cumulative: u128) -> Bundle {
        let settles = Settles { chain_id: 10, settlement: Address::repeat_byte(1), token: Address::repeat_byte(2) };
        let payouts = vec![Payout { account: Address::repeat_byte(3), cumulative }];
        let (number, ledger_head) = (epoch, B256::repeat_byte(4));
        let epoch = Epoch { number, rows: (1, 9), ledger_head, sealed_unix_s: 5, payouts, receipts: Vec::new() };
        Bundle::new(&settles, epoch).expect("a good epoch")
    }

    /// A folder, and what stands for a bucket.
    fn stores(folder: &Path) -> [Bundles; 2] {
        let prefix = Key::from("some/prefix");
        let bucket = Bundles { store: Arc::new(InMemory::new()), prefix, shown: "s3://bucket/some/prefix".to_owned() };
        [Bundles::open("", folder).expect("a folder"), bucket]
    }

    #[tokio::test]
    async fn a_published_bundle_stays_what_it_is() {
        let folder = tempfile::tempdir().expect("a folder");
        for bundles in stores(&folder.path().join("made/here")) {
            assert!(bundles.get(1).await.expect("an answer").is_none());
            for _ in 0..2 {
                bundles.put(&bundle(1, 100)).await.expect("put");
            }
            let taken = bundles.put(&bundle(1, 101)).await.expect_err("another content").to_string();
            assert!(taken.contains(&bundles.place(1)), "{taken}");
            let there = bundles.get(1).await.expect("an answer").expect("a bundle");
            assert_eq!(there.to_json(), bundle(1, 100).to_json());
            assert_eq!(bundles.manifest(1).await.expect("an answer").as_ref(), Some(there.manifest()));
            assert!(bundles.manifest(2).await.expect("an answer").is_none());
        }
        // Nothing is left of the put that was refused.
        let file = fs::read_dir(folder.path().join("made/here")).expect("a folder").map(|entry| entry.expect("a file"));
        assert_eq!(file.map(|file| file.file_name()).collect::<Vec<_>>(), ["epoch-1.json"]);
    }

    #[tokio::test]
    async fn a_file_under_another_epochs_name_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let bundles = Bundles::open(&format!("file://{}", folder.path().display()), Path::new("")).expect("a folder");
        bundles.put(&bundle(1, 100)).await.expect("put");
        fs::copy(folder.path().join("epoch-1.json"), folder.path().join("epoch-2.json")).expect("copied");
        let refused = bundles.get(2).await.expect_err("it is of epoch 1").to_string();
        assert!(refused.contains("epoch-2.json is of epoch 1"), "{refused}");
        let refused = bundles.manifest(2).await.expect_err("it is of epoch 1").to_string();
        assert!(refused.contains("epoch-2.json does not begin with the manifest of epoch 2"), "{refused}");
    }

    /// Answers one request with these bytes.
    fn serve(answer: Vec<u8>) -> String {
        let door = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}/epoch-1.json?signature=SECRET", door.local_addr().expect("an address"));
        std::thread::spawn(move || {
            let (mut stream, _) = door.accept().expect("somebody asks");
            let _request = stream.read(&mut [0; 4096]).expect("a request");
            stream.write_all(&answer).expect("answered");
        });
        url
    }

    #[tokio::test]
    async fn a_bundle_is_read_from_its_url_and_nothing_else_is() {
        let json = bundle(1, 100).to_json();
        let answer = |length: u64| format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
        let whole = [answer(json.len() as u64).as_bytes(), &json].concat();
        assert_eq!(fetch(&serve(whole.clone())).await.expect("a bundle").to_json(), json);
        let missing = b"HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".to_vec();
        let cut_off = whole[..whole.len() - 9].to_vec();
        let endless = answer(BUNDLE_BYTES_MAX + 1).into_bytes();
        for (answer, says) in [(missing, "404"), (cut_off, "cannot be read"), (endless, "more than 4294967296 bytes")] {
            let refused = fetch(&serve(answer)).await.expect_err(says).to_string();
            assert!(refused.contains(says) && !refused.contains("SECRET"), "{refused}");
        }
    }

    #[tokio::test]
    async fn a_place_that_cannot_be_used_is_named() {
        for url in ["ftp://host/x", "relative", "file://host/x", "s3:"] {
            let refused = Bundles::open(url, Path::new("")).expect_err(url).to_string();
            assert!(refused.starts_with("settlement.bundles_url must be s3://"), "{refused}");
        }
        let file = tempfile::NamedTempFile::new().expect("a file");
        let refused = Bundles::open("", file.path()).expect_err("no folder").to_string();
        assert!(refused.contains(&file.path().display().to_string()), "{refused}");
    }
}
