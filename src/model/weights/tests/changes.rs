//! Files that change, and loads that are given up.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::files::shorten;
use super::{Entry, Folder, assorted, host, quietly};
use crate::model::weights::{WeightPlan, digest_file, digest_region, load};
use crate::model::{ModelError, ModelFile};
use crate::tensor::{CastRule, DType};

const MEBIBYTE: u64 = 1 << 20;

/// A file that takes more than one report of progress, and its plan.
fn large(folder: &Folder) -> (ModelFile, WeightPlan) {
    let entries = ["a", "b", "c"].map(|key| Entry::filled(key, DType::U8, &[8 * MEBIBYTE + 3]));
    let file = folder.write("file", &entries, 0);
    let plan = WeightPlan::of_file(&file, &CastRule::stored(), 64).unwrap();
    (file, plan)
}

#[test]
fn a_file_that_is_shortened_while_it_is_read_is_an_error() {
    let folder = Folder::new();
    for after in [0, 5 * MEBIBYTE] {
        let (file, plan) = large(&folder);
        let cut = |done, _| {
            if done >= after {
                shorten(file.path(), 4096);
            }
        };
        let error = load(&file, &plan, &host(&plan), &cut, &|| false).unwrap_err();
        assert!(matches!(error, ModelError::Changed { .. }), "{error}");
        let (file, _) = large(&folder);
        let cut = |done, _| {
            if done >= after {
                shorten(file.path(), 4096);
            }
        };
        let error = digest_file(&file, &cut, &|| false).unwrap_err();
        assert!(matches!(error, ModelError::Changed { .. }), "{error}");
    }
}

/// Loads while `change` is done to the file, once, after the first bytes.
fn changed(folder: &Folder, change: impl Fn(&ModelFile) + Sync) -> ModelError {
    let (file, plan) = large(folder);
    let changed = AtomicU64::new(0);
    let progress = |done, _| {
        if done > 0 && changed.fetch_add(1, Ordering::Relaxed) == 0 {
            change(&file);
        }
    };
    load(&file, &plan, &host(&plan), &progress, &|| false).unwrap_err()
}

#[test]
fn a_file_that_is_replaced_or_written_to_while_it_is_read_is_an_error() {
    let folder = Folder::new();
    let error = changed(&folder, |file| {
        std::fs::copy(file.path(), folder.path("new")).unwrap();
        std::fs::rename(folder.path("new"), file.path()).unwrap();
    });
    assert!(matches!(error, ModelError::Changed { .. }), "replaced: {error}");
    let error = changed(&folder, |file| std::fs::remove_file(file.path()).unwrap());
    assert!(matches!(error, ModelError::Changed { .. }), "removed: {error}");
    let error = changed(&folder, |file| {
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(1);
        std::fs::File::options().write(true).open(file.path()).unwrap().set_modified(later).unwrap();
    });
    assert!(matches!(error, ModelError::Changed { .. }), "written to: {error}");
}

#[test]
fn a_file_that_changed_before_is_not_read_at_all() {
    let folder = Folder::new();
    let (file, plan) = large(&folder);
    std::fs::write(folder.path("new"), "").unwrap();
    std::fs::rename(folder.path("new"), file.path()).unwrap();
    let reported = AtomicU64::new(0);
    let progress = |_, _| _ = reported.fetch_add(1, Ordering::Relaxed);
    let error = load(&file, &plan, &host(&plan), &progress, &|| false).unwrap_err();
    assert!(matches!(error, ModelError::Changed { .. }), "{error}");
    assert_eq!(reported.into_inner(), 0);
}

#[test]
fn a_load_is_given_up_within_a_chunk() {
    let folder = Folder::new();
    let (file, plan) = large(&folder);
    let region = host(&plan);
    quietly(&file, &plan, &region).unwrap();
    for after in [0, 3] {
        let limit = |asked: &AtomicU64| asked.fetch_add(1, Ordering::Relaxed) >= after;
        let (first, second, third) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let loaded = load(&file, &plan, &host(&plan), &|_, _| {}, &|| limit(&first));
        assert!(matches!(loaded, Err(ModelError::Cancelled)));
        assert!(matches!(digest_file(&file, &|_, _| {}, &|| limit(&second)), Err(ModelError::Cancelled)));
        assert!(matches!(digest_region(&plan, &region, &|| limit(&third)), Err(ModelError::Cancelled)));
        for asked in [first, second, third] {
            assert!(asked.into_inner() <= after + 4, "each thread asks at most once more");
        }
    }
}

#[test]
fn progress_grows_to_the_end_and_is_not_told_byte_by_byte() {
    let folder = Folder::new();
    let (file, plan) = large(&folder);
    let total = 3 * (8 * MEBIBYTE + 3);
    let heard = Mutex::new(Vec::new());
    load(&file, &plan, &host(&plan), &|done, all| heard.lock().push((done, all)), &|| false).unwrap();
    let heard = heard.into_inner();
    assert!(heard.iter().all(|&(_, all)| all == total) && heard.is_sorted());
    assert_eq!((heard.first(), heard.last()), (Some(&(0, total)), Some(&(total, total))));
    assert!((3..=8).contains(&heard.len()), "{heard:?}");
    // A set that ends before the first report is still reported whole.
    let small = folder.write("small", &assorted()[1..2], 0);
    let last = AtomicU64::new(0);
    digest_file(&small, &|done, _| last.store(done, Ordering::Relaxed), &|| false).unwrap();
    assert_eq!(last.into_inner(), 74);
}
