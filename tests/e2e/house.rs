//! The house: who may import whom, and what every file keeps to.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use coalmine_tests::process::repository;

/// The floor of each package: imports go down only.
const FLOORS: [(&str, &str, u32); 5] = [
    ("coalmine-proto", "proto", 0),
    ("coalmine-judge", "aggregator/judge", 1),
    ("coalmine-agent", "agent", 2),
    ("coalmine-aggregator", "aggregator", 3),
    ("coalmine-tests", "tests", 4),
];

fn rust_files(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

#[test]
fn imports_go_down_only() {
    let floors: BTreeMap<_, _> = FLOORS.iter().map(|(name, _, floor)| (*name, *floor)).collect();
    for (name, directory, floor) in FLOORS {
        let manifest = fs::read_to_string(repository().join(directory).join("Cargo.toml")).unwrap();
        let imported = floors.iter().filter(|(other, _)| {
            manifest.lines().any(|line| {
                let dependency = line.split(['.', ' ', '=']).next();
                dependency == Some(**other)
            })
        });
        for (other, below) in imported {
            assert!(
                *below < floor,
                "{name} (floor {floor}) imports {other} (floor {below})"
            );
            // The agent knows neither the judge nor the aggregator.
            assert!(
                name != "coalmine-agent" || *other == "coalmine-proto",
                "{name} imports {other}"
            );
        }
    }
}

#[test]
fn the_judge_has_no_runtime_and_no_system() {
    let manifest = fs::read_to_string(repository().join("aggregator/judge/Cargo.toml")).unwrap();
    let dependencies = manifest
        .split("[dependencies]")
        .nth(1)
        .unwrap()
        .split("[dev-dependencies]")
        .next()
        .unwrap();
    for banned in ["tokio", "hyper", "tonic", "rustix", "tracing", "rand"] {
        assert!(!dependencies.contains(banned), "the judge depends on {banned}");
    }
    let mut files = Vec::new();
    rust_files(&repository().join("aggregator/judge/src"), &mut files);
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let product = text.split("#[cfg(test)]").next().unwrap();
        for banned in [
            "f64",
            "f32",
            "std::fs",
            "std::net",
            "std::time",
            "std::thread",
            "HashMap",
            "HashSet",
        ] {
            assert!(!product.contains(banned), "{} has {banned}", file.display());
        }
    }
}

#[test]
fn files_are_small_and_have_an_owner() {
    let mut files = Vec::new();
    for directory in [
        "proto/src",
        "agent/src",
        "aggregator/src",
        "aggregator/judge/src",
        "tests/src",
        "tests/e2e",
        "tests/kubernetes",
        "tests/simulation",
    ] {
        rust_files(&repository().join(directory), &mut files);
    }
    for file in files {
        let name = file.display();
        if file.components().any(|part| part.as_os_str() == "generated") {
            continue;
        }
        assert!(
            file.file_name().is_some_and(|name| name != "mod.rs"),
            "{name}: a module is named after itself"
        );
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.starts_with("//!"), "{name} does not say what it owns");
        let product = text.split("#[cfg(test)]").next().unwrap();
        assert!(product.lines().count() <= 750, "{name} has grown two jobs");
        for left in ["todo!(", "unimplemented!(", "FIXME", "dbg!("] {
            assert!(!product.contains(left), "{name} has {left}");
        }
    }
}

#[test]
fn the_documents_are_there_and_short_enough() {
    let read = |name: &str| {
        fs::read_to_string(repository().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    let architecture = read("ARCHITECTURE.md");
    assert!(
        architecture.lines().count() <= 200,
        "ARCHITECTURE.md has {} lines",
        architecture.lines().count()
    );
    for part in ["Bird's eye", "Life of a request", "Code map", "Invariants"] {
        assert!(architecture.contains(part), "ARCHITECTURE.md has no {part:?}");
    }
    let readme = read("README.md");
    assert!(readme.contains("make demo") && readme.contains("make test"));
    assert!(read("LICENSE").contains("Apache License"));
    assert!(read(".ci/run").contains("make test"));
    read(".dockerignore");
    // Every package's directory is on the code map.
    for (_, directory, _) in FLOORS {
        assert!(
            architecture.contains(directory),
            "ARCHITECTURE.md does not mention {directory}"
        );
    }
}

#[test]
fn the_policies_that_we_show_are_valid() {
    let readme = fs::read_to_string(repository().join("README.md")).unwrap();
    let quoted = readme
        .split("```yaml\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next())
        .unwrap();
    let shipped = fs::read_to_string(repository().join("deploy/base/sla.yaml")).unwrap();
    for policy in [quoted, &shipped] {
        if let Err(error) = coalmine_judge::policy::Policy::parse(policy) {
            panic!("{error}\n{policy}");
        }
    }
}
