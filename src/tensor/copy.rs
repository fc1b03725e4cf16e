use super::{TensorError, TensorMeta};

/// Copies the tensor `from` describes in `source` into `target`, densely and in the same order of dimensions:
/// the layout of [`TensorMeta::densified`]. A dense source is one `memcpy`.
///
/// # Errors
/// [`TensorError::OutOfBounds`] where either side is too short; nothing is written then.
pub fn copy_dense(source: &[u8], from: &TensorMeta, target: &mut [u8]) -> Result<TensorMeta, TensorError> {
    let to = from.densified();
    from.check_fits(source.len())?;
    to.check_fits(target.len())?;
    let size_bytes = to.size_bytes()?;
    if size_bytes == 0 {
        return Ok(to);
    }
    if from.is_dense() {
        target[..size_bytes].copy_from_slice(&source[..size_bytes]);
        return Ok(to);
    }
    // Walk in the target's memory order, so that its pages are written once and in sequence.
    let mut walk: Vec<Axis> = from
        .shape
        .as_slice()
        .iter()
        .zip(from.strides.as_slice().iter().zip(to.strides.as_slice()))
        .filter(|(extent, _)| **extent != 1)
        .map(|(&extent, (&source, &target))| Axis {
            extent: extent as usize,
            source: source as usize,
            target: target as usize,
        })
        .collect();
    walk.sort_by_key(|axis| std::cmp::Reverse(axis.target));
    let element = from.dtype.size_bytes();
    copy_axes(&walk, element, source, target);
    Ok(to)
}

/// One dimension of the walk; strides in elements.
struct Axis {
    extent: usize,
    source: usize,
    target: usize,
}

fn copy_axes(axes: &[Axis], element: usize, source: &[u8], target: &mut [u8]) {
    match axes {
        [] => target[..element].copy_from_slice(&source[..element]),
        [Axis { extent, source: 1, .. }] => {
            target[..extent * element].copy_from_slice(&source[..extent * element]);
        }
        [axis, inner @ ..] => {
            for at in 0..axis.extent {
                copy_axes(
                    inner,
                    element,
                    &source[at * axis.source * element..],
                    &mut target[at * axis.target * element..],
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tensor::{DType, Dims};

    /// Element at `index` by the definition of strides.
    fn naive(bytes: &[u8], meta: &TensorMeta, index: &[u64]) -> u16 {
        let at: u64 = index.iter().zip(meta.strides.as_slice()).map(|(i, s)| i * s).sum();
        u16::from_ne_bytes([bytes[at as usize * 2], bytes[at as usize * 2 + 1]])
    }

    proptest! {
        #[test]
        fn a_dense_copy_holds_the_same_elements(
            extents in prop::collection::vec(0u64..4, 0..5),
            steps in prop::collection::vec(0u64..3, 5),
            swap in any::<bool>(),
        ) {
            let shape = Dims::new(&extents).unwrap();
            let mut strides: Vec<u64> = shape.contiguous_strides().as_slice().iter().zip(&steps).map(|(a, b)| a * b).collect();
            if swap && strides.len() > 1 { strides.swap(0, 1); }
            let from = TensorMeta::strided(DType::I16, shape, Dims::new(&strides).unwrap()).unwrap();
            let source: Vec<u8> = (0..from.span_bytes().unwrap()).map(|i| (i * 7 % 251) as u8).collect();
            let mut target = vec![0u8; from.size_bytes().unwrap()];
            let to = copy_dense(&source, &from, &mut target).unwrap();
            prop_assert!(to.is_dense());
            let mut index = vec![0u64; extents.len()];
            for _ in 0..from.elements().unwrap() {
                prop_assert_eq!(naive(&source, &from, &index), naive(&target, &to, &index));
                for dim in (0..index.len()).rev() {
                    index[dim] += 1;
                    if index[dim] < extents[dim] { break; }
                    index[dim] = 0;
                }
            }
        }
    }

    #[test]
    fn a_source_shorter_than_its_description_is_an_error() {
        let meta = TensorMeta::contiguous(DType::F32, Dims::of([4]));
        let mut target = [0; 16];
        assert!(matches!(copy_dense(&[0; 15], &meta, &mut target), Err(TensorError::OutOfBounds { .. })));
    }
}
