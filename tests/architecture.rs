//! Imports point one way: shells, assemblies, seams, pure core, vocabulary.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const VOCABULARY: [&str; 6] = ["error", "id", "tensor", "service", "config", "metrics"];

/// What the files of each folder may import besides themselves and the vocabulary.
const ALLOWED: [(&str, &[&str]); 14] = [
    ("error", &[]),
    ("id", &[]),
    ("tensor", &[]),
    ("service", &[]),
    ("config", &[]),
    ("metrics", &[]),
    ("protocol", &[]),
    ("memory", &[]),
    ("lane", &[]),
    ("device", &[]),
    ("transport", &[]),
    ("model", &["device", "lane"]),
    ("client", &["protocol", "memory", "device", "transport"]),
    ("doctor", &["client", "protocol", "device", "transport"]),
];

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn files_below(path: &Path, found: &mut Vec<PathBuf>) {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            files_below(&entry.unwrap().path(), found);
        }
    } else if path.extension().is_some_and(|extension| extension == "rs") {
        found.push(path.to_owned());
    }
}

fn files_of(module: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    files_below(&source().join(format!("{module}.rs")), &mut found);
    if source().join(module).is_dir() {
        files_below(&source().join(module), &mut found);
    }
    found.retain(|path| path.exists() && !path.to_string_lossy().ends_with("tests.rs"));
    assert!(!found.is_empty(), "module {module} has no files");
    found
}

/// Modules of the crate that a file names, its inline tests left out.
fn imports(path: &Path) -> BTreeSet<String> {
    let text = std::fs::read_to_string(path).unwrap();
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut found = BTreeSet::new();
    for line in code {
        for part in line.split("crate::").skip(1) {
            found.insert(part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
        }
    }
    found
}

#[test]
fn modules_import_only_what_lies_below_them() {
    let mut wrong = Vec::new();
    for (module, allowed) in ALLOWED {
        for path in files_of(module) {
            for import in imports(&path) {
                let fine =
                    import == module || allowed.contains(&import.as_str()) || VOCABULARY.contains(&import.as_str());
                if !fine {
                    wrong.push(format!("{} imports {import}", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Whether a text has this word, and not only one that ends with it.
fn names(text: &str, word: &str) -> bool {
    let is_whole = |(at, _): (usize, &str)| {
        let before = text.get(..at).and_then(|before| before.chars().next_back());
        before.is_none_or(|before| !before.is_alphanumeric() && before != '_')
    };
    text.match_indices(word).any(is_whole)
}

#[test]
fn libraries_stay_in_the_modules_that_are_made_for_them() {
    let homes: [(&str, &[&str]); 7] = [
        ("tch::", &["model/torch"]),
        ("interprocess::", &["transport/local"]),
        ("shared_memory::", &["device/host"]),
        ("cudarc", &["device/cuda"]),
        ("rmp_serde", &["protocol/codec.rs"]),
        ("prometheus_client", &["metrics.rs"]),
        ("unsafe ", &["device", "transport/local", "model"]),
    ];
    let mut all = Vec::new();
    files_below(&source(), &mut all);
    for (library, folders) in homes {
        let users: Vec<_> = all.iter().filter(|path| names(&std::fs::read_to_string(path).unwrap(), library)).collect();
        assert!(!users.is_empty(), "{library} is used nowhere: drop it from this list");
        for user in users {
            let relative = user.strip_prefix(source()).unwrap().to_string_lossy().replace('\\', "/");
            assert!(folders.iter().any(|folder| relative.starts_with(folder)), "{relative} names {library}");
        }
    }
}
