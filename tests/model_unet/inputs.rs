//! What a call may bring, and what is refused before anything is computed.

use luna_broker::error::{Error, ErrorKind};
use luna_broker::model::torch::{LoadOptions, Patches, Target, TorchUnet, load_unet};
use luna_broker::model::{Control, ModelError, ModelFile, UnetInput, WeightStorage};
use std::sync::Arc;
use tch::{Kind, Tensor};

use crate::{Cases, TOLERANCE, difference, forward, golden, load};

fn refused(unet: &TorchUnet, input: &UnetInput<Tensor>, says: &[&str]) {
    let error = unet.forward(input, &Patches::none()).expect_err("it is refused");
    let words = error.to_string();
    assert!(says.iter().all(|part| words.contains(part)), "{words} does not say {says:?}");
    let error = Error::from(error);
    assert_eq!(error.kind(), ErrorKind::InvalidTensor, "{words}");
}

/// The input with one thing changed.
fn changed(input: &UnetInput<Tensor>, change: impl FnOnce(&mut UnetInput<Tensor>)) -> UnetInput<Tensor> {
    let mut copy = input.try_map(&mut |tensor| Ok::<_, ()>(tensor.shallow_clone())).expect("a copy");
    change(&mut copy);
    copy
}

fn zeros(shape: &[i64]) -> Tensor {
    Tensor::zeros(shape, (Kind::Float, tch::Device::Cpu))
}

#[test]
fn tensors_that_do_not_fit_are_refused_with_what_would() {
    let Some(folder) = golden() else { return };
    let (unet, cases) = (load(&folder, "sdxl.bare"), Cases::of(&folder, "sdxl"));
    let good = cases.input("plain");
    let vector = good.y.as_ref().expect("a vector").size()[1];
    let expected = format!("[2, {vector}]");
    refused(&unet, &changed(&good, |input| input.y = None), &["needs y", &expected, "sdxl.bare"]);
    refused(&unet, &changed(&good, |input| input.y = Some(zeros(&[2, vector + 1]))), &["y: expected", &expected]);
    refused(&unet, &changed(&good, |input| input.y = Some(zeros(&[1, vector]))), &["y: expected", &expected]);
    refused(
        &unet,
        &changed(&good, |input| input.context = zeros(&[2, 7, 40])),
        &["context", "[2, any, 48]", "[2, 7, 40]"],
    );
    refused(&unet, &changed(&good, |input| input.context = zeros(&[1, 7, 48])), &["context", "[2, any, 48]"]);
    refused(&unet, &changed(&good, |input| input.context = zeros(&[2, 0, 48])), &["context"]);
    refused(&unet, &changed(&good, |input| input.context = zeros(&[2, 48])), &["context"]);
    refused(&unet, &changed(&good, |input| input.x = zeros(&[2, 9, 18, 18])), &["x: expected", "[B, 4, h, w]"]);
    refused(&unet, &changed(&good, |input| input.x = zeros(&[2, 4, 18])), &["x: expected"]);
    refused(&unet, &changed(&good, |input| input.x = zeros(&[2, 4, 0, 18])), &["x: expected"]);
    refused(&unet, &changed(&good, |input| input.x = zeros(&[0, 4, 18, 18])), &["x: expected"]);
    refused(&unet, &changed(&good, |input| input.timesteps = zeros(&[1])), &["timesteps", "[2]"]);
    refused(&unet, &changed(&good, |input| input.timesteps = zeros(&[2, 1])), &["timesteps", "[2]"]);
    let whole = Tensor::from_slice(&[1i64, 2]);
    refused(&unet, &changed(&good, |input| input.timesteps = whole), &["timesteps", "floating-point", "int64"]);
    let plain = load(&folder, "sd15.checkpoint");
    let good = Cases::of(&folder, "sd15").input("plain");
    refused(&plain, &changed(&good, |input| input.y = Some(zeros(&[2, 72]))), &["no place for y", "sd15.checkpoint"]);
    let undefined = plain.forward(&changed(&good, |input| input.x = Tensor::new()), &Patches::none());
    assert!(matches!(undefined, Err(ModelError::Executor { .. })), "{undefined:?}");
    assert!(difference(&forward(&plain, &good), &Cases::of(&folder, "sd15").out("plain")) <= TOLERANCE, "it goes on");
}

#[test]
fn control_of_another_shape_is_refused_with_the_one_that_fits() {
    let Some(folder) = golden() else { return };
    let (unet, cases) = (load(&folder, "sd15.checkpoint"), Cases::of(&folder, "sd15"));
    let good = cases.input("controlled");
    let with = |change: &dyn Fn(&mut Control<Tensor>)| {
        changed(&good, |input| change(input.control.as_mut().expect("a control")))
    };
    let wrong = |shape: &'static [i64]| move |control: &mut Control<Tensor>| control.output[5] = Some(zeros(shape));
    // The last of the list is for the lowest resolution: 10 × 14 halved twice.
    refused(&unet, &with(&wrong(&[2, 64, 10, 14])), &["control.output", "[2, 64, 3, 4]", "[2, 64, 10, 14]"]);
    refused(&unet, &with(&wrong(&[2, 96, 3, 4])), &["control.output", "[2, 64, 3, 4]"]);
    refused(&unet, &with(&wrong(&[3, 64, 3, 4])), &["control.output", "[2, 64, 3, 4]"]);
    refused(&unet, &with(&|control| control.middle = vec![Some(zeros(&[2, 96, 3, 4]))]), &["control.middle"]);
    refused(
        &unet,
        &with(&|control| control.input = vec![Some(zeros(&[2, 64, 3, 4]))]),
        &["control.input", "[2, 64, 10, 14]"],
    );
    refused(&unet, &with(&|control| control.output.insert(0, None)), &["control.output", "7 elements", "6 places"]);
    refused(&unet, &with(&|control| control.middle.push(None)), &["control.middle", "2 elements"]);
}

#[test]
fn lists_of_control_are_used_up_from_their_end() {
    let Some(folder) = golden() else { return };
    let (unet, cases) = (load(&folder, "sd15.checkpoint"), Cases::of(&folder, "sd15"));
    let good = cases.input("controlled");
    // A list cut at its start leaves the last blocks without, as holes there do.
    let short = changed(&good, |input| drop(input.control.as_mut().expect("a control").output.drain(..3)));
    let holes = changed(&good, |input| input.control.as_mut().expect("a control").output[..3].fill_with(|| None));
    assert_eq!(forward(&unet, &short), forward(&unet, &holes));
    assert!(difference(&forward(&unet, &short), &cases.out("controlled")) > 1e-3, "control does something");
    let none = changed(&good, |input| input.control = Some(Control::default()));
    let without = changed(&good, |input| input.control = None);
    assert_eq!(forward(&unet, &none), forward(&unet, &without));
}

#[test]
fn the_result_has_the_element_type_of_the_latent() {
    let Some(folder) = golden() else { return };
    for (model, file, case) in [("sd15", "sd15.checkpoint", "controlled"), ("sdxl", "sdxl.bare", "plain")] {
        let (unet, cases) = (load(&folder, file), Cases::of(&folder, model));
        let input = cases.input(case);
        for kind in [Kind::Half, Kind::BFloat16, Kind::Double] {
            let cast = input.try_map(&mut |tensor| Ok::<_, ()>(tensor.to_kind(kind))).expect("a cast");
            let out = forward(&unet, &cast);
            assert_eq!(out.kind(), kind);
            let exact = cast.try_map(&mut |tensor| Ok::<_, ()>(tensor.to_kind(Kind::Float))).expect("a cast");
            assert_eq!(out, forward(&unet, &exact).to_kind(kind), "only what goes in and comes out is rounded");
        }
    }
}

#[test]
fn the_order_of_dimensions_in_memory_does_not_matter() {
    let Some(folder) = golden() else { return };
    let (unet, cases) = (load(&folder, "sd15.checkpoint"), Cases::of(&folder, "sd15"));
    for case in cases.names() {
        let input = cases.input(case);
        let turned = input.try_map(&mut |tensor| {
            let last = tensor.dim() as i64 - 1;
            Ok::<_, ()>(tensor.transpose(0, last).contiguous().transpose(0, last))
        });
        assert_eq!(forward(&unet, &turned.expect("views")), forward(&unet, &input), "{case}");
    }
    // A timestep that one element in memory stands for, as some samplers pass it.
    let one = cases.input("controlled");
    let repeated = changed(&one, |input| input.timesteps = Tensor::from_slice(&[720f32]).expand([2], false));
    assert_eq!(forward(&unet, &repeated), forward(&unet, &one));
}

#[test]
fn a_row_does_not_depend_on_the_batch_it_is_in() {
    let Some(folder) = golden() else { return };
    for (model, file, case) in [("sd15", "sd15.checkpoint", "wide"), ("sdxl", "sdxl.bare", "plain")] {
        let (unet, cases) = (load(&folder, file), Cases::of(&folder, model));
        let input = cases.input(case);
        let all = forward(&unet, &input);
        for row in 0..input.x.size()[0] {
            let one = input.try_map(&mut |tensor| Ok::<_, ()>(tensor.narrow(0, row, 1))).expect("one row");
            assert!(difference(&forward(&unet, &one), &all.narrow(0, row, 1)) <= TOLERANCE, "{model} row {row}");
        }
    }
}

#[test]
fn latents_of_any_size_run() {
    let Some(folder) = golden() else { return };
    let (unet, cases) = (load(&folder, "sdxl.bare"), Cases::of(&folder, "sdxl"));
    let good = cases.input("plain");
    for (height, width) in [(1, 1), (1, 9), (3, 2), (5, 31)] {
        let input =
            changed(&good, |input| input.x = Tensor::randn([2, 4, height, width], (Kind::Float, tch::Device::Cpu)));
        let out = forward(&unet, &input);
        assert_eq!(out.size(), [2, 4, height, width]);
        assert!(out.isfinite().all().int64_value(&[]) == 1);
    }
}

#[test]
fn a_file_that_changed_is_not_computed_with() {
    let Some(folder) = golden() else { return };
    let apart = tempfile::tempdir().expect("a temporary folder");
    let path = apart.path().join("unet.safetensors");
    std::fs::copy(folder.join("inpaint.bare.safetensors"), &path).expect("a copy");
    let load = |storage| {
        let file = Arc::new(ModelFile::open(&path).expect("a valid file"));
        let (target, memory) = (&Target::Cpu, &luna_broker::device::InProcessDevice);
        load_unet(file, LoadOptions { target, storage, memory, progress: &|_, _| {} }).expect("it is supported")
    };
    let (mapped, copied) = (load(WeightStorage::Mapped), load(WeightStorage::Copied));
    let cases = Cases::of(&folder, "inpaint");
    std::fs::rename(folder_copy(&folder, apart.path()), &path).expect("replaced");
    let refused = mapped.forward(&cases.input("plain"), &Patches::none());
    assert!(matches!(refused, Err(ModelError::Changed { .. })), "{refused:?}");
    assert!(difference(&forward(&copied, &cases.input("plain")), &cases.out("plain")) <= TOLERANCE);
}

fn folder_copy(folder: &std::path::Path, apart: &std::path::Path) -> std::path::PathBuf {
    let other = apart.join("other.safetensors");
    std::fs::copy(folder.join("quiet.bare.safetensors"), &other).expect("a copy");
    other
}
