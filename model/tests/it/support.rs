//! Models and adapters of the fixtures, on the checks that `openlora_model::conformance` has for every backend.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use openlora_adapters::{Actor, AdapterStore, BaseRows, StoreConfig};
use openlora_kernels::cpu::{Cpu, Isa};
use openlora_kernels::{Backend, Precision};
use openlora_model::{ModelFiles, conformance};
use openlora_types::{AdapterWeights, Alias, Limits, Module, Site};
use serde::Deserialize;

pub(crate) use openlora_model::conformance::{best, blocks_for, log_softmax};

pub(crate) type Adapter = <Cpu as Backend>::Adapter;
pub(crate) type Host<B = Cpu> = conformance::Host<B>;
pub(crate) type Case<'a, A = Adapter> = conformance::Case<'a, A>;
pub(crate) type Rows<'a, A = Adapter> = conformance::Rows<'a, A>;

pub(crate) fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(path)
}

/// SmolLM2-135M-Instruct.
pub(crate) fn real_model() -> PathBuf {
    let path = std::env::var_os("OPENLORA_TEST_MODEL").map_or_else(
        || {
            let home = std::env::var_os("HOME").expect("HOME is set");
            Path::new(&home).join(".cache/openlora/models/SmolLM2-135M-Instruct.Q4_1.gguf")
        },
        PathBuf::from,
    );
    assert!(path.is_file(), "{} is missing: run scripts/fetch-model.sh or set OPENLORA_TEST_MODEL", path.display());
    path
}

pub(crate) fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> T {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The subfolders of a fixture folder, by name.
pub(crate) fn folders(path: &str) -> Vec<String> {
    let entries = std::fs::read_dir(fixture(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("readable"))
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

/// Gives the adapters room the base rows it compares copies with.
struct Base(Arc<ModelFiles>);

impl BaseRows for Base {
    fn read_row(&self, module: Module, row: usize, out: &mut [f32]) {
        self.0.read_row(Site { layer: 0, module }, row, out);
    }
}

/// Parses a PEFT folder as a server would: registered in a store, then resolved.
pub(crate) fn read_adapter(path: &Path, files: &Arc<ModelFiles>) -> Arc<AdapterWeights> {
    let data = tempfile::tempdir().expect("temporary folder");
    let root = path.parent().expect("a folder beside others").canonicalize().expect("exists");
    let config = StoreConfig {
        data_dir: data.path().to_owned(),
        allowed_roots: vec![root.clone()],
        host_cache_bytes: 1 << 30,
        ..StoreConfig::default()
    };
    let limits = Limits::default();
    let store = AdapterStore::open(config, files.shape(), limits.clone()).expect("a fresh store opens");
    let store = store.with_base(Arc::new(Base(Arc::clone(files))));
    let alias = Alias::parse("alias", "adapter", &limits).expect("a plain name");
    let folder = root.join(path.file_name().expect("a named folder"));
    let actor = Actor { name: "tests".into(), admin: true };
    store.register_folder(&alias, &folder, &actor, false).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    store.resolve("adapter").expect("just registered").load().expect("just written")
}

/// A model on the CPU.
pub(crate) fn open(path: &Path, precision: Precision) -> Host {
    let backend = Arc::new(Cpu::new(2, precision, Isa::detect()).expect("threads start"));
    open_on(backend, path, |pages| pages.fill(f32::NAN))
}

/// A model on any backend; `poison` fills pages with NaN.
pub(crate) fn open_on<B: Backend>(backend: Arc<B>, path: &Path, poison: fn(&mut B::Pages)) -> Host<B> {
    let files =
        ModelFiles::open(path, &Limits::default()).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Host::new(backend, Arc::new(files), poison)
}

/// The PEFT adapter in a fixture folder, loaded.
pub(crate) fn load_adapter<B: Backend>(host: &Host<B>, folder: &str) -> B::Adapter {
    host.load(&read_adapter(&fixture(folder), host.files()))
}

/// All answers of a fixture's `expected.json`.
pub(crate) fn read_cases<'a, A>(answers: &str, adapter: Option<&'a A>) -> Vec<Case<'a, A>> {
    Case::read(&fixture(answers), adapter)
}
