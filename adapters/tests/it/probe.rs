//! An adapter is tried before it is published, or it is not published.

use std::sync::{Arc, Mutex};

use openlora_adapters::{AdapterError, Probe, inspect_folder};
use openlora_types::{AdapterWeights, Classify, Fault, Generation, InvalidField, Limits};
use tempfile::TempDir;

use crate::make::{Adapter, Bench, actor, alias, open, shape};

/// Refuses what its rule refuses, and remembers what it was shown.
struct Rule {
    rule: fn(&AdapterWeights) -> Result<(), AdapterError>,
    shown: Arc<Mutex<Vec<Generation>>>,
}

impl Probe for Rule {
    fn probe(&mut self, weights: &AdapterWeights) -> Result<(), AdapterError> {
        self.shown.lock().expect("one thread").push(weights.generation);
        (self.rule)(weights)
    }
}

/// A store that tries adapters by `rule`, and what its probe was shown.
fn bench(rule: fn(&AdapterWeights) -> Result<(), AdapterError>) -> (Bench, Arc<Mutex<Vec<Generation>>>) {
    let dir = TempDir::new().expect("a temporary folder");
    std::fs::create_dir_all(dir.path().join("root")).expect("the root is created");
    let shown = Arc::new(Mutex::new(Vec::new()));
    let probe = Rule { rule, shown: Arc::clone(&shown) };
    let store = open(dir.path(), Limits::default(), 1_000).with_probe(Box::new(probe));
    (Bench { store, dir }, shown)
}

fn small_ranks_only(weights: &AdapterWeights) -> Result<(), AdapterError> {
    let why = "is served 3 nats from its reference, more than 0.5";
    if weights.rank_max() > 2 { Err(InvalidField::new("the probe", why).into()) } else { Ok(()) }
}

#[test]
fn an_adapter_that_fails_the_probe_is_refused_and_leaves_nothing_behind() {
    let (bench, shown) = bench(small_ranks_only);
    let path = bench.write("bad", &Adapter::qv(3, 1));
    let error = bench.store.register_folder(&alias("bad"), &path, &actor("acme"), false).expect_err("refused");
    assert_eq!((error.fault(), error.is_retryable()), (Fault::Client, false));
    assert!(error.to_string().contains("3 nats") && error.to_string().contains("0.5"), "{error}");
    assert_eq!((bench.staged(), bench.generations(), bench.store.stats().registered), (0, 0, 0));
    assert!(matches!(bench.store.resolve("bad"), Err(AdapterError::NotFound { .. })));

    let mut upload = bench.store.begin_upload(&alias("bad"), &actor("acme"), false).expect("begun");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        upload.write(name, &std::fs::read(path.join(name)).expect("written above")).expect("stored");
    }
    upload.finish().expect_err("refused in whatever way it comes");
    assert_eq!((bench.staged(), bench.generations(), bench.store.stats().registered), (0, 0, 0));
    assert_eq!(shown.lock().expect("one thread").len(), 2);
}

#[test]
fn what_is_tried_is_what_is_registered_and_replacing_an_adapter_tries_the_new_one() {
    let (bench, shown) = bench(small_ranks_only);
    let (good, bad) = (bench.write("good", &Adapter::qv(2, 1)), bench.write("bad", &Adapter::qv(3, 1)));
    let info = bench.store.register_folder(&alias("a"), &good, &actor("acme"), false).expect("passes");
    let inspected = inspect_folder(&good, &shape(), &Limits::default()).expect("a folder").generation;
    assert_eq!(
        (Some(info.generation.to_string()), &shown.lock().expect("one thread")[..]),
        (inspected, &[info.generation][..])
    );
    bench.store.register_folder(&alias("a"), &bad, &actor("acme"), true).expect_err("refused");
    assert_eq!(bench.info("a"), info, "the alias stands for what passed");
    bench.load("a").expect("served without being tried again");
    assert_eq!(shown.lock().expect("one thread").len(), 2);
}

#[test]
fn only_what_every_other_check_accepts_is_tried() {
    let (bench, shown) = bench(small_ranks_only);
    let mut unknown = Adapter::qv(2, 1);
    unknown.tensor("model.layers.0.self_attn.q_proj.lora_C.weight", &[2, 8]);
    let mut infinite = Adapter::qv(2, 1);
    infinite.find("lora_A.weight").bytes[..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    for (name, adapter) in [("unknown", unknown), ("infinite", infinite), ("large", Adapter::qv(8, 1))] {
        let path = bench.write(name, &adapter);
        bench.store.register_folder(&alias(name), &path, &actor("acme"), false).expect_err(name);
    }
    assert_eq!(shown.lock().expect("one thread").len(), 0);
}

#[test]
fn a_probe_that_fails_itself_is_nobodys_wrong_adapter() {
    let (bench, _) = bench(|_| Err(AdapterError::Probe { reason: "no memory".into() }));
    let path = bench.write("good", &Adapter::qv(2, 1));
    let error = bench.store.register_folder(&alias("good"), &path, &actor("acme"), false).expect_err("not tried");
    assert_eq!((error.fault(), error.is_retryable()), (Fault::Server, true), "{error}");
    assert_eq!((bench.staged(), bench.generations()), (0, 0));
}
