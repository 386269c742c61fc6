//! Holds the workspace to ARCHITECTURE.md: who imports whom, where `unsafe` may stand, what every room says of itself.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Room → rooms it may import. `*` may import all.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("types", &[]),
    ("proto", &[]),
    ("kernels", &["types"]),
    ("scheduler", &["types"]),
    ("database", &["types"]),
    ("adapters", &["types", "database"]),
    ("ledger", &["types", "database"]),
    ("settlement", &["types", "database", "ledger"]),
    ("model", &["types", "kernels"]),
    ("engine", &["types", "kernels", "scheduler", "adapters", "model"]),
    ("server", &["types", "proto", "engine", "model", "adapters", "ledger"]),
    ("benches", &["*"]),
    ("cli", &["*"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package is in the workspace").to_owned()
}

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("a folder of the workspace") {
        let path = entry.expect("a folder entry").path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn rooms_import_only_what_the_table_allows() {
    let metadata = MetadataCommand::new().current_dir(root()).no_deps().other_options(vec!["--offline".into()]).exec();
    let metadata = metadata.expect("cargo metadata");
    let members = metadata.workspace_packages();
    let room_of = |name: &str| name.strip_prefix("openlora-").map(str::to_owned);
    let rooms: BTreeSet<_> = members.iter().filter_map(|package| room_of(package.name.as_str())).collect();
    let table: BTreeSet<_> = MAY_IMPORT.iter().map(|(room, _)| (*room).to_owned()).collect();
    assert_eq!(rooms, table, "every room has a row in the table and every row a room");

    for package in members {
        let room = room_of(package.name.as_str()).expect("checked above");
        let (_, allowed) = MAY_IMPORT.iter().find(|(name, _)| *name == room).expect("checked above");
        let imports = package.dependencies.iter().filter(|dependency| dependency.kind == DependencyKind::Normal);
        for imported in imports.filter_map(|dependency| room_of(&dependency.name)) {
            let fine = allowed.contains(&"*") || allowed.contains(&imported.as_str());
            assert!(fine, "{room} imports {imported}; ARCHITECTURE.md does not allow it");
        }
    }
}

#[test]
fn architecture_page_and_test_hold_the_same_table() {
    let page = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    for (room, allowed) in MAY_IMPORT {
        let rows = page.lines().skip_while(|line| !line.starts_with("| room | may import |"));
        let row = rows.skip(2).take_while(|line| line.starts_with('|')).find(|line| {
            let rooms = line.split('|').nth(1).unwrap_or_default();
            rooms.split(',').any(|name| name.trim() == *room)
        });
        let row = row.unwrap_or_else(|| panic!("ARCHITECTURE.md has no row for {room}"));
        let cell = row.split('|').nth(2).unwrap_or_default();
        let said: BTreeSet<_> = cell.split(',').filter_map(|name| name.split_whitespace().next()).collect();
        let expected: BTreeSet<_> = match allowed {
            [] => ["nothing"].into(),
            ["*"] => ["all"].into(),
            some => some.iter().copied().collect(),
        };
        assert_eq!(said, expected, "{room}");
    }
}

#[test]
fn unsafe_code_is_in_kernels_only_and_every_room_says_what_it_is_for() {
    for (room, _) in MAY_IMPORT {
        let manifest = std::fs::read_to_string(root().join(room).join("Cargo.toml")).expect("a manifest");
        let inherits = manifest.contains("[lints]\nworkspace = true");
        assert_eq!(
            inherits,
            *room != "kernels",
            "{room}: only kernels has lints of its own (it alone has unsafe code)"
        );
        let crate_root = if *room == "cli" { "main.rs" } else { "lib.rs" };
        let text = std::fs::read_to_string(root().join(room).join("src").join(crate_root)).expect("a crate root");
        assert!(text.starts_with("//!"), "{room} opens with a page on what it is for");
    }
    let workspace = std::fs::read_to_string(root().join("Cargo.toml")).expect("Cargo.toml");
    assert!(workspace.contains("unsafe_code = \"forbid\""));
}

#[test]
fn no_file_outgrows_its_reader() {
    let mut files = Vec::new();
    for (room, _) in MAY_IMPORT {
        rust_files(&root().join(room), &mut files);
    }
    assert!(files.len() > 50, "the walk found the sources");
    for file in files {
        let lines = std::fs::read_to_string(&file).expect("a source file").lines().count();
        assert!(lines <= 900, "{} has {lines} lines: is it still one subject?", file.display());
    }
}
