use half::{bf16, f16};

use super::super::{ModelError, ModelFile, StoredDType, StoredTensor};

/// Longest element.
const MOST_BYTES: usize = 8;

/// The one number in `stored`; `None` where there is not exactly one, or of a type that numbers are not stored in.
pub(super) fn read(file: &ModelFile, stored: &StoredTensor) -> Result<Option<f64>, ModelError> {
    let mut bytes = [0; MOST_BYTES];
    let Some(target) = bytes.get_mut(..stored.bytes.len()).filter(|_| stored.elements() == 1) else { return Ok(None) };
    file.read_exact_at(stored.bytes.start as u64, target)?;
    let [a, b, c, d, ..] = bytes;
    Ok(Some(match stored.dtype {
        StoredDType::F16 => f16::from_le_bytes([a, b]).to_f64(),
        StoredDType::BF16 => bf16::from_le_bytes([a, b]).to_f64(),
        StoredDType::F32 => f32::from_le_bytes([a, b, c, d]).into(),
        StoredDType::F64 => f64::from_le_bytes(bytes),
        StoredDType::U8 => a.into(),
        StoredDType::I32 => i32::from_le_bytes([a, b, c, d]).into(),
        StoredDType::I64 => i64::from_le_bytes(bytes) as f64,
        _ => return Ok(None),
    }))
}
