//! Which libraries the loader must find before a program or library can be used.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use object::Endianness;
use object::elf::{DT_NEEDED, DT_RPATH, DT_RUNPATH, DynamicTag, FileHeader64};
use object::read::elf::{Dyn, FileHeader};

/// What a file's dynamic section says.
struct Dynamic {
    needed: Vec<String>,
    /// Folders to look in first.
    search: Vec<PathBuf>,
}

fn read(path: &Path) -> Dynamic {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file: &FileHeader64<Endianness> = FileHeader64::parse(&*bytes).expect("an ELF file");
    let endian = file.endian().expect("an endianness");
    let sections = file.sections(endian, &*bytes).expect("sections");
    let (entries, strings) = sections.dynamic(endian, &*bytes).expect("readable").expect("a dynamic section");
    let strings = sections.strings(endian, &*bytes, strings).expect("its strings");
    let values = |tags: &[DynamicTag]| -> Vec<String> {
        let meant = entries.iter().filter(|entry| tags.contains(&entry.tag(endian)));
        meant
            .map(|entry| String::from_utf8_lossy(entry.string(endian, strings).expect("a name")).into_owned())
            .collect()
    };
    let origin = path.parent().expect("a file lies in a folder").to_string_lossy();
    let search = values(&[DT_RPATH, DT_RUNPATH]);
    let search = search.iter().flat_map(|folders| folders.split(':'));
    let search = search.map(|folder| folder.replace("${ORIGIN}", &origin).replace("$ORIGIN", &origin).into());
    Dynamic { needed: values(&[DT_NEEDED]), search: search.collect() }
}

/// Names of the libraries that the file itself asks for.
pub fn needs(path: &Path) -> Vec<String> {
    read(path).needed
}

/// Names of the libraries that the file asks for, and those ask for in their turn; each with who asked first.
pub fn all_needs(path: &Path) -> BTreeMap<String, PathBuf> {
    let system = folders_of_this_process();
    let mut found = BTreeMap::new();
    let mut unread = vec![path.to_owned()];
    while let Some(file) = unread.pop() {
        let Dynamic { needed, search } = read(&file);
        for name in needed {
            if found.contains_key(&name) {
                continue;
            }
            let folders = search.iter().chain(&system);
            let library = folders.map(|folder| folder.join(&name)).find(|library| library.is_file());
            unread.push(library.unwrap_or_else(|| panic!("{} needs {name}, which is not found", file.display())));
            found.insert(name, file.clone());
        }
    }
    found
}

/// Where the loader found this process's own libraries.
fn folders_of_this_process() -> BTreeSet<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("this process's mappings");
    let files = maps.lines().filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..])));
    let libraries = files.filter(|file| file.to_string_lossy().contains(".so"));
    libraries.filter_map(|file| file.parent().map(Path::to_owned)).collect()
}
