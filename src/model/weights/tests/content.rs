use super::{Entry, Folder, assorted, digest, host, mixed_rule, quietly};
use crate::id::ContentDigest;
use crate::model::weights::{WeightPlan, digest_file, digest_region};
use crate::tensor::{CastRule, DType};

/// The definition, written down once more.
fn naive(entries: &[Entry]) -> ContentDigest {
    let mut sorted: Vec<&Entry> = entries.iter().collect();
    sorted.sort_by(|one, other| one.key.cmp(&other.key));
    let mut encoded = (sorted.len() as u64).to_le_bytes().to_vec();
    for entry in sorted {
        for text in [&*entry.key, entry.dtype.name()] {
            encoded.extend((text.len() as u64).to_le_bytes());
            encoded.extend(text.as_bytes());
        }
        encoded.extend((entry.shape.len() as u64).to_le_bytes());
        entry.shape.iter().for_each(|extent| encoded.extend(extent.to_le_bytes()));
        encoded.extend(blake3::hash(&entry.bytes).as_bytes());
    }
    ContentDigest(blake3::derive_key("luna-broker 2026 content of a set of tensors, version 1", &encoded))
}

#[test]
fn the_digest_is_the_one_that_is_written_down() {
    assert_eq!(digest(&assorted()), naive(&assorted()));
    // Peers of another version compare digests with this one: it changes only with the version in the domain.
    let known = digest(&[Entry::filled("a.weight", DType::F16, &[2, 3])]);
    assert_eq!(known.to_string(), "cae8ceb245b03ec93d38a85ca74fc9d117a8e9ecc5704fc52395f1e13764e1da");
}

#[test]
fn every_part_of_a_tensor_counts() {
    let base = vec![Entry::filled("a", DType::F16, &[2, 3]), Entry::filled("b", DType::U8, &[4])];
    let with = |change: fn(&mut Vec<Entry>)| {
        let mut entries = base.clone();
        change(&mut entries);
        digest(&entries)
    };
    let mut seen = vec![
        digest(&base),
        with(|entries| entries[0].key = "A".into()),
        with(|entries| entries[0].dtype = DType::Bf16),
        with(|entries| entries[0].shape = vec![3, 2]),
        with(|entries| entries[0].shape = vec![6]),
        with(|entries| entries[0].shape = vec![2, 3, 1]),
        with(|entries| entries.truncate(1)),
        with(|entries| {
            let (one, other) = entries.split_at_mut(1);
            std::mem::swap(&mut one[0].key, &mut other[0].key);
        }),
    ];
    for at in 0..base[0].bytes.len() {
        let mut entries = base.clone();
        entries[0].bytes[at] ^= 0x80;
        seen.push(digest(&entries));
    }
    let count = seen.len();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), count);
}

#[test]
fn order_and_place_do_not_count() {
    let folder = Folder::new();
    let mut entries = assorted();
    let expected = digest(&entries);
    for (name, padding, alignment) in [("one", 0, 64), ("other", 5, 512)] {
        entries.reverse();
        assert_eq!(digest(&entries), expected);
        let file = folder.write(name, &entries, padding);
        assert_eq!(digest_file(&file, &|_, _| {}, &|| false).unwrap(), expected);
        let plan = WeightPlan::of_file(&file, &CastRule::stored(), alignment).unwrap();
        let region = host(&plan);
        let loaded = quietly(&file, &plan, &region).unwrap();
        assert_eq!((loaded.source, loaded.content), (expected, expected));
        assert_eq!(digest_region(&plan, &region, &|| false).unwrap(), expected);
    }
}

#[test]
fn a_byte_that_is_written_later_is_noticed() {
    let folder = Folder::new();
    let file = folder.write("file", &assorted(), 0);
    let plan = WeightPlan::of_file(&file, &mixed_rule(), 64).unwrap();
    let region = host(&plan);
    let loaded = quietly(&file, &plan, &region).unwrap();
    assert_ne!(loaded.source, loaded.content);
    assert_eq!(digest_region(&plan, &region, &|| false).unwrap(), loaded.content);
    let last = plan.tensors.last().unwrap();
    let at = last.offset as usize + last.meta.size_bytes().unwrap() - 1;
    let mut byte = [0];
    region.copy_out(at, &mut byte).unwrap();
    region.copy_in(at, &[byte[0] ^ 1]).unwrap();
    assert_ne!(digest_region(&plan, &region, &|| false).unwrap(), loaded.content);
}
