//! What a path, a folder or an upload may not do.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};

use openlora_adapters::{AdapterError, inspect_folder};
use openlora_types::{Classify, Fault, Limits};

use crate::make::{Adapter, Bench, actor, alias, shape};

fn refusal(bench: &Bench, path: &Path) -> String {
    let error = bench.store.register_folder(&alias("a"), path, &actor("o"), false).expect_err("refused");
    assert!(matches!(error, AdapterError::Invalid(_)), "{error}");
    assert_eq!((bench.staged(), bench.generations(), bench.store.stats().registered), (0, 0, 0), "after {error}");
    error.to_string()
}

#[test]
fn a_path_outside_the_allowed_roots_is_refused_whatever_it_looks_like() {
    let bench = Bench::new();
    let inside = bench.write("good", &Adapter::qv(2, 1));
    let outside = bench.dir.path().join("outside");
    Adapter::qv(2, 1).write(&outside);
    let root = bench.dir.path().join("root");
    symlink(&outside, root.join("escape")).expect("a link is made");
    symlink(bench.dir.path(), root.join("up")).expect("a link is made");
    let mut answers = Vec::new();
    for path in [
        outside.clone(),
        root.join("../outside"),
        root.join("good/../../outside"),
        root.join("escape"),
        root.join("up/outside"),
        root.join("missing"),
        root.join("good/adapter_config.json"),
        PathBuf::from("good"),
        PathBuf::from("~/good"),
        PathBuf::from(""),
        PathBuf::from("/etc"),
    ] {
        answers.push(refusal(&bench, &path));
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "the answers tell which paths exist: {answers:?}");
    bench.store.register_folder(&alias("a"), &inside, &actor("o"), false).expect("the one inside");
    // A link that stays under the root is an ordinary path.
    symlink(&inside, root.join("also")).expect("a link is made");
    bench.store.register_folder(&alias("b"), &root.join("also"), &actor("o"), false).expect("a link within the root");
}

#[test]
fn a_folder_that_holds_anything_but_its_own_regular_files_is_refused() {
    let bench = Bench::new();
    let elsewhere = bench.dir.path().join("elsewhere");
    Adapter::qv(2, 1).write(&elsewhere);
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let path = bench.write(&format!("link-{name}"), &Adapter::qv(2, 1));
        fs::remove_file(path.join(name)).expect("removed");
        symlink(elsewhere.join(name), path.join(name)).expect("a link is made");
        let text = refusal(&bench, &path);
        assert!(text.contains(name) && text.contains("symbolic link"), "{text}");

        let path = bench.write(&format!("none-{name}"), &Adapter::qv(2, 1));
        fs::remove_file(path.join(name)).expect("removed");
        let text = refusal(&bench, &path);
        assert!(text.contains(name) && text.contains("missing"), "{text}");

        fs::create_dir(path.join(name)).expect("a folder in the file's place");
        let text = refusal(&bench, &path);
        assert!(text.contains(name) && text.contains("regular file"), "{text}");

        fs::remove_dir(path.join(name)).expect("removed");
        let made = Command::new("mkfifo").arg(path.join(name)).status().expect("mkfifo runs");
        assert!(made.success());
        let text = refusal(&bench, &path);
        assert!(text.contains(name) && text.contains("regular file"), "{text}");
    }
    let path = bench.write("readme", &Adapter::qv(2, 1));
    symlink("/etc/hostname", path.join("README.md")).expect("a link is made");
    assert!(refusal(&bench, &path).contains("README.md"));
    assert!(inspect_folder(&path, &shape(), &Limits::default()).is_err(), "inspect says otherwise than register");
}

#[test]
fn pickled_weights_are_never_opened_and_the_conversion_is_named() {
    let bench = Bench::new();
    let path = bench.write("pickle", &Adapter::qv(2, 1));
    fs::rename(path.join("adapter_model.safetensors"), path.join("adapter_model.bin")).expect("renamed");
    // A pipe would hang whoever opened it.
    fs::remove_file(path.join("adapter_model.bin")).expect("removed");
    assert!(Command::new("mkfifo").arg(path.join("adapter_model.bin")).status().expect("mkfifo runs").success());
    let text = refusal(&bench, &path);
    assert!(text.contains("adapter_model.bin") && text.contains("save_file"), "{text}");
    Adapter::qv(2, 1).write(&path);
    bench.store.register_folder(&alias("a"), &path, &actor("o"), false).expect("the safetensors beside it are used");
}

#[test]
fn files_over_their_limits_are_refused_before_they_are_read() {
    let limits = Limits { adapter_bytes_max: 500, adapter_config_bytes_max: 200, ..Limits::default() };
    let bench = Bench::with(limits, 1 << 20);
    let path = bench.write("big", &Adapter::qv(2, 1));
    assert!(refusal(&bench, &path).contains("adapter_bytes_max is 500"));
    fs::write(path.join("adapter_config.json"), " ".repeat(201)).expect("written");
    assert!(refusal(&bench, &path).contains("adapter_config_bytes_max is 200"));
    // A sparse file of a terabyte costs nothing to refuse.
    let file = fs::File::options().write(true).open(path.join("adapter_config.json")).expect("opened");
    file.set_len(1 << 40).expect("sparse");
    assert!(refusal(&bench, &path).contains("1099511627776 bytes"));
}

#[test]
fn files_swapped_during_the_load_never_become_an_adapter_that_was_not_verified() {
    let bench = Bench::new();
    let (one, two) = (Adapter::qv(2, 1), Adapter::qv(2, 2));
    let path = bench.write("swapped", &one);
    let (one, two) = (one.tensor_bytes(), two.tensor_bytes());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let target = path.join("adapter_model.safetensors");
            let mut turn = 0;
            while !done.load(Ordering::Relaxed) {
                turn += 1;
                match turn % 4 {
                    0 => fs::write(&target, &one).expect("written"),
                    1 => fs::write(&target, &two).expect("written"),
                    2 => fs::write(&target, &one[..one.len() / 2]).expect("written"),
                    _ => {
                        let _gone = fs::remove_file(&target);
                        symlink("/etc/hostname", &target).expect("a link is made");
                        fs::remove_file(&target).expect("removed");
                    }
                }
            }
        });
        for i in 0..200 {
            let name = format!("a{i}");
            if let Ok(info) = bench.store.register_folder(&alias(&name), &path, &actor("o"), true) {
                let lease = bench.store.resolve(&name).expect("what was registered can be read");
                assert_eq!(lease.generation(), info.generation);
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(bench.staged(), 0);
}

#[test]
fn an_upload_becomes_the_adapter_that_a_folder_would() {
    let bench = Bench::new();
    let adapter = Adapter::qv(2, 1);
    let path = bench.write("same", &adapter);
    let mut upload = bench.store.begin_upload(&alias("up"), &actor("o"), false).expect("begun");
    for piece in adapter.tensor_bytes().chunks(7) {
        upload.write("adapter_model.safetensors", piece).expect("written");
    }
    for piece in adapter.config_bytes().chunks(5) {
        upload.write("adapter_config.json", piece).expect("written");
    }
    let uploaded = upload.finish().expect("finished");
    let registered = bench.store.register_folder(&alias("reg"), &path, &actor("o"), false).expect("registered");
    assert_eq!(uploaded.generation, registered.generation);
    assert_eq!((bench.generations(), bench.staged()), (1, 0));
}

#[test]
fn an_upload_writes_only_its_two_files_and_each_once() {
    let limits = Limits { adapter_config_bytes_max: 64, uploads_max: 2, ..Limits::default() };
    let bench = Bench::with(limits, 1 << 20);
    let begin = |name: &str| bench.store.begin_upload(&alias(name), &actor("o"), false);
    for file in [
        "../adapter_config.json",
        "/etc/passwd",
        "adapter_config.json/x",
        "README.md",
        "",
        "a\0b",
        "ADAPTER_CONFIG.JSON",
    ] {
        let mut upload = begin("a").expect("begun");
        let error = upload.write(file, b"x").expect_err(file);
        assert!(error.to_string().starts_with("chunk.file is"), "{error}");
    }
    let pickle = begin("a").expect("begun").write("adapter_model.bin", b"x").expect_err("a pickle");
    assert!(pickle.to_string().contains("save_file"), "{pickle}");

    let mut upload = begin("a").expect("begun");
    upload.write("adapter_config.json", b"{").expect("the first file");
    upload.write("adapter_model.safetensors", b"x").expect("the second file");
    let back = upload.write("adapter_config.json", b"}").expect_err("back to the first");
    assert!(back.to_string().contains("follow each other"), "{back}");
    drop(upload);

    let mut upload = begin("a").expect("begun");
    upload.write("adapter_config.json", &[b' '; 40]).expect("40 bytes");
    let over = upload.write("adapter_config.json", &[b' '; 40]).expect_err("80 bytes");
    assert!(over.to_string().contains("adapter_config_bytes_max is 64"), "{over}");

    let second = begin("b").expect("two at once");
    let third = begin("c").err().expect("not three");
    assert!(third.is_retryable() && third.to_string().contains("uploads_max is 2"), "{third}");
    drop((upload, second));
    let empty = begin("c").expect("again two").finish().expect_err("no files");
    assert!(empty.to_string().contains("missing"), "{empty}");
    assert_eq!((bench.staged(), bench.generations(), bench.store.stats().registered), (0, 0, 0));
}

#[test]
fn refusals_are_the_clients_doing_and_a_failing_disk_is_not() {
    let bench = Bench::new();
    let bad = bench.store.register_folder(&alias("a"), Path::new("x"), &actor("o"), false).expect_err("relative");
    assert_eq!((bad.fault(), bad.is_retryable()), (Fault::Client, false));
    let path = bench.write("good", &Adapter::qv(2, 1));
    // A file where the staging folder must be: the disk refuses, as one that is read-only would, whoever runs the test.
    fs::remove_dir(bench.data().join("staging")).expect("removed");
    fs::write(bench.data().join("staging"), "").expect("written");
    let disk = bench.store.register_folder(&alias("a"), &path, &actor("o"), false).expect_err("no staging");
    assert!(matches!(disk, AdapterError::Io { .. }), "{disk}");
    assert!(!disk.to_string().contains("/"), "a path of the server's shows: {disk}");
    assert_eq!((disk.fault(), disk.is_retryable()), (Fault::Server, true));
    assert_eq!((bench.generations(), bench.store.stats().registered), (0, 0));
}
