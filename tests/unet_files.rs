//! UNet files without libtorch: what is recognised from names and shapes, and what is refused with which words.

#[path = "support/unet.rs"]
mod unet;

use std::path::PathBuf;

use half::{bf16, f16};
use luna_broker::error::{Error, ErrorKind};
use luna_broker::model::{ModelError, ModelFile, Prediction, UnetFacts, UnetVariant, unet_facts};
use luna_broker::service::Precision;
use tempfile::TempDir;
use unet::{Entry, Numbers, write_sparse};

const PREFIX: &str = "model.diffusion_model.";
const TELLTALE: &str = "output_blocks.11.1.transformer_blocks.0.norm1.bias";

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn under(prefix: &str, entries: Vec<Entry>) -> Vec<Entry> {
    entries.into_iter().map(|(name, shape)| (format!("{prefix}{name}"), shape)).collect()
}

fn written(folder: &TempDir, entries: &[Entry]) -> PathBuf {
    let path = folder.path().join("unet.safetensors");
    write_sparse(&path, entries, "F16", None);
    path
}

fn recognised(entries: &[Entry]) -> Result<UnetFacts, ModelError> {
    let folder = folder();
    let path = written(&folder, entries);
    unet_facts(&ModelFile::open(&path).expect("a valid file"))
}

fn facts(entries: &[Entry]) -> UnetFacts {
    recognised(entries).unwrap_or_else(|error| panic!("{error}"))
}

/// The words of a refusal, which must name the file.
fn refused(entries: &[Entry]) -> String {
    let error = match recognised(entries) {
        Err(error @ ModelError::Unsupported { .. }) => error,
        other => panic!("{other:?}"),
    };
    let words = error.to_string();
    assert!(words.contains("unet.safetensors"), "{words}");
    assert_eq!(Error::from(error).kind(), ErrorKind::Unsupported);
    words
}

fn with(mut entries: Vec<Entry>, name: &str, shape: &[usize]) -> Vec<Entry> {
    entries.push((name.to_owned(), shape.to_vec()));
    entries
}

#[test]
fn published_models_are_told_apart_by_their_headers() {
    // Parameters in millions; those of SDXL and its relatives as published.
    let models = [
        ("sd15", Numbers::SD15, 859.5, 4),
        ("sd2", Numbers::SD2, 865.9, 4),
        ("sd2-unclip", Numbers { vector: Some(1536), ..Numbers::SD2 }, 869.5, 4),
        ("sd2-unclip", Numbers { vector: Some(2048), ..Numbers::SD2 }, 870.2, 4),
        ("sdxl", Numbers::SDXL, 2567.5, 3),
        ("ssd-1b", Numbers::SSD, 1331.0, 3),
        ("vega", Numbers::VEGA, 745.0, 3),
        ("koala", Numbers::KOALA, 782.0, 3),
        ("koala", Numbers::KOALA_LARGE, 1161.0, 3),
        ("sdxl-refiner", Numbers::REFINER, 2260.0, 4),
    ];
    for (family, numbers, millions, levels) in models {
        for prefix in ["", PREFIX] {
            let facts = facts(&under(prefix, numbers.entries()));
            assert_eq!((facts.family, facts.variant), (family, UnetVariant::Plain));
            assert_eq!((facts.prediction, facts.zero_terminal_snr), (Prediction::Eps, false));
            assert_eq!((facts.in_channels, facts.out_channels), (4, 4));
            assert_eq!(facts.model_channels, numbers.base as u64);
            assert_eq!(facts.context_width, numbers.context as u64);
            assert_eq!(facts.vector_width, numbers.vector.map(|width| width as u64));
            assert_eq!(facts.levels, levels);
            let counted = facts.weight_elements as f64 / 1e6;
            println!("{family:14} {counted:8.1} M, {:6} elements per position", facts.elements_per_position);
            assert!((counted - millions).abs() < 1.0, "{family}: {counted} M instead of {millions} M");
            assert_eq!(facts.weight_bytes(Precision::F16), 2 * facts.weight_elements);
        }
    }
}

#[test]
fn other_sizes_are_run_as_generic_ones() {
    let facts = facts(&Numbers::SMALL.entries());
    assert_eq!((facts.family, facts.levels, facts.vector_width), ("generic", 2, Some(16)));
    let skips: Vec<_> = facts.skips.iter().map(|skip| (skip.channels, skip.level)).collect();
    assert_eq!(skips, [(64, 0), (64, 0), (64, 1), (128, 1)]);
    assert_eq!([17, 18, 1].map(|side| facts.skips[3].side(side)), [9, 9, 1]);
    let deeper = Numbers { down: &[0, 0, 2, 2, 10, 9], ..Numbers::SDXL };
    assert_eq!(self::facts(&deeper.entries()).family, "generic", "not even SDXL, with another depth");
}

#[test]
fn channels_beside_the_latent_are_a_variant() {
    for (input, variant) in [(9, UnetVariant::Inpaint), (8, UnetVariant::Instruct), (5, UnetVariant::Other)] {
        for (family, numbers) in [("sd15", Numbers::SD15), ("sdxl", Numbers::SDXL), ("sd2", Numbers::SD2)] {
            let facts = facts(&Numbers { input, ..numbers }.entries());
            assert_eq!((facts.family, facts.variant, facts.in_channels), (family, variant, input as u64));
        }
    }
}

#[test]
fn markers_tell_what_a_model_predicts() {
    let xl = || under(PREFIX, Numbers::SDXL.entries());
    let told = |entries: &[Entry]| {
        let facts = facts(entries);
        (facts.prediction, facts.zero_terminal_snr)
    };
    let v_pred = with(xl(), "v_pred", &[0]);
    assert_eq!(told(&v_pred), (Prediction::V, false));
    assert_eq!(told(&with(v_pred, "ztsnr", &[0])), (Prediction::V, true));
    assert_eq!(told(&with(xl(), "ztsnr", &[0])), (Prediction::Eps, false));
    assert_eq!(told(&with(xl(), "edm_mean", &[1, 4, 1, 1])), (Prediction::Eps, false));
    let edm = with(with(xl(), "edm_mean", &[1, 4, 1, 1]), "edm_std", &[1, 4, 1, 1]);
    assert_eq!(told(&edm), (Prediction::Edm, false));
    assert_eq!(told(&with(xl(), "edm_vpred.sigma_max", &[])), (Prediction::VEdm, false));
    let bare = with(with(Numbers::SDXL.entries(), "v_pred", &[0]), "ztsnr", &[0]);
    assert_eq!(told(&bare), (Prediction::V, true));
    let early = with(under(PREFIX, Numbers::SD15.entries()), "v_pred", &[0]);
    assert_eq!(told(&early), (Prediction::Eps, false), "SD1 has no such marker");
}

#[test]
fn sd2_is_told_by_the_spread_of_one_tensor() {
    // Half of the values at each end: the spread is the distance of the ends from their mean, which is not zero.
    let ends = |spread: f64| [0.3 - spread, 0.3 + spread];
    let half = |spread| ends(spread).map(|value| f16::from_f64(value).to_le_bytes()).concat().repeat(160);
    let brain = |spread| ends(spread).map(|value| bf16::from_f64(value).to_le_bytes()).concat().repeat(160);
    let folder = folder();
    for prefix in ["", PREFIX] {
        let name = format!("{prefix}{TELLTALE}");
        let told = |numbers: &Numbers, dtype: &str, bytes: &[u8]| {
            let path = folder.path().join("sd2.safetensors");
            write_sparse(&path, &under(prefix, numbers.entries()), dtype, Some((&name, bytes)));
            unet_facts(&ModelFile::open(&path).expect("a valid file")).expect("it is supported").prediction
        };
        for (spread, prediction) in [(0.08, Prediction::Eps), (0.1, Prediction::V)] {
            assert_eq!(told(&Numbers::SD2, "F16", &half(spread)), prediction, "{spread}");
            assert_eq!(told(&Numbers::SD2, "BF16", &brain(spread)), prediction, "{spread}");
            let unclip = Numbers { vector: Some(1536), ..Numbers::SD2 };
            assert_eq!(told(&unclip, "F16", &half(spread)), prediction, "{spread}");
        }
        let inpaint = Numbers { input: 9, ..Numbers::SD2 };
        assert_eq!(told(&inpaint, "F16", &half(0.1)), Prediction::Eps, "inpainting was trained on noise");
        let nan = f16::NAN.to_le_bytes().repeat(320);
        assert_eq!(told(&Numbers::SD2, "F16", &nan), Prediction::Eps);
    }
}

#[test]
fn working_memory_grows_with_the_latent_and_covers_what_was_measured() {
    // Peaks of live activations with an executor that computes little in place, in MiB, float16, one row.
    for (numbers, side, measured) in [(Numbers::SDXL, 128, 158), (Numbers::SD15, 64, 65), (Numbers::SD2, 96, 146)] {
        let facts = facts(&numbers.entries());
        let told = |rows, precision| facts.step_bytes(rows, side, side, precision);
        let weight = facts.step_bytes(0, side, side, Precision::F16);
        assert_eq!(weight, 1280 * 2560 * 9 * 2 * 3 / 2, "the first block on the way up");
        let peak = told(1, Precision::F16) >> 20;
        println!("{}: {peak} MiB told, {measured} MiB measured", facts.family);
        assert!(peak > measured && peak < 2 * measured + (weight >> 20), "{}: {peak} MiB", facts.family);
        assert_eq!(told(4, Precision::F16) - weight, 4 * (told(1, Precision::F16) - weight));
        assert_eq!(told(4, Precision::F32), 2 * told(4, Precision::F16));
        assert_eq!(told(u64::MAX, Precision::F32), u64::MAX / 100, "no overflow");
    }
}

#[test]
fn every_tensor_must_be_there_and_have_its_shape() {
    let complete = Numbers::SMALL.entries();
    for at in 0..complete.len() {
        let (name, shape) = complete[at].clone();
        let mut lacking = complete.clone();
        lacking.remove(at);
        let words = refused(&lacking);
        let stem = name.rsplit_once('.').expect("a stem").0;
        assert!(words.contains(stem) || stem.ends_with(".op") || stem.ends_with(".conv"), "{name}: {words}");
        for dim in 0..shape.len() {
            // Sizes that decide all others are free; another one does not fit those others.
            let mut misshapen = complete.clone();
            misshapen[at].1[dim] += 1;
            let free = ["input_blocks.0.0.weight", "out.2.weight", "label_emb.0.0.weight"];
            if dim < 2 && free.contains(&name.as_str()) && recognised(&misshapen).is_ok() {
                continue;
            }
            refused(&misshapen);
            misshapen[at].1[dim] = 0;
            refused(&misshapen);
        }
        let mut flat = complete.clone();
        flat[at].1.push(1);
        refused(&flat);
    }
}

#[test]
fn what_no_layer_takes_is_named() {
    for extra in
        ["middle_block.3.weight", "out.2.weight_scale", "input_blocks.1.0.in_layers.2.comfy_quant", "scaled_fp8"]
    {
        let words = refused(&with(under(PREFIX, Numbers::SMALL.entries()), &format!("{PREFIX}{extra}"), &[1]));
        assert!(words.contains(extra), "{words}");
    }
    let with_bias = with(Numbers::SMALL.entries(), "input_blocks.3.1.transformer_blocks.0.attn1.to_q.bias", &[128]);
    assert!(refused(&with_bias).contains("to_q.bias"));
}

#[test]
fn structures_of_other_makes_are_named() {
    let small = || under(PREFIX, Numbers::SMALL.entries());
    let cases: [(Vec<Entry>, &str); 10] = [
        (with(small(), &format!("{PREFIX}input_blocks.3.1.time_stack.0.norm1.weight"), &[128]), "video"),
        (with(small(), &format!("{PREFIX}input_blocks.1.0.time_mixer.mix_factor"), &[1]), "video"),
        (with(small(), &format!("{PREFIX}label_emb.weight"), &[1000, 256]), "x4 upscaler"),
        (with(Numbers::SMALL.entries(), "label_emb.weight", &[1000, 256]), "x4 upscaler"),
        (vec![(format!("{PREFIX}joint_blocks.0.x_block.attn.qkv.weight"), vec![3, 1])], "SD3"),
        (vec![("double_blocks.0.img_attn.qkv.weight".to_owned(), vec![3, 1])], "Flux"),
        (vec![(format!("{PREFIX}blocks.0.self_attn.q.weight"), vec![3, 1])], "blocks.0.self_attn"),
        (vec![("down_blocks.0.motion_modules.0.norm.weight".to_owned(), vec![3])], "video"),
        (with(Numbers::SMALL.entries(), "input_hint_block.0.weight", &[3]), "ControlNet"),
        (vec![("controlnet_down_blocks.0.weight".to_owned(), vec![3])], "ControlNet"),
    ];
    for (entries, what) in cases {
        let words = refused(&entries);
        assert!(words.contains(what), "{what}: {words}");
    }
}

#[test]
fn half_a_file_is_refused() {
    let folder = folder();
    let path = written(&folder, &Numbers::SMALL.entries());
    let length = std::fs::metadata(&path).expect("it is there").len();
    std::fs::OpenOptions::new().write(true).open(&path).expect("writable").set_len(length / 2).expect("it shrinks");
    assert!(matches!(ModelFile::open(&path), Err(ModelError::Malformed { .. })));
    // A file that was cut along its tensors is a valid one, and no UNet.
    let mut entries = Numbers::SMALL.entries();
    entries.truncate(entries.len() / 2);
    assert!(refused(&entries).contains("output_blocks.") || refused(&entries).contains("out.0"));
    let downs: Vec<Entry> =
        Numbers::SMALL.entries().into_iter().filter(|(name, _)| !name.starts_with("output_blocks.")).collect();
    assert!(refused(&downs).contains("which no output block answers"));
}

#[test]
fn files_of_other_parts_hold_no_unet() {
    for name in ["first_stage_model.decoder.conv_in.weight", "text_model.embeddings.token_embedding.weight", "v_pred"] {
        let error = recognised(&[(name.to_owned(), vec![1])]).expect_err("there is none");
        assert!(matches!(&error, ModelError::MissingPart { part: "UNet", .. }), "{error}");
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn numbers_that_are_not_computed_with_are_refused() {
    let folder = folder();
    let path = folder.path().join("integers.safetensors");
    write_sparse(&path, &Numbers::SMALL.entries(), "I16", None);
    let error = unet_facts(&ModelFile::open(&path).expect("a valid file")).expect_err("integers");
    assert!(error.to_string().contains("element type I16"), "{error}");
}
