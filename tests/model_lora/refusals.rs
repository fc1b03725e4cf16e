//! Files that are not what they seem: an error that names file and key, and what is left over is reported.

use std::path::PathBuf;

use luna_broker::error::{Error, ErrorKind};
use luna_broker::model::{Adapter, AdapterFile, AdapterKind, AdapterReport, LayerNames, ModelError, ModelFile};
use luna_broker::service::AdapterMode;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::sync::Arc;
use tempfile::TempDir;

use crate::Scene;

/// A linear layer of the model: 64 channels from a context of 40.
const KEY: &str = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k";
/// A convolution of the model, 64 channels from 64.
const CONV: &str = "lora_unet_input_blocks_1_0_in_layers_2";
const NORM: &str = "lora_unet_out_0";

type Entry<'a> = (String, Dtype, &'a [usize], f32);

fn f32(name: &str, suffix: &str, shape: &'static [usize]) -> Entry<'static> {
    (format!("{name}.{suffix}"), Dtype::F32, shape, 0.01)
}

fn written(folder: &TempDir, entries: &[Entry<'_>]) -> PathBuf {
    let path = folder.path().join("small.safetensors");
    let bytes: Vec<Vec<u8>> = entries
        .iter()
        .map(|(_, dtype, shape, value)| {
            let count = shape.iter().product();
            match dtype {
                Dtype::F32 => std::iter::repeat_n(value.to_le_bytes(), count).flatten().collect(),
                Dtype::I64 => std::iter::repeat_n((*value as i64).to_le_bytes(), count).flatten().collect(),
                Dtype::F8_E4M3 => vec![0; count],
                other => panic!("{other} is not written"),
            }
        })
        .collect();
    let views = entries.iter().zip(&bytes).map(|((name, dtype, shape, _), bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.to_vec(), bytes).expect("bytes of that shape"))
    });
    safetensors::serialize_to_file(views, None, &path).expect("the file can be written");
    path
}

fn adapted(scene: &Scene, entries: &[Entry<'_>]) -> Result<AdapterReport, ModelError> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = AdapterFile::read(Arc::new(ModelFile::open(&written(&folder, entries)).expect("a valid file")))?;
    let adapted = scene.unet.adapt(&[Adapter { file: &file, strength: 1.0 }], AdapterMode::Auto)?;
    Ok(adapted.reports[0].clone())
}

#[test]
fn what_does_not_fit_is_refused_by_file_and_key() {
    let Some(scene) = Scene::of("sd15") else { return };
    let up = || f32(KEY, "lora_up.weight", &[64, 4]);
    let down = || f32(KEY, "lora_down.weight", &[4, 40]);
    let alpha = |value| (format!("{KEY}.alpha"), Dtype::F32, &[] as &[usize], value);
    let loha = |suffix: &str| match suffix {
        "hada_w1_a" | "hada_w2_a" => f32(KEY, suffix, &[64, 4]),
        _ => f32(KEY, suffix, &[4, 40]),
    };
    let glora = |a1: &'static [usize]| {
        let rest = [("a2.weight", &[4usize, 40] as &[_]), ("b1.weight", &[64, 4]), ("b2.weight", &[4, 40])];
        let mut all = vec![f32(KEY, "a1.weight", a1)];
        all.extend(rest.map(|(suffix, shape)| f32(KEY, suffix, shape)));
        all
    };
    let cases: Vec<(&str, Vec<Entry<'_>>, &str)> = vec![
        ("no other half", vec![up()], "needs a lora_down.weight"),
        ("other columns", vec![up(), f32(KEY, "lora_down.weight", &[4, 41])], "lora_down.weight"),
        ("other rows", vec![f32(KEY, "lora_up.weight", &[63, 4]), down()], "lora_up.weight"),
        ("other ranks", vec![f32(KEY, "lora_up.weight", &[64, 5]), down()], "lora_up.weight"),
        (
            "no rank",
            vec![f32(KEY, "lora_up.weight", &[64, 0]), f32(KEY, "lora_down.weight", &[0, 40])],
            "lora_down.weight",
        ),
        ("a vector", vec![f32(KEY, "lora_up.weight", &[64]), down()], "lora_up.weight"),
        ("not a number", vec![up(), down(), alpha(f32::NAN)], "alpha"),
        ("without end", vec![up(), down(), alpha(f32::INFINITY)], "alpha"),
        ("several numbers", vec![up(), down(), f32(KEY, "alpha", &[2])], "alpha"),
        ("twice", vec![up(), down(), f32(KEY, "lora_B.weight", &[64, 4])], "lora_B.weight"),
        ("two ways", vec![up(), down(), f32(KEY, "diff", &[64, 40])], "another way"),
        (
            "two names",
            vec![
                up(),
                down(),
                f32("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "diff", &[64, 40]),
            ],
            "same layer",
        ),
        ("whole numbers", vec![up(), (format!("{KEY}.lora_down.weight"), Dtype::I64, &[4, 40], 1.0)], "I64"),
        ("tiny numbers", vec![up(), (format!("{KEY}.lora_down.weight"), Dtype::F8_E4M3, &[4, 40], 1.0)], "F8_E4M3"),
        ("bad elements", vec![up(), (format!("{KEY}.lora_down.weight"), Dtype::F32, &[4, 40], f32::NAN)], "lora_down"),
        ("beside a norm", vec![f32(NORM, "lora_up.weight", &[64, 4]), f32(NORM, "lora_down.weight", &[4, 1])], "norm"),
        ("middle of a linear layer", vec![up(), down(), f32(KEY, "lora_mid.weight", &[4, 4, 3, 3])], "lora_mid.weight"),
        (
            "other kernel",
            vec![
                f32(CONV, "lora_up.weight", &[64, 4, 1, 1]),
                f32(CONV, "lora_mid.weight", &[4, 4, 5, 5]),
                f32(CONV, "lora_down.weight", &[4, 64, 1, 1]),
            ],
            "lora_mid.weight",
        ),
        ("half a product", ["hada_w1_a", "hada_w1_b", "hada_w2_a"].map(loha).into(), "needs a hada_w2_b"),
        (
            "one core",
            vec![
                f32(CONV, "hada_w1_a", &[4, 64]),
                f32(CONV, "hada_w1_b", &[4, 64]),
                f32(CONV, "hada_w2_a", &[4, 64]),
                f32(CONV, "hada_w2_b", &[4, 64]),
                f32(CONV, "hada_t1", &[4, 4, 3, 3]),
            ],
            "needs a hada_t2",
        ),
        ("other product", vec![f32(KEY, "lokr_w1", &[8, 8]), f32(KEY, "lokr_w2", &[8, 6])], "lokr_w2"),
        ("first factor only", vec![f32(KEY, "lokr_w1", &[8, 8])], "needs a lokr_w2"),
        ("other channels", glora(&[41, 4]), "a1.weight"),
        ("half a pair", glora(&[40, 4])[..3].to_vec(), "needs a b2.weight"),
        ("other blocks", vec![f32(KEY, "oft_blocks", &[8, 7, 7])], "oft_blocks"),
        ("too many rounds", vec![f32(KEY, "oft_blocks", &[6, 8, 8, 8])], "oft_blocks"),
        ("odd rounds", vec![f32(KEY, "oft_blocks", &[1, 64, 1, 1])], "oft_blocks"),
        ("no blocks", vec![f32(KEY, "rescale", &[64, 1])], "needs a oft_blocks"),
        ("lengths of nothing", vec![f32(KEY, "dora_scale", &[64, 1])], "dora_scale"),
        ("other lengths", vec![up(), down(), f32(KEY, "dora_scale", &[1, 64])], "dora_scale"),
        ("lengths of a turn", vec![f32(KEY, "oft_blocks", &[8, 8, 8]), f32(KEY, "dora_scale", &[64, 1])], "dora_scale"),
        ("another weight", vec![f32(KEY, "set_weight", &[40, 64])], "set_weight"),
        ("another difference", vec![f32(CONV, "diff", &[64, 64])], "diff"),
        ("another bias", vec![f32(CONV, "diff_b", &[65])], "diff_b"),
        ("another family", vec![f32("lora_unet_joint_blocks_0_x", "lora_up.weight", &[64, 4])], "joint_blocks"),
        ("no adapter", vec![(KEY.replace("lora_unet", "model"), Dtype::F32, &[1], 0.0)], "none of its 1 keys"),
    ];
    for (what, entries, says) in cases {
        let error = adapted(&scene, &entries).expect_err(what);
        let words = error.to_string();
        println!("{what:26} {words}");
        assert!(words.contains("small.safetensors") && words.contains(says), "{what}: {words}");
        assert!(matches!(error, ModelError::AdapterFile { .. }), "{what}: {error:?}");
        assert!(!error.remedy().is_empty());
        assert_eq!(Error::from(error).kind(), ErrorKind::InvalidModel, "{what}");
    }
    assert!(adapted(&scene, &[]).expect_err("no keys").to_string().contains("no keys"));
    assert!(adapted(&scene, &[up(), down(), alpha(-2.0)]).is_ok(), "alpha may be negative");
}

#[test]
fn strengths_that_are_no_numbers_are_refused() {
    let Some(scene) = Scene::of("sd15") else { return };
    let file = scene.adapter("lora");
    for strength in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let error = scene.unet.adapt(&[Adapter { file: &file, strength }], AdapterMode::Auto).expect_err("no number");
        assert!(matches!(error, ModelError::AdapterStrength { .. }), "{error:?}");
        assert!(error.to_string().contains("lora.safetensors"), "{error}");
        assert_eq!(error.kind(), ErrorKind::Configuration);
    }
}

#[test]
fn what_is_left_over_is_reported() {
    let Some(scene) = Scene::of("sd15") else { return };
    let mut entries = vec![f32(KEY, "lora_up.weight", &[64, 4]), f32(KEY, "lora_down.weight", &[4, 40])];
    entries.push(f32(CONV, "diff", &[64, 64, 3, 3]));
    entries.extend((0..4).map(|at| f32(&format!("lora_unet_elsewhere_{at}"), "lora_up.weight", &[1, 1])));
    // Names that nothing ends with, an alpha of nothing, the bias of a layer that has none.
    entries.push(f32(KEY, "lora_embedding_A", &[64]));
    entries.push(f32(CONV.trim_end_matches('2'), "alpha", &[]));
    entries.push(f32(NORM, "alpha", &[]));
    entries.push(f32(KEY, "diff_b", &[64]));
    let encoders = ["lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_projection", "text_encoder_2.x"];
    entries.extend(encoders.map(|name| f32(name, "lora_up.weight", &[1, 1])));
    let report = adapted(&scene, &entries).expect("some of it fits");
    assert_eq!((report.layers, report.text_encoder_keys, report.unknown.count), (2, 3, 8), "{report:?}");
    assert_eq!(report.kinds, [(AdapterKind::Lora, 1), (AdapterKind::Difference, 1)]);
    assert_eq!(report.unknown.first.len(), 5);
    let only_text = adapted(&scene, &[f32(encoders[0], "lora_up.weight", &[1, 1])]).expect("nothing for the UNet");
    assert_eq!((only_text.layers, only_text.text_encoder_keys), (0, 1));
}

#[test]
fn a_file_of_another_model_is_told_without_loading_anything() {
    let (Some(early), Some(late)) = (Scene::of("sd15"), Scene::of("sdxl")) else { return };
    let names = |scene: &Scene, file: &str| {
        let path = scene.folder.with_file_name("unet").join(format!("{file}.safetensors"));
        LayerNames::of_unet(&ModelFile::open(&path).expect("a file")).expect("a UNet")
    };
    let report = early.adapter("lora").report(&names(&early, "sd15.diffusers")).expect("its own");
    assert_eq!(report.unknown.count, 0);
    let error = early.adapter("lora").report(&names(&late, "sdxl.bare")).expect_err("another family");
    assert!(error.to_string().contains("sd15.lora.safetensors"), "{error}");
    let error = late.adapter("lora").report(&names(&early, "sd15.checkpoint")).expect_err("another family");
    assert!(error.to_string().contains("sdxl.lora.safetensors"), "{error}");
}

#[test]
fn a_file_that_changed_since_it_was_opened_is_not_used() {
    let Some(scene) = Scene::of("sd15") else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let entries = [f32(KEY, "lora_up.weight", &[64, 4]), f32(KEY, "lora_down.weight", &[4, 40])];
    let path = written(&folder, &entries);
    let file = AdapterFile::read(Arc::new(ModelFile::open(&path).expect("a valid file"))).expect("an adapter");
    std::fs::remove_file(&path).expect("it is there");
    let gone = scene.unet.adapt(&[Adapter { file: &file, strength: 1.0 }], AdapterMode::Auto);
    assert!(matches!(gone, Err(ModelError::Changed { .. })), "{gone:?}");
}
