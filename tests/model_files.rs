//! Model files without libtorch: what is opened, what is recognised, how a call is planned, and what is refused.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use luna_broker::device::{Device, InProcessDevice, Span};
use luna_broker::model::{HandOff, ModelError, ModelFile, ModelInput, Vae, VaeFacts, vae_facts};
use luna_broker::service::{TileShape, Tiling, VaeCall, VaeMode, VaeOperation};
use luna_broker::tensor::{DType, Dims, TensorError, TensorMeta};
use tempfile::TempDir;

type Layer = (String, Vec<usize>);

/// The bytes of a file with `header` and `data_bytes` zeros.
fn raw(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 0);
    bytes
}

fn write(folder: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).expect("the temporary folder is writable");
    path
}

/// A valid file of float16 zeros.
fn write_layers(folder: &TempDir, name: &str, layers: &[Layer]) -> PathBuf {
    let mut at = 0;
    let mut header = serde_json::Map::new();
    for (layer, shape) in layers {
        let end = at + shape.iter().product::<usize>() * 2;
        let entry = serde_json::json!({"dtype": "F16", "shape": shape, "data_offsets": [at, end]});
        assert!(header.insert(layer.clone(), entry).is_none(), "{layer} twice");
        at = end;
    }
    write(folder, name, &raw(&serde_json::Value::Object(header).to_string(), at))
}

/// Weight and bias of a layer.
fn layer(stem: &str, shape: &[usize]) -> [Layer; 2] {
    [(format!("{stem}.weight"), shape.to_vec()), (format!("{stem}.bias"), shape[..1].to_vec())]
}

fn tiny_block(stem: &str, width: usize, pooled: bool) -> Vec<Layer> {
    let mut layers = Vec::new();
    for at in [0, 2, 4] {
        layers.extend(layer(&format!("{stem}.conv.{at}"), &[width, width, 3, 3]));
    }
    if pooled {
        layers.push((format!("{stem}.pool.0.weight"), vec![4 * width, width, 1, 1]));
        layers.extend(layer(&format!("{stem}.pool.1"), &[4 * width]));
        layers.push((format!("{stem}.pool.3.weight"), vec![width, 4 * width, 1, 1]));
    }
    layers
}

/// A TAESD decoder; `root` and `shift` say how its layers are called.
fn tiny_decoder(root: &str, shift: usize, width: usize, latent: usize, pooled: bool) -> Vec<Layer> {
    let stem = |at: usize| format!("{root}{}", at - shift);
    let mut layers = Vec::from(layer(&stem(1), &[width, latent, 3, 3]));
    for at in [3, 4, 5, 8, 9, 10, 13, 14, 15, 18] {
        layers.extend(tiny_block(&stem(at), width, pooled && at < 6));
    }
    layers.extend([7, 12, 17].map(|at| (format!("{}.weight", stem(at)), vec![width, width, 3, 3])));
    layers.extend(layer(&stem(19), &[3, width, 3, 3]));
    layers
}

fn tiny_encoder(root: &str, width: usize, latent: usize) -> Vec<Layer> {
    let stem = |at: usize| format!("{root}{at}");
    let mut layers = Vec::from(layer(&stem(0), &[width, 3, 3, 3]));
    for at in [1, 3, 4, 5, 7, 8, 9, 11, 12, 13] {
        layers.extend(tiny_block(&stem(at), width, false));
    }
    layers.extend([2, 6, 10].map(|at| (format!("{}.weight", stem(at)), vec![width, width, 3, 3])));
    layers.extend(layer(&stem(14), &[latent, width, 3, 3]));
    layers
}

/// An AutoencoderKL decoder of one level in checkpoint naming, without attention.
fn kl_decoder(prefix: &str, width: usize, latent: usize) -> Vec<Layer> {
    let root = format!("{prefix}decoder");
    let mut layers = Vec::from(layer(&format!("{root}.conv_in"), &[width, latent, 3, 3]));
    for block in ["mid.block_1", "mid.block_2", "up.0.block.0", "up.1.block.0"] {
        for at in [1, 2] {
            layers.extend(layer(&format!("{root}.{block}.norm{at}"), &[width]));
            layers.extend(layer(&format!("{root}.{block}.conv{at}"), &[width, width, 3, 3]));
        }
    }
    layers.extend(layer(&format!("{root}.up.1.upsample.conv"), &[width, width, 3, 3]));
    layers.extend(layer(&format!("{root}.norm_out"), &[width]));
    layers.extend(layer(&format!("{root}.conv_out"), &[3, width, 3, 3]));
    layers
}

fn facts(folder: &TempDir, name: &str, layers: &[Layer]) -> Result<VaeFacts, ModelError> {
    vae_facts(&ModelFile::open(&write_layers(folder, name, layers))?)
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

const DECODE: VaeCall = VaeCall { operation: VaeOperation::Decode, tiling: Tiling::Auto };
const ENCODE: VaeCall = VaeCall { operation: VaeOperation::Encode, tiling: Tiling::Auto };

fn latent(shape: [u64; 4]) -> TensorMeta {
    TensorMeta::contiguous(DType::F32, Dims::of(shape))
}

#[test]
fn what_is_no_regular_file_is_refused() {
    let folder = folder();
    assert!(matches!(ModelFile::open(folder.path()), Err(ModelError::Directory { .. })));
    let missing = ModelFile::open(&folder.path().join("none.safetensors"));
    assert!(
        matches!(missing, Err(ModelError::Unreadable { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound)
    );
    #[cfg(unix)]
    assert!(matches!(ModelFile::open(Path::new("/dev/null")), Err(ModelError::Unreadable { .. })));
}

#[cfg(unix)]
#[test]
fn a_pipe_without_a_writer_is_refused_at_once() {
    let folder = folder();
    let path = folder.path().join("pipe.safetensors");
    let made = std::process::Command::new("mkfifo").arg(&path).status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("skipped: mkfifo is not here");
        return;
    }
    assert!(matches!(ModelFile::open(&path), Err(ModelError::Unreadable { .. })));
}

#[test]
fn a_pickle_is_named_as_one_by_its_bytes_or_its_ending() {
    let folder = folder();
    for (name, bytes) in [
        ("zipped.safetensors", b"PK\x03\x04 and so on".to_vec()),
        ("pickled.safetensors", b"\x80\x02}q\x00(X\x05\x00\x00\x00".to_vec()),
        ("named.ckpt", b"neither of the two, but called so".to_vec()),
        ("short.pt", b"x".to_vec()),
    ] {
        let refused = ModelFile::open(&write(&folder, name, &bytes));
        assert!(matches!(refused, Err(ModelError::Pickle { .. })), "{name}: {refused:?}");
    }
}

#[test]
fn the_bytes_decide_and_not_the_ending() {
    let folder = folder();
    // 640 and 0x0280 are the same number: a header of this length starts as a pickle does.
    let header = format!("{:640}", r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#);
    let file = ModelFile::open(&write(&folder, "renamed.ckpt", &raw(&header, 4))).expect("a valid file");
    assert_eq!(file.tensors().len(), 1);
}

#[test]
fn every_lying_header_is_malformed() {
    let folder = folder();
    let entry =
        |offsets: &str, shape: &str| format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
    let overlapping = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
        "b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    let mut absurd = u64::MAX.to_le_bytes().to_vec();
    absurd.extend(b"{}");
    let mut long = 99_000_000u64.to_le_bytes().to_vec();
    long.extend(b"{}");
    let nested = format!(r#"{{"__metadata__":{}1{}}}"#, "[".repeat(200_000), "]".repeat(200_000));
    let nested_shape = entry("[0,4]", &format!("{}1{}", "[".repeat(200_000), "]".repeat(200_000)));
    for (name, bytes) in [
        ("empty", Vec::new()),
        ("seven bytes", vec![0; 7]),
        ("no header", vec![0; 8]),
        ("header beyond all memory", absurd),
        ("header longer than the file", long),
        ("no JSON", raw("not JSON at all", 0)),
        ("not UTF-8", [2u64.to_le_bytes().as_slice(), &[0xff, 0xfe]].concat()),
        ("truncated", raw(&entry("[0,4]", "[1]"), 3)),
        ("bytes behind the last tensor", raw(&entry("[0,4]", "[1]"), 5)),
        ("offsets beyond the file", raw(&entry("[0,4000]", "[1000]"), 4)),
        ("offsets backwards", raw(&entry("[4,0]", "[1]"), 4)),
        ("a hole before the first tensor", raw(&entry("[4,8]", "[1]"), 8)),
        ("offsets that do not fit the shape", raw(&entry("[0,4]", "[2]"), 4)),
        ("a shape that overflows", raw(&entry("[0,4]", "[4294967296,4294967296,4294967297]"), 4)),
        ("negative extents", raw(&entry("[0,4]", "[-1]"), 4)),
        ("unknown type", raw(r#"{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}"#, 4)),
        ("overlapping", raw(overlapping, 12)),
        ("nested metadata", raw(&nested, 0)),
        ("nested shape", raw(&nested_shape, 4)),
        ("a long name", raw(&format!(r#"{{"{}":1}}"#, "n".repeat(1_000_000)), 0)),
    ] {
        let refused = ModelFile::open(&write(&folder, "file.safetensors", &bytes));
        let Err(ModelError::Malformed { reason, .. }) = refused else { panic!("{name}: {refused:?}") };
        assert!(!reason.is_empty() && reason.len() < 500, "{name}: {reason}");
    }
}

#[test]
fn data_off_the_alignment_is_valid() {
    let folder = folder();
    let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]} }"#;
    assert_ne!(header.len() % 4, 0);
    let file = ModelFile::open(&write(&folder, "odd.safetensors", &raw(header, 4))).expect("alignment is no rule");
    let stored = file.tensor("a").expect("the tensor").clone();
    assert_eq!((stored.shape.as_slice(), file.bytes(&stored).expect("its bytes").len()), ([1].as_slice(), 4));
}

#[test]
fn a_file_that_was_touched_replaced_or_removed_is_noticed() {
    let folder = folder();
    let layers = tiny_decoder("", 0, 8, 4, false);
    let path = write_layers(&folder, "a.safetensors", &layers);
    let file = ModelFile::open(&path).expect("a valid file");
    file.check_unchanged().expect("nothing happened");
    let other = write_layers(&folder, "b.safetensors", &layers);
    std::fs::rename(other, &path).expect("renaming");
    assert!(matches!(file.check_unchanged(), Err(ModelError::Changed { .. })));
    let file = ModelFile::open(&path).expect("a valid file");
    let touched = std::time::SystemTime::UNIX_EPOCH;
    std::fs::File::options().write(true).open(&path).and_then(|file| file.set_modified(touched)).expect("touching");
    assert!(matches!(file.check_unchanged(), Err(ModelError::Changed { .. })));
    std::fs::remove_file(&path).expect("removing");
    assert!(matches!(file.check_unchanged(), Err(ModelError::Changed { .. })));
}

#[test]
fn a_file_that_is_rewritten_while_it_is_opened_is_an_error_at_the_worst() {
    let folder = folder();
    // A scale, which describing reads too, and a header that takes its time.
    let mut layers = tiny_decoder("decoder.", 0, 8, 4, false);
    layers.push(("vae_scale".to_owned(), vec![1]));
    layers.extend((0..5000).map(|at| (format!("other.{at}"), vec![1])));
    let path = write_layers(&folder, "file.safetensors", &layers);
    let whole = std::fs::read(&path).expect("readable");
    let is_over = AtomicBool::new(false);
    let results: Vec<_> = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                // As `cp` does it: the file is emptied first.
                std::fs::write(&path, &whole).expect("writable");
            }
        });
        let results = (0..500).map(|_| ModelFile::open(&path).and_then(|file| vae_facts(&file))).collect();
        is_over.store(true, Ordering::Relaxed);
        results
    });
    let mut cut_short = 0;
    for result in results {
        match result {
            // Zero, as everything in the file is.
            Err(ModelError::Malformed { reason, .. }) if reason == "vae_scale is zero" => {}
            Err(ModelError::Changed { .. } | ModelError::Malformed { .. }) => cut_short += 1,
            other => panic!("{other:?}"),
        }
    }
    eprintln!("{cut_short} of 500 were cut short");
}

#[test]
fn tiny_autoencoders_are_recognised_under_each_of_their_names() {
    let folder = folder();
    for (name, layers, channels, halves) in [
        ("bare", tiny_decoder("", 0, 8, 4, false), 4, (true, false)),
        ("bare encoder", tiny_encoder("", 8, 16), 16, (false, true)),
        (
            "joined",
            [tiny_decoder("taesd_decoder.", 0, 8, 32, true), tiny_encoder("taesd_encoder.", 8, 32)].concat(),
            32,
            (true, true),
        ),
        (
            "plain",
            [tiny_decoder("decoder.", 0, 8, 16, false), tiny_encoder("encoder.", 8, 16)].concat(),
            16,
            (true, true),
        ),
        (
            "diffusers",
            [tiny_decoder("decoder.layers.", 1, 8, 4, false), tiny_encoder("encoder.layers.", 8, 4)].concat(),
            4,
            (true, true),
        ),
    ] {
        let facts = facts(&folder, "tiny.safetensors", &layers).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((facts.family, facts.latent_channels, facts.ratio), ("taesd", channels, 8), "{name}");
        assert_eq!((facts.can_decode, facts.can_encode), halves, "{name}");
        let elements: usize = layers.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(facts.weight_bytes, elements as u64 * 4, "{name}");
    }
}

#[test]
fn a_missing_direction_is_said_when_it_is_asked_for() {
    let folder = folder();
    let decoder = facts(&folder, "d.safetensors", &tiny_decoder("", 0, 8, 4, false)).expect("a decoder");
    let image = TensorMeta::contiguous(DType::F32, Dims::of([1, 64, 64, 3]));
    let refused = decoder.plan(&ENCODE, &image, u64::MAX);
    assert!(matches!(refused, Err(ModelError::MissingPart { part: "encoder", .. })), "{refused:?}");
    let encoder = facts(&folder, "e.safetensors", &tiny_encoder("", 8, 4)).expect("an encoder");
    let refused = encoder.plan(&DECODE, &latent([1, 4, 8, 8]), u64::MAX);
    assert!(matches!(refused, Err(ModelError::MissingPart { part: "decoder", .. })), "{refused:?}");
}

#[test]
fn a_kl_decoder_is_recognised_beside_other_parts_of_a_checkpoint() {
    let folder = folder();
    let mut layers = kl_decoder("first_stage_model.", 32, 4);
    layers.extend(layer("model.diffusion_model.time_embed.0", &[8, 8]));
    let facts = facts(&folder, "sd.safetensors", &layers).expect("a VAE");
    assert_eq!((facts.family, facts.latent_channels, facts.ratio), ("autoencoder-kl", 4, 2));
    assert!(facts.can_decode && !facts.can_encode);
}

#[test]
fn files_without_a_vae_say_what_they_hold() {
    let folder = folder();
    let unet = layer("model.diffusion_model.input_blocks.0.0", &[8, 4, 3, 3]);
    match facts(&folder, "unet.safetensors", &unet) {
        Err(ModelError::MissingPart { part: "VAE", found, .. }) => {
            assert_eq!(found, r#"2 tensors, first: "model.diffusion_model.input_blocks.0.0.bias""#);
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(facts(&folder, "none.safetensors", &[]), Err(ModelError::MissingPart { .. })));
}

#[test]
fn autoencoders_of_another_make_are_refused_by_name() {
    let folder = folder();
    let mut extra = kl_decoder("", 32, 4);
    extra.extend(layer("decoder.up.0.attn.0.norm", &[32]));
    let mut quantised = kl_decoder("", 32, 4);
    quantised.push(("quantize.embedding.weight".to_owned(), vec![8, 4]));
    let mut longer = tiny_decoder("decoder.", 0, 8, 4, false);
    longer.extend(tiny_block("decoder.23", 8, false));
    let mut misshapen = kl_decoder("", 32, 4);
    misshapen.retain(|(name, _)| name != "decoder.up.0.block.0.conv1.weight");
    let missing = misshapen.clone();
    misshapen.push(("decoder.up.0.block.0.conv1.weight".to_owned(), vec![32, 16, 3, 3]));
    let narrow = kl_decoder("", 48, 4);
    for (name, layers, says) in [
        ("extra", extra, "decoder.up.0.attn.0.norm"),
        ("quantised", quantised, "quantize.embedding"),
        ("longer", longer, "taesana"),
        ("missing", missing, "decoder.up.0.block.0.conv1.weight"),
        ("misshapen", misshapen, "[32, 16, 3, 3]"),
        ("not in 32 groups", narrow, "32 groups"),
    ] {
        let refused = facts(&folder, "other.safetensors", &layers);
        let Err(ModelError::Unsupported { what, .. }) = refused else { panic!("{name}: {refused:?}") };
        assert!(what.contains(says), "{name}: {what}");
    }
    let refused = facts(&folder, "taesana_decoder.safetensors", &tiny_decoder("", 0, 8, 32, false));
    assert!(matches!(refused, Err(ModelError::Unsupported { .. })), "{refused:?}");
}

#[test]
fn inputs_that_do_not_fit_are_named_with_what_is_expected() {
    let folder = folder();
    let layers = [tiny_decoder("decoder.", 0, 8, 4, false), tiny_encoder("encoder.", 8, 4)].concat();
    let facts = facts(&folder, "tiny.safetensors", &layers).expect("a VAE");
    let float = |shape: &[u64]| TensorMeta::contiguous(DType::F16, Dims::new(shape).expect("a rank"));
    let bytes = TensorMeta::contiguous(DType::U8, Dims::of([1, 64, 64, 3]));
    for (call, input, tensor) in [
        (DECODE, float(&[4, 8, 8]), "latent"),
        (DECODE, float(&[1, 16, 8, 8]), "latent"),
        (DECODE, float(&[0, 4, 8, 8]), "latent"),
        (DECODE, float(&[1, 4, 0, 8]), "latent"),
        (DECODE, TensorMeta::contiguous(DType::I64, Dims::of([1, 4, 8, 8])), "latent"),
        (ENCODE, float(&[1, 64, 64, 2]), "image"),
        (ENCODE, float(&[1, 7, 64, 3]), "image"),
        (ENCODE, float(&[64, 64, 3]), "image"),
        (ENCODE, bytes, "image"),
    ] {
        match facts.plan(&call, &input, u64::MAX) {
            Err(ModelError::Tensor(TensorError::Unexpected { tensor: named, .. })) => assert_eq!(named, tensor),
            other => panic!("{input:?}: {other:?}"),
        }
    }
    let huge = TensorMeta::contiguous(DType::F16, Dims::of([1, 4, 1 << 40, 1 << 17]));
    assert!(matches!(facts.plan(&DECODE, &huge, u64::MAX), Err(ModelError::Tensor(TensorError::TooLarge { .. }))));
}

#[test]
fn the_budget_decides_between_one_piece_tiles_and_refusal() {
    let folder = folder();
    let layers = [tiny_decoder("decoder.", 0, 8, 4, false), tiny_encoder("encoder.", 8, 4)].concat();
    let facts = facts(&folder, "tiny.safetensors", &layers).expect("a VAE");
    let pixels = 1600 * 1024;
    let input = latent([3, 4, 200, 128]);
    let full = facts.plan(&DECODE, &input, pixels * facts.decode_bytes_per_pixel).expect("it fits");
    assert_eq!((full.mode, full.output), (VaeMode::Full, latent([3, 1600, 1024, 3])));
    let tiled = facts.plan(&DECODE, &input, pixels * facts.decode_bytes_per_pixel - 1).expect("tiles fit");
    assert_eq!(tiled.mode, VaeMode::Tiled(TileShape { width: 64, height: 64, overlap: 16 }));
    let refused = facts.plan(&DECODE, &input, 1 << 20);
    assert!(matches!(refused, Err(ModelError::OverBudget { what: "decode", .. })), "{refused:?}");
    let image = TensorMeta::contiguous(DType::F32, Dims::of([1, 1030, 777, 4]));
    let tiled = facts.plan(&ENCODE, &image, 512 * 512 * facts.encode_bytes_per_pixel * 2).expect("tiles fit");
    assert_eq!(tiled.mode, VaeMode::Tiled(TileShape { width: 512, height: 512, overlap: 64 }));
    assert_eq!(tiled.output, latent([1, 4, 128, 97]));
}

#[test]
fn impossible_tiles_are_refused() {
    let folder = folder();
    let layers = [tiny_decoder("decoder.", 0, 8, 4, false), tiny_encoder("encoder.", 8, 4)].concat();
    let facts = facts(&folder, "tiny.safetensors", &layers).expect("a VAE");
    let tiles = |width, height, overlap| Tiling::Tiles(TileShape { width, height, overlap });
    for (operation, tiling) in [
        (VaeOperation::Decode, tiles(0, 64, 0)),
        (VaeOperation::Decode, tiles(64, 4, 0)),
        (VaeOperation::Decode, tiles(64, 64, 32)),
        (VaeOperation::Decode, tiles(65, 64, 16)),
        (VaeOperation::Decode, tiles(u32::MAX, u32::MAX, u32::MAX)),
        (VaeOperation::Encode, tiles(512, 512, 60)),
        (VaeOperation::Encode, tiles(520, 512, 64)),
    ] {
        let input = match operation {
            VaeOperation::Decode => latent([1, 4, 64, 64]),
            VaeOperation::Encode => latent([1, 512, 512, 3]),
        };
        let refused = facts.plan(&VaeCall { operation, tiling }, &input, u64::MAX);
        assert!(matches!(refused, Err(ModelError::Tiles { .. })), "{tiling:?}: {refused:?}");
    }
    let wide = VaeCall { operation: VaeOperation::Decode, tiling: tiles(128, 32, 8) };
    assert!(facts.plan(&wide, &latent([1, 4, 64, 64]), u64::MAX).is_ok());
}

#[test]
fn the_hand_off_writes_sixteen_marks_and_nothing_else() {
    let facts = HandOff::facts("builtin:hand-off").expect("a built-in name");
    // Channels last: the first row-major elements are 4 apart in memory.
    let meta =
        TensorMeta::strided(DType::F16, Dims::of([1, 4, 3, 8]), Dims::of([96, 1, 32, 4])).expect("valid strides");
    let plan = facts.plan(&DECODE, &meta, 0).expect("nothing to compute");
    assert_eq!((plan.mode, plan.output.shape), (VaeMode::Full, Dims::of([1, 24, 64, 3])));
    let span = |bytes: usize| {
        Span::new(InProcessDevice.allocate(bytes).expect("memory"), 0, bytes).expect("a range of the region")
    };
    let (input, output) = (span(96 * 2), span(plan.output.size_bytes().expect("a size")));
    let halves: Vec<u8> = (0..96u16).flat_map(|at| half::f16::from_f32(f32::from(at)).to_ne_bytes()).collect();
    input.write(&halves).expect("it fits");
    output.write(&vec![0xee; output.length()]).expect("it fits");
    HandOff::default().run(&plan, ModelInput { meta, memory: &input }, &output, &|| true).expect("it never stops");
    let mut image = vec![0; output.length()];
    output.read(&mut image).expect("it fits");
    let step = image.len() / 4 / 16;
    let mut marks = 0;
    for (at, element) in image.chunks_exact(4).enumerate() {
        if at % step == 0 && marks < 16 {
            let (row, column) = (marks / 8, marks % 8);
            let expected = (row * 32 + column * 4) as f32;
            assert_eq!(f32::from_ne_bytes(element.try_into().expect("four bytes")), expected, "mark {marks}");
            marks += 1;
        } else {
            assert_eq!(element, [0xee; 4], "element {at} was touched");
        }
    }
    let image = TensorMeta::contiguous(DType::F32, Dims::of([1, 8, 8, 3]));
    assert!(matches!(facts.plan(&ENCODE, &image, u64::MAX), Err(ModelError::MissingPart { part: "encoder", .. })));
}
