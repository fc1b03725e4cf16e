use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::tensor::DType;

/// Elements converted at a time: their stages stay in the innermost cache.
const BLOCK: usize = 256;

/// Why bytes could not be converted from one element type to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CastError {
    /// One of the two is no floating-point type that is converted.
    #[error("{from} is not converted to {to}")]
    Pair {
        /// The type converted from.
        from: DType,
        /// The type converted to.
        to: DType,
    },
    /// The two do not hold the same number of whole elements.
    #[error("{source_bytes} bytes of {from} do not become {target_bytes} bytes of {to}")]
    Lengths {
        /// The type converted from.
        from: DType,
        /// Bytes given.
        source_bytes: usize,
        /// The type converted to.
        to: DType,
        /// Bytes to be written.
        target_bytes: usize,
    },
}

/// Whether [`cast`] converts `from` to `to`; every type is converted to itself.
pub(super) fn is_possible(from: DType, to: DType) -> bool {
    from == to || ((from.is_float() || from.is_float8()) && to.is_float())
}

/// Converts the elements of `source` to those of `target`, both little-endian and anywhere in memory, rounding to the
/// nearest and ties to even; what is too large becomes infinite.
///
/// The results are torch's, bit for bit: float64 becomes a 16-bit type by way of float32, as there. A NaN stays one and
/// keeps its sign and the payload that fits, except in bfloat16, where each becomes 0x7fc0. (Torch has no one rule for
/// NaN: it depends on the processor and on the place in the tensor.)
///
/// # Errors
/// [`CastError::Pair`], [`CastError::Lengths`]; nothing is written then.
pub fn cast(from: DType, to: DType, source: &[u8], target: &mut [u8]) -> Result<(), CastError> {
    if !is_possible(from, to) {
        return Err(CastError::Pair { from, to });
    }
    let elements = source.len() / from.size_bytes();
    let whole = elements * from.size_bytes() == source.len();
    if !whole || elements.checked_mul(to.size_bytes()) != Some(target.len()) {
        let (source_bytes, target_bytes) = (source.len(), target.len());
        return Err(CastError::Lengths { from, source_bytes, to, target_bytes });
    }
    if from == to {
        target.copy_from_slice(source);
        return Ok(());
    }
    let mut values = [0f32; BLOCK];
    let blocks = source.chunks(BLOCK * from.size_bytes()).zip(target.chunks_mut(BLOCK * to.size_bytes()));
    for (source, target) in blocks {
        decode(from, source, &mut values);
        encode(to, &values, target);
    }
    Ok(())
}

/// The elements of `bytes` as float32, at the start of `values`.
fn decode(from: DType, bytes: &[u8], values: &mut [f32; BLOCK]) {
    match from {
        DType::F8E4M3Fn => each(bytes, values, |[byte]| F8_E4M3FN[usize::from(byte)]),
        DType::F8E5M2 => each(bytes, values, |[byte]| F8_E5M2[usize::from(byte)]),
        DType::Bf16 => each(bytes, values, |bytes| f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)),
        DType::F16 => {
            let mut halves = [f16::ZERO; BLOCK];
            each(bytes, &mut halves, f16::from_le_bytes);
            halves.convert_to_f32_slice(values);
        }
        DType::F32 => each(bytes, values, f32::from_le_bytes),
        DType::F64 => each(bytes, values, |bytes| f64::from_le_bytes(bytes) as f32),
        _ => {}
    }
}

/// The elements of `target`, from the start of `values`.
fn encode(to: DType, values: &[f32; BLOCK], target: &mut [u8]) {
    match to {
        DType::F16 => {
            let mut halves = [f16::ZERO; BLOCK];
            halves.convert_from_f32_slice(values);
            put(&halves, target, |half| half.to_le_bytes());
        }
        DType::Bf16 => put(values, target, |value| bfloat16(value).to_le_bytes()),
        DType::F32 => put(values, target, f32::to_le_bytes),
        DType::F64 => put(values, target, |value| f64::from(value).to_le_bytes()),
        _ => {}
    }
}

fn each<const N: usize, T>(bytes: &[u8], values: &mut [T], read: impl Fn([u8; N]) -> T) {
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *value = read(*bytes);
    }
}

fn put<const N: usize, T: Copy>(values: &[T], target: &mut [u8], write: impl Fn(T) -> [u8; N]) {
    for (target, value) in target.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *target = write(*value);
    }
}

fn bfloat16(value: f32) -> u16 {
    let bits = value.to_bits();
    // Adds half of what is cut off, less one where the part that stays is even; it carries into the exponent as it
    // should. Only a NaN could overflow.
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if value.is_nan() { 0x7fc0 } else { rounded }
}

/// The value of each byte as float8_e4m3fn.
static F8_E4M3FN: [f32; 256] = table(3, 7);
/// The value of each byte as float8_e5m2.
static F8_E5M2: [f32; 256] = table(2, 15);

const fn table(mantissa_bits: u32, bias: i32) -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut byte = 0u32;
    while byte < 256 {
        values[byte as usize] = float8(byte, mantissa_bits, bias);
        byte += 1;
    }
    values
}

/// By bits alone: a constant of the compiler promises nothing about the payload of a NaN it computes.
const fn float8(byte: u32, mantissa_bits: u32, bias: i32) -> f32 {
    const INFINITY: u32 = 0x7f80_0000;
    const QUIET: u32 = 0x0040_0000;
    let sign = byte >> 7 << 31;
    let magnitude = byte & 0x7f;
    let exponent = (magnitude >> mantissa_bits).cast_signed();
    let mantissa = magnitude & ((1 << mantissa_bits) - 1);
    let has_infinities = mantissa_bits == 2;
    let bits = if has_infinities && exponent == 0x1f {
        let payload = mantissa << (23 - mantissa_bits);
        if mantissa == 0 { INFINITY } else { INFINITY | QUIET | payload }
    } else if !has_infinities && magnitude == 0x7f {
        INFINITY | 0x7f_ffff & (mantissa << (23 - mantissa_bits)) | QUIET
    } else if exponent == 0 {
        if mantissa == 0 {
            0
        } else {
            // Subnormal: the highest bit of the mantissa becomes the implied one.
            let shift = mantissa.leading_zeros() - (31 - mantissa_bits);
            let exponent = (127 + 1 - bias - shift.cast_signed()).cast_unsigned();
            exponent << 23 | (mantissa << shift & ((1 << mantissa_bits) - 1)) << (23 - mantissa_bits)
        }
    } else {
        (exponent + 127 - bias).cast_unsigned() << 23 | mantissa << (23 - mantissa_bits)
    };
    f32::from_bits(sign | bits)
}
