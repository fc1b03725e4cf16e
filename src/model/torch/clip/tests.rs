use tch::{Device, Kind, Tensor};

use super::super::super::layout::Linear;
use super::super::unet::{LayerPatch, LowRank, Replaced};
use super::linear::{Adapters, NoAdapters, linear};

const WIDTH: i64 = 64;

fn random(shape: &[i64]) -> Tensor {
    Tensor::f_randn(shape, (Kind::Float, Device::Cpu)).expect("numbers")
}

fn layer(rows: i64, stems: &[&str]) -> Linear<Tensor> {
    let (weight, bias) = (random(&[rows, WIDTH]), Some(random(&[rows])));
    Linear { weight, bias, stems: stems.iter().map(|stem| (*stem).to_owned()).collect() }
}

/// Changes one stem's rows.
#[derive(Debug)]
struct One {
    stem: &'static str,
    patch: LayerPatch,
}

impl Adapters for One {
    fn patch(&self, stem: &str) -> Option<&LayerPatch> {
        (stem == self.stem).then_some(&self.patch)
    }
}

fn largest_difference(left: &Tensor, right: &Tensor) -> f64 {
    let off = left.f_sub(right).and_then(|off| off.f_abs()?.f_max()).expect("of one shape");
    off.f_double_value(&[]).expect("a number")
}

#[test]
fn an_adapter_of_one_name_changes_its_share_of_the_rows_as_a_merged_weight_would() {
    let stems = ["q", "k", "v"];
    let fused = layer(3 * WIDTH, &stems);
    let x = random(&[2, 5, WIDTH]);
    let plain = linear(&fused, &x, &NoAdapters).expect("a result");
    for (third, stem) in stems.into_iter().enumerate() {
        let delta = random(&[WIDTH, WIDTH]);
        let mut parts: Vec<_> = stems.map(|_| Tensor::zeros_like(&delta)).into();
        parts[third] = delta.shallow_clone();
        let weight = fused.weight.f_add(&Tensor::f_cat(&parts, 0).expect("three thirds")).expect("a merged weight");
        let merged =
            Linear { weight, bias: fused.bias.as_ref().map(Tensor::shallow_clone), stems: fused.stems.clone() };
        let expected = linear(&merged, &x, &NoAdapters).expect("a result");
        let thirds = |tensor: &Tensor| tensor.f_narrow(0, third as i64 * WIDTH, WIDTH).expect("a third");
        let whole = Replaced { weight: thirds(&merged.weight), bias: merged.bias.as_ref().map(thirds) };
        let one = Tensor::f_eye(WIDTH, (Kind::Float, Device::Cpu)).expect("a matrix");
        let beside = LayerPatch { low_rank: vec![LowRank { down: delta, up: one }], replaced: None };
        let instead = LayerPatch { low_rank: Vec::new(), replaced: Some(whole) };
        for patch in [beside, instead] {
            let got = linear(&fused, &x, &One { stem, patch }).expect("a result");
            assert!(largest_difference(&got, &expected) < 1e-4, "{stem}");
            assert!(largest_difference(&got, &plain) > 1.0, "{stem} does something");
        }
    }
    let after = linear(&fused, &x, &NoAdapters).expect("a result");
    assert!(largest_difference(&after, &plain) == 0.0, "the weights are shared and stay as they are");
}
