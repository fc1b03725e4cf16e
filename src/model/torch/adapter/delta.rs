use tch::{TchError, Tensor};

use super::super::super::adapter::{Delta, Factor};

/// A change of low rank as two matrices.
pub(in crate::model::torch) struct Narrow {
    /// `[r, in]`; for a convolution `[r, in, k, k]`.
    pub(in crate::model::torch) down: Tensor,
    /// `[out, r]`; for a convolution `[out, r, 1, 1]`.
    pub(in crate::model::torch) up: Tensor,
}

/// The two matrices of a change of low rank of a weight of `shape`; a middle is folded into `down`, exactly.
pub(in crate::model::torch) fn narrow(
    up: &Tensor,
    down: &Tensor,
    mid: Option<&Tensor>,
    shape: &[i64],
) -> Result<Narrow, TchError> {
    let down = match mid {
        // [r, k, k, q] · [q, in] → [r, in, k, k]
        Some(mid) => mid.f_permute([0, 2, 3, 1])?.f_matmul(&flat(down)?)?.f_permute([0, 3, 1, 2])?,
        None => down.shallow_clone(),
    };
    let (rows, rest) = shape.split_first().ok_or_else(|| TchError::Shape("a weight without extents".to_owned()))?;
    let mut down_shape = vec![-1];
    down_shape.extend(rest);
    let mut up_shape = vec![*rows, -1];
    up_shape.resize(shape.len(), 1);
    Ok(Narrow { down: down.f_reshape(down_shape)?, up: up.f_reshape(up_shape)? })
}

/// What is added to `weight`, before any factor, in its shape; `None` where the change is no difference.
pub(super) fn difference(delta: &Delta<Tensor>, weight: &Tensor) -> Result<Option<Tensor>, TchError> {
    let shape = weight.size();
    let difference = match delta {
        Delta::LowRank { up, down, mid } => {
            let Narrow { down, up } = narrow(up, down, mid.as_ref(), &shape)?;
            flat(&up)?.f_matmul(&flat(&down)?)?
        }
        Delta::Hada([first, second]) => factor(first)?.f_mul(&factor(second)?)?,
        Delta::Kron([first, second]) => factor(first)?.f_kron(&factor(second)?)?,
        Delta::Glora { a1, a2, b1, b2, old } => {
            let [a1, a2, b1, b2] = [flat(a1)?, flat(a2)?, flat(b1)?, flat(b2)?];
            match old {
                true => flat(weight)?.f_matmul(&a2)?.f_matmul(&a1)?.f_add(&b2.f_matmul(&b1)?)?,
                // Over the channels in, whatever the kernel: channels last for the product.
                false => {
                    let turned = weight.f_movedim_int(1, -1)?.f_matmul(&a1)?.f_matmul(&a2)?.f_movedim_int(-1, 1)?;
                    turned.f_reshape(&shape)?.f_add(&b1.f_matmul(&b2)?.f_reshape(&shape)?)?
                }
            }
        }
        Delta::Difference(difference) => difference.shallow_clone(),
        Delta::Oft { .. } | Delta::Set(_) => return Ok(None),
    };
    difference.f_reshape(shape).map(Some)
}

/// A factor as a matrix; kernels are part of its columns.
fn factor(factor: &Factor<Tensor>) -> Result<Tensor, TchError> {
    match factor {
        Factor::Whole(whole) => flat(whole),
        Factor::Product { a, b } => flat(a)?.f_matmul(&flat(b)?),
        Factor::Tucker { a, b, core } => {
            // [k, k, r, q] · [q, columns] → [k, k, r, columns]; then [rows, r] · that.
            let wide = core.f_permute([2, 3, 0, 1])?.f_matmul(&flat(b)?)?;
            let turned = flat(a)?.f_transpose(0, 1)?.f_matmul(&wide)?;
            // Kronecker products are only of what lies in order.
            flat(&turned.f_permute([2, 3, 0, 1])?)?.f_contiguous()
        }
    }
}

/// Rows, and all else as columns.
fn flat(tensor: &Tensor) -> Result<Tensor, TchError> {
    tensor.f_flatten(1, -1)
}
