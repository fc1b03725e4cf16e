//! Safetensors files for tests.

use std::path::{Path, PathBuf};

use luna_broker::Error;
use luna_broker::client::{CallOptions, Client, Published, Weights};
use luna_broker::tensor::{DType, Dims, TensorMeta};
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

/// A file of whatever tensors, as element type, shape and bytes by key.
pub(crate) fn write(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) {
    let views = tensors.iter().map(|(key, dtype, shape, bytes)| {
        (*key, TensorView::new(*dtype, shape.clone(), bytes).expect("the bytes fit the shape"))
    });
    std::fs::write(path, safetensors::serialize(views, None).expect("the tensors can be written")).unwrap();
}

/// A file whose one tensor `t0`, float32, takes `size_bytes`, of which the disk stores none: all are zero.
pub(crate) fn sparse(place: &Place, name: &str, size_bytes: u64) -> PathBuf {
    let path = place.file(name);
    let mut header =
        format!(r#"{{"t0":{{"dtype":"F32","shape":[{}],"data_offsets":[0,{size_bytes}]}}}}"#, size_bytes / 4);
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    std::fs::write(&path, &bytes).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(bytes.len() as u64 + size_bytes).unwrap();
    path
}

/// Publishes one float32 tensor `t0` that counts up from `start`.
pub(crate) fn publish(client: &Client, name: &str, start: f32, length: usize) -> Result<Weights, Error> {
    let bytes = bytes(&floats(start, length));
    let meta = TensorMeta::contiguous(DType::F32, Dims::of([length as u64]));
    client.publish(name, &[Published { key: "t0", meta, bytes: &bytes }], &CallOptions::default())
}

/// The first element of a tensor.
pub(crate) fn first(weights: &Weights, key: &str) -> f32 {
    weights.tensor(key).unwrap().values::<f32>().unwrap()[0]
}
