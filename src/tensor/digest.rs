use blake3::{Hash, Hasher};

use super::{DType, parallel};
use crate::id::ContentDigest;

/// What keeps these digests apart from all others. It changes whenever the encoding below does.
const DOMAIN: &str = "luna-broker 2026 content of a set of tensors, version 1";

/// One tensor of a set, for [`digest_of`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Digested<'a> {
    pub(crate) key: &'a str,
    pub(crate) dtype: DType,
    pub(crate) shape: &'a [u64],
    /// Of the contiguous elements, little-endian.
    pub(crate) bytes: Hash,
}

/// The digest of a set whose tensors are given in the order of their keys.
///
/// Hashing a list of hashes lets the tensors be read in any order and by several threads. Texts and shapes are preceded
/// by their lengths: no two sets have the same encoding.
pub(crate) fn digest_of<'a>(sorted: impl ExactSizeIterator<Item = Digested<'a>>) -> ContentDigest {
    let mut hasher = Hasher::new_derive_key(DOMAIN);
    let number = |hasher: &mut Hasher, number: u64| {
        hasher.update(&number.to_le_bytes());
    };
    number(&mut hasher, sorted.len() as u64);
    for tensor in sorted {
        for text in [tensor.key, tensor.dtype.name()] {
            number(&mut hasher, text.len() as u64);
            hasher.update(text.as_bytes());
        }
        number(&mut hasher, tensor.shape.len() as u64);
        tensor.shape.iter().for_each(|&extent| number(&mut hasher, extent));
        hasher.update(tensor.bytes.as_bytes());
    }
    ContentDigest(*hasher.finalize().as_bytes())
}

/// The digest of tensors in this process's memory, given as key, element type, shape and contiguous little-endian bytes,
/// in any order; each key once. Equal to that of a file or a region with the same content.
#[must_use]
pub fn digest_tensors<'a>(tensors: impl IntoIterator<Item = (&'a str, DType, &'a [u64], &'a [u8])>) -> ContentDigest {
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    tensors.sort_by_key(|&(key, ..)| key);
    let sizes: Vec<u64> = tensors.iter().map(|(.., bytes)| bytes.len() as u64).collect();
    let hashes = parallel::each(
        &sizes,
        || (),
        |at, ()| {
            Ok::<_, std::convert::Infallible>(
                tensors.get(at).map_or_else(|| blake3::hash(&[]), |(.., bytes)| blake3::hash(bytes)),
            )
        },
    );
    let Ok(hashes) = hashes;
    digest_of(tensors.iter().zip(hashes).map(|(&(key, dtype, shape, _), bytes)| Digested { key, dtype, shape, bytes }))
}
