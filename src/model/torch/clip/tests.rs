use tch::{Device, Kind, TchError, Tensor};

use super::super::super::layout::Linear;
use super::linear::{Adapters, NoAdapters, linear};

const WIDTH: i64 = 64;

fn random(shape: &[i64]) -> Tensor {
    Tensor::f_randn(shape, (Kind::Float, Device::Cpu)).expect("numbers")
}

fn layer(rows: i64, stems: &[&str]) -> Linear<Tensor> {
    let (weight, bias) = (random(&[rows, WIDTH]), Some(random(&[rows])));
    Linear { weight, bias, stems: stems.iter().map(|stem| (*stem).to_owned()).collect() }
}

/// Adds x · delta to one stem's rows.
#[derive(Debug)]
struct One {
    stem: &'static str,
    delta: Tensor,
}

impl Adapters for One {
    fn add(&self, stem: &str, x: &Tensor, y: &mut Tensor) -> Result<(), TchError> {
        if stem == self.stem {
            let _ = y.f_add_(&x.f_linear(&self.delta, None::<&Tensor>)?)?;
        }
        Ok(())
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
        let got = linear(&fused, &x, &One { stem, delta }).expect("a result");
        assert!(largest_difference(&got, &expected) < 1e-4, "{stem}");
        assert!(largest_difference(&got, &plain) > 1.0, "{stem} does something");
    }
    let after = linear(&fused, &x, &NoAdapters).expect("a result");
    assert!(largest_difference(&after, &plain) == 0.0, "the weights are shared and stay as they are");
}
