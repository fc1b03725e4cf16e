use half::{bf16, f16};
use proptest::prelude::*;

use crate::model::weights::cast::{CastError, cast};
use crate::tensor::DType;

const FLOATS: [DType; 4] = [DType::F16, DType::Bf16, DType::F32, DType::F64];

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn converted(from: DType, to: DType, source: &[u8]) -> Vec<u8> {
    let mut target = vec![0xaa; source.len() / from.size_bytes() * to.size_bytes()];
    cast(from, to, source, &mut target).unwrap();
    target
}

#[test]
fn conversions_are_what_torch_makes_of_them() {
    let mut pairs = 0;
    for line in include_str!("../../../../tests/golden/casts.txt").lines() {
        let [from, to, source, target]: [&str; 4] = line.split(' ').collect::<Vec<_>>().try_into().unwrap();
        let (from, to) = (DType::from_name(from).unwrap(), DType::from_name(to).unwrap());
        let (source, expected) = (unhex(source), unhex(target));
        let got = converted(from, to, &source);
        let elements = source.chunks(from.size_bytes());
        for (source, (expected, got)) in elements.zip(expected.chunks(to.size_bytes()).zip(got.chunks(to.size_bytes())))
        {
            assert_eq!(got, expected, "{from} {source:02x?} to {to}");
        }
        pairs += 1;
    }
    assert_eq!(pairs, 2 * 4 + 4 * 3);
}

/// One element by the scalar conversions of the library, without blocks and tables.
fn naive(from: DType, to: DType, source: &[u8]) -> Vec<u8> {
    let value = match from {
        DType::F16 => f16::from_le_bytes(source.try_into().unwrap()).to_f32(),
        DType::Bf16 => f32::from_bits(u32::from(u16::from_le_bytes(source.try_into().unwrap())) << 16),
        DType::F32 => f32::from_le_bytes(source.try_into().unwrap()),
        _ => f64::from_le_bytes(source.try_into().unwrap()) as f32,
    };
    match to {
        DType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        DType::Bf16 if value.is_nan() => 0x7fc0u16.to_le_bytes().to_vec(),
        DType::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        DType::F32 => value.to_le_bytes().to_vec(),
        _ => f64::from(value).to_le_bytes().to_vec(),
    }
}

proptest! {
    #[test]
    fn any_number_of_any_elements_anywhere_in_memory(
        bytes in prop::collection::vec(any::<u8>(), 0..6000),
        from in prop::sample::select(&FLOATS),
        to in prop::sample::select(&FLOATS),
        skip in 0usize..8,
    ) {
        prop_assume!(from != to);
        let source = bytes.get(skip..).unwrap_or_default();
        let source = &source[..source.len() / from.size_bytes() * from.size_bytes()];
        let mut room = vec![0; skip + source.len() / from.size_bytes() * to.size_bytes()];
        cast(from, to, source, &mut room[skip..]).unwrap();
        let expected: Vec<u8> = source.chunks(from.size_bytes()).flat_map(|element| naive(from, to, element)).collect();
        prop_assert_eq!(&room[skip..], &expected[..]);
    }
}

#[test]
fn zero_is_zero_in_every_type() {
    for from in FLOATS.into_iter().chain([DType::F8E4M3Fn, DType::F8E5M2]) {
        for to in FLOATS {
            assert!(converted(from, to, &[0; 16]).iter().all(|&byte| byte == 0), "{from} to {to}");
        }
    }
}

#[test]
fn nan_stays_nan_and_signalling_ones_become_quiet() {
    assert_eq!(converted(DType::F32, DType::Bf16, &0xff81_2345_u32.to_le_bytes()), 0x7fc0_u16.to_le_bytes());
    assert_eq!(converted(DType::F32, DType::F16, &0x7f80_0001_u32.to_le_bytes()), 0x7e00_u16.to_le_bytes());
    assert_eq!(converted(DType::F16, DType::F32, &0xfc01_u16.to_le_bytes()), 0xffc0_2000_u32.to_le_bytes());
}

#[test]
fn what_is_not_converted_is_refused_and_nothing_is_written() {
    let mut target = [7; 4];
    let pair = |from, to| Err(CastError::Pair { from, to });
    assert_eq!(cast(DType::I32, DType::F32, &[0; 4], &mut target), pair(DType::I32, DType::F32));
    assert_eq!(cast(DType::F32, DType::F8E5M2, &[0; 16], &mut target), pair(DType::F32, DType::F8E5M2));
    for (source, length) in [(3, 4), (2, 3), (4, 4), (0, 4)] {
        let refused = cast(DType::F16, DType::F32, &vec![0; source], &mut target[..length]);
        assert!(matches!(refused, Err(CastError::Lengths { .. })), "{source} {length}");
    }
    assert_eq!(target, [7; 4]);
}
