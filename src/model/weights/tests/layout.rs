use proptest::prelude::*;

use super::{Folder, assorted, meta, mixed_rule};
use crate::error::ErrorKind;
use crate::model::weights::WeightPlan;
use crate::model::{ModelError, ModelFile};
use crate::tensor::{CastRule, DType, TensorMeta};

fn any_set() -> impl Strategy<Value = Vec<(String, TensorMeta)>> {
    let shape = prop::collection::vec(0u64..40, 0..4);
    let tensor = (prop::sample::select(&DType::ALL[..]), shape).prop_map(|(dtype, shape)| meta(dtype, &shape));
    prop::collection::btree_map("[a-c.]{1,4}", tensor, 1..20).prop_map(|set| set.into_iter().collect())
}

proptest! {
    #[test]
    fn tensors_are_aligned_apart_and_inside(
        (set, shuffled) in any_set().prop_flat_map(|set| (Just(set.clone()), Just(set).prop_shuffle())),
        alignment in prop::sample::select(&[1u64, 64, 512]),
    ) {
        let plan = WeightPlan::of_tensors(set.clone(), alignment).unwrap();
        prop_assert_eq!(&WeightPlan::of_tensors(shuffled, alignment).unwrap(), &plan, "the order makes no difference");
        prop_assert!(plan.size_bytes > 0 && plan.size_bytes.is_multiple_of(alignment));
        prop_assert_eq!(plan.tensors.len(), set.len());
        let mut owners = vec![None; plan.size_bytes as usize];
        for (key, meta) in &set {
            let planned = plan.tensor(key).unwrap();
            prop_assert_eq!((&planned.key, planned.meta, planned.stored), (key, *meta, meta.dtype));
            prop_assert_eq!(planned.offset % alignment, 0);
            for at in 0..meta.size_bytes().unwrap() {
                let owner = &mut owners[planned.offset as usize + at];
                prop_assert_eq!(owner.replace(key), None);
            }
        }
        prop_assert!(plan.tensors.is_sorted_by(|one, other| one.key < other.key));
    }
}

#[test]
fn a_file_is_laid_out_by_its_keys_whatever_their_order_and_place() {
    let folder = Folder::new();
    let mut entries = assorted();
    let plan = WeightPlan::of_file(&folder.write("one", &entries, 0), &mixed_rule(), 64).unwrap();
    entries.reverse();
    let other = WeightPlan::of_file(&folder.write("other", &entries, 13), &mixed_rule(), 64).unwrap();
    assert_eq!(plan, other);
    let types = |key| plan.tensor(key).map(|planned| (planned.stored, planned.meta.dtype));
    assert_eq!(types("vae.weight"), Some((DType::Bf16, DType::F32)));
    assert_eq!(types("unet.byte.weight"), Some((DType::F8E4M3Fn, DType::F8E4M3Fn)));
    assert_eq!(types("unet.other.weight"), Some((DType::F8E5M2, DType::F16)));
    assert_eq!(types("clip.ids"), Some((DType::I64, DType::I64)));
    assert_eq!(types("clip"), None);
}

#[test]
fn gaps_of_a_strided_tensor_are_not_shared() {
    let strided = TensorMeta::strided(DType::F32, meta(DType::F32, &[2, 2]).shape, meta(DType::F32, &[9, 1]).shape);
    let plan = WeightPlan::of_tensors([("a".to_owned(), strided.unwrap())], 4).unwrap();
    assert_eq!((plan.tensors[0].meta, plan.size_bytes), (meta(DType::F32, &[2, 2]), 16));
}

#[test]
fn a_set_of_empty_tensors_has_a_region_all_the_same() {
    let plan = WeightPlan::of_tensors([("a".to_owned(), meta(DType::F32, &[0, 4]))], 512).unwrap();
    assert_eq!((plan.tensors[0].offset, plan.size_bytes), (0, 512));
}

#[test]
fn sets_that_cannot_be_laid_out_are_refused_by_the_name_of_the_tensor() {
    let of = |set: Vec<(&str, TensorMeta)>| {
        WeightPlan::of_tensors(set.into_iter().map(|(key, meta)| (key.to_owned(), meta)), 64).unwrap_err()
    };
    assert!(matches!(of(vec![]), ModelError::EmptySet));
    let byte = meta(DType::U8, &[1]);
    let twice = of(vec![("b", byte), ("a", byte), ("b", byte)]);
    assert!(matches!(&twice, ModelError::DuplicateTensor { tensor } if tensor == "\"b\""), "{twice}");
    let vast = meta(DType::U8, &[1 << 62]);
    let beyond = of(vec![("a", vast), ("b", vast)]);
    assert!(matches!(&beyond, ModelError::WeightShape { tensor, .. } if tensor == "\"b\""), "{beyond}");
    let edge = of(vec![("a", meta(DType::U8, &[i64::MAX as u64]))]);
    assert!(matches!(&edge, ModelError::WeightShape { .. }), "{edge}");
}

#[test]
fn files_that_cannot_be_shared_are_refused_with_what_to_do() {
    let folder = Folder::new();
    let refused = |dtype, shape: &[u64], length, rule: &CastRule| {
        let path = folder.write_hole("refused", &[("layer.weight", dtype, shape, length)], 0);
        let error = WeightPlan::of_file(&ModelFile::open(&path).unwrap(), rule, 64).unwrap_err();
        assert!(!error.remedy().is_empty(), "{error}");
        (error.kind(), error.to_string())
    };
    for (dtype, shape, length) in [("F4", [4, 2], 4), ("F6_E2M3", [4, 2], 6), ("F8_E8M0", [4, 2], 8)] {
        let (kind, text) = refused(dtype, &shape, length, &CastRule::stored());
        assert_eq!(kind, ErrorKind::Unsupported);
        assert!(text.contains("layer.weight") && text.contains(dtype), "{text}");
    }
    let (kind, text) = refused("F16", &[1; 9], 2, &CastRule::stored());
    assert!(kind == ErrorKind::InvalidTensor && text.contains("layer.weight") && text.contains('9'), "{text}");
    let (kind, text) = refused("F16", &[1], 2, &CastRule::all(DType::F8E4M3Fn));
    assert!(kind == ErrorKind::Unsupported && text.contains("float8_e4m3fn"), "{text}");
}
