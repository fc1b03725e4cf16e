//! Adapters: side paths and private copies of weights, for some rows and not for others.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use luna_broker::model::torch::{LayerPatch, LowRank, Patches, Replaced, Stack, TorchUnet};
use luna_broker::model::{LayerId, ModelError, ModelFile};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tch::{Device, Kind, Tensor};

use crate::first_block::rows_of;
use crate::{Cases, TOLERANCE, difference, forward, golden, load};

/// Largest difference between adding and merging that rounding explains.
const MERGED: f64 = 3e-5;
const RANK: i64 = 4;

fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

/// A random side path beside a linear layer or a convolution, about a fifth as large as the layer.
fn side_path(weight: &Tensor) -> Option<LowRank> {
    let size = weight.size();
    let (&out, rest) = size.split_first()?;
    if rest.is_empty() {
        return None;
    }
    let inner: i64 = rest.iter().product();
    let down = random(&[&[RANK], rest].concat()) / (inner as f64).sqrt();
    let mut up = vec![out, RANK];
    up.resize(size.len(), 1);
    Some(LowRank { down, up: random(&up) * (0.2 / (RANK as f64).sqrt()) })
}

/// A weight with a side path merged into it.
fn merged(weight: &Tensor, path: &LowRank) -> Tensor {
    let (up, down) = (path.up.flatten(1, -1).to_kind(Kind::Double), path.down.flatten(1, -1).to_kind(Kind::Double));
    (weight.to_kind(Kind::Double) + up.matmul(&down).view(weight.size().as_slice())).to_kind(Kind::Float)
}

fn stack(unet: &TorchUnet, changes: Vec<(LayerId, LayerPatch)>) -> Arc<Stack> {
    Arc::new(unet.stack(changes).unwrap_or_else(|error| panic!("{error}")))
}

/// Side paths beside every linear layer and convolution; by stem.
fn everywhere(unet: &TorchUnet) -> BTreeMap<String, LowRank> {
    let path = |(id, stem): (LayerId, &str)| Some((stem.to_owned(), side_path(unet.weights(id)?.0)?));
    unet.layers().filter_map(path).collect()
}

fn added(unet: &TorchUnet, paths: &BTreeMap<String, LowRank>) -> Arc<Stack> {
    let change = |(stem, path): (&String, &LowRank)| {
        let path = LowRank { down: path.down.shallow_clone(), up: path.up.shallow_clone() };
        (unet.layer(stem).expect("a layer"), LayerPatch { low_rank: vec![path], replaced: None })
    };
    stack(unet, paths.iter().map(change).collect())
}

fn replaced(unet: &TorchUnet, paths: &BTreeMap<String, LowRank>) -> Arc<Stack> {
    let change = |(stem, path): (&String, &LowRank)| {
        let id = unet.layer(stem).expect("a layer");
        let (weight, bias) = unet.weights(id).expect("its weights");
        let replaced = Replaced { weight: merged(weight, path), bias: bias.map(Tensor::shallow_clone) };
        (id, LayerPatch { low_rank: Vec::new(), replaced: Some(replaced) })
    };
    stack(unet, paths.iter().map(change).collect())
}

fn for_rows(groups: &[(u32, u32, &Arc<Stack>)]) -> Patches {
    let mut patches = Patches::none();
    for &(first, rows, stack) in groups {
        patches.add(first, rows, Arc::clone(stack)).expect("rows in order");
    }
    patches
}

/// Writes the model with side paths merged into its weights.
fn write_merged(unet: &TorchUnet, paths: &BTreeMap<String, LowRank>, path: &Path) {
    let mut tensors = Vec::new();
    for (id, stem) in unet.layers() {
        let (weight, bias) = unet.weights(id).expect("its weights");
        let weight = paths.get(stem).map_or_else(|| weight.copy(), |path| merged(weight, path));
        tensors.push((format!("{stem}.weight"), weight));
        tensors.extend(bias.map(|bias| (format!("{stem}.bias"), bias.copy())));
    }
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, tensor)| {
            let shape = tensor.size().iter().map(|&extent| extent as usize).collect();
            let values = Vec::<f32>::try_from(tensor.flatten(0, -1)).expect("numbers");
            (name, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect())
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).expect("the shape is that of the bytes"))
    });
    safetensors::serialize_to_file(views, None, path).expect("the file can be written");
}

#[test]
fn side_paths_are_the_same_as_merged_weights() {
    let Some(folder) = golden() else { return };
    tch::manual_seed(1);
    let apart = tempfile::tempdir().expect("a temporary folder");
    let others = [("ssd", "ssd.diffusers"), ("sd2", "sd2.checkpoint"), ("koala", "koala.bare")];
    for (model, file) in [("sd15", "sd15.checkpoint"), ("sdxl", "sdxl.bare")].into_iter().chain(others) {
        let (unet, cases) = (load(&folder, file), Cases::of(&folder, model));
        let paths = everywhere(&unet);
        write_merged(&unet, &paths, &apart.path().join(format!("{model}.safetensors")));
        let trained = load(apart.path(), model);
        let (added, replaced) = (added(&unet, &paths), replaced(&unet, &paths));
        let mut worst = (0.0f64, 0.0f64, f64::INFINITY);
        for case in cases.names() {
            let input = cases.input(case);
            let expected = forward(&trained, &input);
            let rows = u32::try_from(input.x.size()[0]).expect("few rows");
            let with = |stack| unet.forward(&input, &for_rows(&[(0, rows, stack)])).expect("it runs");
            worst.0 = worst.0.max(difference(&with(&added), &expected));
            worst.1 = worst.1.max(difference(&with(&replaced), &expected));
            worst.2 = worst.2.min(difference(&forward(&unet, &input), &expected));
        }
        let (side, copy, effect) = worst;
        println!("{model}: {} layers, side paths {side:.1e}, copies {copy:.1e}, effect {effect:.1}", paths.len());
        assert!(side <= MERGED && copy <= MERGED && effect > 0.1, "{model}");
    }
}

#[test]
fn every_side_path_counts() {
    let Some(folder) = golden() else { return };
    tch::manual_seed(2);
    for (model, file, case) in [("sd15", "sd15.checkpoint", "shared"), ("sdxl", "sdxl.bare", "controlled")] {
        let (unet, cases) = (load(&folder, file), Cases::of(&folder, model));
        let input = cases.input(case);
        let plain = forward(&unet, &input);
        let mut counted = 0;
        for (stem, path) in everywhere(&unet) {
            let id = unet.layer(&stem).expect("a layer");
            let one = stack(&unet, vec![(id, LayerPatch { low_rank: vec![path], replaced: None })]);
            let effect = difference(&unet.forward(&input, &for_rows(&[(0, 2, &one)])).expect("it runs"), &plain);
            assert!(effect > 1e-4, "{model}: {stem} changes the result by {effect:e}");
            counted += 1;
        }
        println!("{model}: {counted} layers");
        assert!(counted > 60);
    }
}

#[test]
fn rows_do_not_see_the_adapters_of_others() {
    let Some(folder) = golden() else { return };
    tch::manual_seed(3);
    let (unet, cases) = (load(&folder, "sd15.checkpoint"), Cases::of(&folder, "sd15"));
    let input = cases.input("wide");
    let (first, second) = (everywhere(&unet), everywhere(&unet));
    let (first, second) = (added(&unet, &first), replaced(&unet, &second));
    let alone = |row: i64, patches: &Patches| {
        let one = input.try_map(&mut |tensor| Ok::<_, ()>(tensor.narrow(0, row, 1))).expect("one row");
        unet.forward(&one, patches).expect("it runs")
    };
    let arrangements: [&[(u32, &Arc<Stack>)]; 5] =
        [&[(0, &first), (2, &second)], &[(0, &second), (1, &first)], &[(1, &second)], &[(2, &first)], &[(0, &second)]];
    for groups in arrangements {
        let batch: Vec<_> = groups.iter().map(|&(row, stack)| (row, 1, stack)).collect();
        let together = unet.forward(&input, &for_rows(&batch)).expect("it runs");
        for row in 0..3 {
            let own = groups.iter().find(|(at, _)| i64::from(*at) == row);
            let patches = own.map_or_else(Patches::none, |(_, stack)| for_rows(&[(0, 1, stack)]));
            let off = difference(&together.narrow(0, row, 1), &alone(row, &patches));
            assert!(
                off <= TOLERANCE,
                "row {row} of {:?}: {off:e}",
                groups.iter().map(|(at, _)| at).collect::<Vec<_>>()
            );
        }
    }
    let after = forward(&unet, &input);
    assert!(difference(&after, &cases.out("wide")) <= TOLERANCE, "the model is as before");
}

#[test]
fn rows_that_are_run_apart_keep_their_adapters() {
    let Some(folder) = golden() else { return };
    tch::manual_seed(4);
    let (unet, cases) = (load(&folder, "sd15.checkpoint"), Cases::of(&folder, "sd15"));
    let input = cases.input("wide");
    let (first, second) = (added(&unet, &everywhere(&unet)), replaced(&unet, &everywhere(&unet)));
    let patches = for_rows(&[(0, 1, &first), (1, 2, &second)]);
    let whole = unet.forward(&input, &patches).expect("it runs");
    let started = unet.start(&input, &patches).expect("it starts");
    for order in [vec![2, 0], vec![1, 2], vec![2, 1, 0], vec![1]] {
        let some = started.select(&order).expect("rows that are there");
        let out = unet.finish(&some, &unet.rest(&some).expect("it runs")).expect("it ends");
        let expected = whole.index_select(0, &rows_of(&order));
        assert!(difference(&out, &expected) <= TOLERANCE, "{order:?}");
    }
}

#[test]
fn norms_and_biases_can_be_replaced_and_side_paths_add_to_copies() {
    let Some(folder) = golden() else { return };
    tch::manual_seed(5);
    let (unet, cases) = (load(&folder, "inpaint.bare"), Cases::of(&folder, "inpaint"));
    let input = cases.input("plain");
    let plain = forward(&unet, &input);
    for stem in ["out.0", "input_blocks.1.0.in_layers.0", "input_blocks.1.1.norm", "out.2", "time_embed.0"] {
        let id = unet.layer(stem).expect("a layer");
        let (weight, bias) = unet.weights(id).expect("its weights");
        let bias = bias.expect("a bias") + 0.5;
        let own = Replaced { weight: weight.copy(), bias: Some(bias) };
        let changed = stack(&unet, vec![(id, LayerPatch { low_rank: Vec::new(), replaced: Some(own) })]);
        let out = unet.forward(&input, &for_rows(&[(1, 1, &changed)])).expect("it runs");
        assert!(difference(&out.narrow(0, 0, 1), &plain.narrow(0, 0, 1)) <= TOLERANCE, "{stem}: the other row");
        assert!(difference(&out.narrow(0, 1, 1), &plain.narrow(0, 1, 1)) > 1e-3, "{stem}");
    }
    // A layer without a bias takes one; two side paths and a copy add up.
    let id = unet.layer("input_blocks.1.1.transformer_blocks.0.attn1.to_v").expect("a layer");
    let (weight, bias) = unet.weights(id).expect("its weights");
    assert!(bias.is_none());
    let bias = random(&weight.size()[..1]);
    let [one, two] = [(); 2].map(|()| side_path(weight).expect("a matrix"));
    let all = merged(&merged(weight, &one), &two);
    let copy = |weight: Tensor| Some(Replaced { weight, bias: Some(bias.shallow_clone()) });
    let split = LayerPatch { replaced: copy(weight.copy()), low_rank: vec![one, two] };
    let whole = LayerPatch { replaced: copy(all), low_rank: Vec::new() };
    let run = |patch| unet.forward(&input, &for_rows(&[(0, 2, &stack(&unet, vec![(id, patch)]))])).expect("it runs");
    let (split, whole) = (run(split), run(whole));
    assert!(difference(&split, &whole) <= MERGED && difference(&whole, &plain) > 1e-3);
}

#[test]
fn changes_that_do_not_fit_are_refused_by_the_layers_name() {
    let Some(folder) = golden() else { return };
    let unet = load(&folder, "sd15.checkpoint");
    let refused = |stem: &str, patch: LayerPatch, says: &str| {
        let error = unet.stack(vec![(unet.layer(stem).expect("a layer"), patch)]).expect_err("it does not fit");
        assert!(matches!(error, ModelError::Adapter { .. }));
        let words = error.to_string();
        assert!(words.contains(stem) && words.contains(says), "{words}");
    };
    let low = |down: &[i64], up: &[i64]| LayerPatch {
        low_rank: vec![LowRank { down: random(down), up: random(up) }],
        replaced: None,
    };
    let copy = |weight: &[i64], bias: Option<&[i64]>| LayerPatch {
        low_rank: Vec::new(),
        replaced: Some(Replaced { weight: random(weight), bias: bias.map(random) }),
    };
    let linear = "input_blocks.1.1.transformer_blocks.0.attn2.to_k";
    refused(linear, low(&[4, 41], &[64, 4]), "[4, 41]");
    refused(linear, low(&[4, 40], &[65, 4]), "[65, 4]");
    refused(linear, low(&[4, 40], &[64, 5]), "[64, 5]");
    refused(linear, low(&[0, 40], &[64, 0]), "[0, 40]");
    refused(linear, low(&[4, 40, 1, 1], &[64, 4, 1, 1]), "[4, 40, 1, 1]");
    refused(linear, copy(&[40, 64], None), "[40, 64]");
    refused(linear, copy(&[64, 40], Some(&[40])), "[40]");
    let conv = "input_blocks.2.0.op";
    refused(conv, low(&[4, 64, 1, 1], &[64, 4, 1, 1]), "[4, 64, 1, 1]");
    refused(conv, low(&[4, 64, 3, 3], &[64, 4, 3, 3]), "[64, 4, 3, 3]");
    refused("out.0", low(&[4, 64], &[64, 4]), "[4, 64]");
    let whole = LowRank { down: random(&[4, 40]).to_kind(Kind::Int64), up: random(&[64, 4]) };
    refused(linear, LayerPatch { low_rank: vec![whole], replaced: None }, "elements");
    refused(
        linear,
        LayerPatch { low_rank: vec![LowRank { down: Tensor::new(), up: Tensor::new() }], replaced: None },
        "",
    );
    let id = unet.layer(linear).expect("a layer");
    let twice = unet.stack(vec![(id, low(&[4, 40], &[64, 4])), (id, low(&[4, 40], &[64, 4]))]);
    assert!(matches!(twice, Err(ModelError::Adapter { .. })));
    assert!(unet.layer("input_blocks.1.1.to_nowhere").is_none());
}

#[test]
fn stacks_belong_to_rows_that_are_there_and_to_one_model() {
    let Some(folder) = golden() else { return };
    let (unet, other) = (load(&folder, "sd15.checkpoint"), load(&folder, "sd15.checkpoint"));
    let input = Cases::of(&folder, "sd15").input("plain");
    let path = || LowRank { down: random(&[4, 64]), up: random(&[64, 4]) };
    let id = unet.layer("input_blocks.1.1.transformer_blocks.0.attn1.to_q").expect("a layer");
    let own = stack(&unet, vec![(id, LayerPatch { low_rank: vec![path(), path()], replaced: None })]);
    assert_eq!(own.size_bytes(), 4 * 4 * 4 * 64);
    let mut patches = for_rows(&[(0, 1, &own)]);
    assert!(patches.add(0, 1, Arc::clone(&own)).is_err(), "a row twice");
    assert!(patches.add(1, 0, Arc::clone(&own)).is_err(), "no rows");
    for (model, rows) in [(&unet, 3), (&other, 2)] {
        let refused = model.forward(&input, &for_rows(&[(0, rows, &own)]));
        assert!(matches!(refused, Err(ModelError::Executor { .. })), "{refused:?}");
    }
    assert!(unet.forward(&input, &for_rows(&[(0, 2, &own)])).is_ok());
}

#[test]
fn layers_are_named_as_single_files_name_them() {
    let Some(folder) = golden() else { return };
    for (single, folders) in [("sd15.checkpoint", "sd15.diffusers")] {
        let (one, two) = (load(&folder, single), load(&folder, folders));
        let stems = |unet: &TorchUnet| unet.layers().map(|(_, stem)| stem.to_owned()).collect::<Vec<_>>();
        assert_eq!(stems(&one), stems(&two));
        let file = ModelFile::open(&folder.join(format!("{single}.safetensors"))).expect("a file");
        let prefix = if single == "sd15.checkpoint" { "model.diffusion_model." } else { "" };
        for (id, stem) in one.layers() {
            assert_eq!(one.layer(stem), Some(id));
            let (weight, bias) = one.weights(id).expect("its weights");
            let stored = |part: &str| file.tensor(&format!("{prefix}{stem}.{part}"));
            let shape: Vec<i64> = stored("weight").expect(stem).shape.iter().map(|&extent| extent as i64).collect();
            assert_eq!((weight.size(), bias.is_some()), (shape, stored("bias").is_some()), "{stem}");
            assert_eq!(weight, two.weights(id).expect("its weights").0, "{stem}");
        }
    }
}
