//! Files of every element type, and files that are none.

use luna_broker::ErrorKind;
use luna_broker::protocol::Rung;
use luna_broker::tensor::DType;
use safetensors::tensor::Dtype;

use crate::file::{counted, write};
use crate::scene::Scene;
use crate::support::{client_at, connect};

#[test]
fn every_element_type_scalars_and_empty_tensors_are_as_stored() {
    let scene = Scene::new(&[]);
    let path = scene.place.file("kinds.safetensors");
    let types = [
        ("bool", Dtype::BOOL, DType::Bool, 1),
        ("u8", Dtype::U8, DType::U8, 1),
        ("i8", Dtype::I8, DType::I8, 1),
        ("u16", Dtype::U16, DType::U16, 2),
        ("i16", Dtype::I16, DType::I16, 2),
        ("u32", Dtype::U32, DType::U32, 4),
        ("i32", Dtype::I32, DType::I32, 4),
        ("u64", Dtype::U64, DType::U64, 8),
        ("i64", Dtype::I64, DType::I64, 8),
        ("e4m3", Dtype::F8_E4M3, DType::F8E4M3Fn, 1),
        ("e5m2", Dtype::F8_E5M2, DType::F8E5M2, 1),
        ("f16", Dtype::F16, DType::F16, 2),
        ("bf16", Dtype::BF16, DType::Bf16, 2),
        ("f32", Dtype::F32, DType::F32, 4),
        ("f64", Dtype::F64, DType::F64, 8),
    ];
    let data = |size: usize| -> Vec<u8> { (0..3 * size).map(|at| at as u8 % 2).collect() };
    let mut tensors: Vec<_> =
        types.iter().map(|(key, stored, _, size)| (*key, *stored, vec![3], data(*size))).collect();
    tensors.push(("scalar", Dtype::F32, vec![], 7f32.to_le_bytes().to_vec()));
    tensors.push(("empty", Dtype::F32, vec![2, 0, 3], vec![]));
    write(&path, &tensors);
    let client = client_at(&scene.place);
    let header = client.header(path.to_str().unwrap()).unwrap();
    let inline = connect(&scene.place, |config| config.rung = Some(Rung::Inline));
    assert_eq!(inline.header(path.to_str().unwrap()).unwrap(), header, "it takes no memory that is shared");
    assert!(client.status().unwrap().weights.is_empty(), "a header loads nothing");
    let weights = client.attach(path.to_str().unwrap()).unwrap();
    assert_eq!((weights.len(), header.len()), (tensors.len(), tensors.len()));
    for (key, meta) in &header {
        assert_eq!(weights.tensor(key).unwrap().meta(), meta, "{key}");
    }
    for (key, _, dtype, size) in types {
        let tensor = weights.tensor(key).unwrap();
        assert_eq!((tensor.meta().dtype, tensor.to_vec().unwrap()), (dtype, data(size)), "{key}");
    }
    assert_eq!(weights.tensor("scalar").unwrap().values::<f32>().unwrap(), [7.0]);
    let empty = weights.tensor("empty").unwrap();
    assert_eq!((empty.meta().shape.as_slice(), empty.to_vec().unwrap().len()), (&[2u64, 0, 3][..], 0));
    scene.check_bystander();
}

#[test]
fn what_is_no_file_of_tensors_is_named_with_a_remedy() {
    let scene = Scene::new(&[]);
    let client = client_at(&scene.place);
    let path = |name: &str| scene.place.file(name).to_str().unwrap().to_owned();
    let whole = std::fs::read(counted(&scene.place, "whole.safetensors", 2, 500)).unwrap();
    std::fs::write(path("truncated.safetensors"), &whole[..whole.len() - 10]).unwrap();
    std::fs::write(path("cut-header.safetensors"), &whole[..20]).unwrap();
    std::fs::write(path("empty.safetensors"), []).unwrap();
    std::fs::write(path("pickle.ckpt"), [0x80, 2, 0x7d, 0x71, 0, 0x2e, 0, 0, 0, 0]).unwrap();
    std::fs::create_dir(path("folder")).unwrap();
    write(scene.place.file("no-tensors.safetensors").as_path(), &[]);
    let mut header = br#"{"t0":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}  "#.to_vec();
    let mut half_bytes = (header.len() as u64).to_le_bytes().to_vec();
    half_bytes.append(&mut header);
    half_bytes.push(0);
    std::fs::write(path("half-bytes.safetensors"), half_bytes).unwrap();
    let cases = [
        ("truncated.safetensors", ErrorKind::InvalidModel),
        ("cut-header.safetensors", ErrorKind::InvalidModel),
        ("empty.safetensors", ErrorKind::InvalidModel),
        ("pickle.ckpt", ErrorKind::InvalidModel),
        ("folder", ErrorKind::InvalidModel),
        ("no-tensors.safetensors", ErrorKind::InvalidModel),
        ("half-bytes.safetensors", ErrorKind::Unsupported),
        ("missing.safetensors", ErrorKind::ModelNotFound),
        ("builtin:hand-off", ErrorKind::ModelNotFound),
    ];
    for (name, kind) in cases {
        let given = if name.starts_with("builtin") { name.to_owned() } else { path(name) };
        let error = client.attach(&given).unwrap_err();
        eprintln!("{name}: {:?}: {error} ({})", error.kind(), error.remedy());
        assert_eq!(error.kind(), kind, "{name}: {error}");
        assert!(error.message().contains(name) && !error.remedy().is_empty(), "{name}: {error}");
    }
    assert!(scene.bystander.status().unwrap().weights.is_empty());
    scene.check_bystander();
}
