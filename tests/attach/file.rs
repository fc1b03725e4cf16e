//! Safetensors files for tests.

use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};

use crate::support::Place;

/// A tensor's elements, counted up from `start`, as float32.
pub(crate) fn floats(start: f32, count: usize) -> Vec<f32> {
    (0..count).map(|at| start + at as f32).collect()
}

pub(crate) fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A file of `count` float32 tensors `t0`, `t1` … of `length` elements each, which count up from `1000 × number`.
pub(crate) fn counted(place: &Place, name: &str, count: usize, length: usize) -> PathBuf {
    let path = place.file(name);
    write_counted(&path, count, length, 0.0);
    path
}

/// As [`counted`], with `plus` added to every element.
pub(crate) fn write_counted(path: &Path, count: usize, length: usize, plus: f32) {
    let data: Vec<(String, Vec<u8>)> =
        (0..count).map(|at| (format!("t{at}"), bytes(&floats(plus + 1000.0 * at as f32, length)))).collect();
    let views = data
        .iter()
        .map(|(key, bytes)| (key.as_str(), TensorView::new(Dtype::F32, vec![length], bytes).expect("the bytes fit")));
    let serialized = safetensors::serialize(views, None).expect("the tensors can be written");
    // As people replace models: whoever has the old file open keeps it.
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, serialized).expect("the folder is writable");
    std::fs::rename(&fresh, path).expect("the folder is writable");
}
