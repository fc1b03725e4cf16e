use tch::{Kind, TchError, Tensor};

use super::super::super::adapter::{Change, Delta, Lengths};
use super::delta::difference;

/// Keeps a norm of zero from being divided by.
const TINY_NORM: f64 = 1e-8;

/// The weight that the change makes of `weight`, which is float32 and is not modified.
pub(in crate::model::torch) fn merged(
    weight: &Tensor,
    change: &Change<Tensor>,
    strength: f64,
) -> Result<Tensor, TchError> {
    let Some(delta) = &change.weight else { return Ok(weight.shallow_clone()) };
    match delta {
        // As strong as it is: half of another weight is none.
        Delta::Set(set) => return set.f_reshape(weight.size()),
        Delta::Oft { blocks, rescale, rounds, limit } => {
            let turns = turns(blocks, *limit, strength)?;
            let mut turned = match rounds {
                true => rounds_of(weight, &turns)?,
                // From the other side than the rounds, as trainers do.
                false => in_blocks(weight, &turns.f_transpose(1, 2)?)?,
            };
            if let Some(rescale) = rescale {
                let mut shape = vec![1; weight.dim()];
                if let Some(rows) = shape.first_mut() {
                    *rows = -1;
                }
                turned = turned.f_mul(&rescale.f_reshape(shape)?)?;
            }
            // The strength counts once within the turn and once more here.
            return towards(weight, &turned, strength);
        }
        _ => {}
    }
    let Some(difference) = difference(delta, weight)? else { return Ok(weight.shallow_clone()) };
    match &change.dora {
        Some(lengths) => {
            let whole = weight.f_add(&difference.f_mul_scalar(change.scale)?)?;
            towards(weight, &with_lengths(weight, &whole, lengths)?, strength)
        }
        None => weight.f_add(&difference.f_mul_scalar(strength * change.scale)?),
    }
}

/// `strength` of the way from one weight to another.
fn towards(from: &Tensor, to: &Tensor, strength: f64) -> Result<Tensor, TchError> {
    if strength == 1.0 {
        return Ok(to.shallow_clone());
    }
    from.f_add(&to.f_sub(from)?.f_mul_scalar(strength)?)
}

/// `changed` with other lengths.
fn with_lengths(weight: &Tensor, changed: &Tensor, lengths: &Lengths<Tensor>) -> Result<Tensor, TchError> {
    let (measured, along, lengths) = match lengths {
        Lengths::Rows(lengths) => (weight, 0, lengths),
        Lengths::Columns(lengths) => (changed, 1, lengths),
        Lengths::ChangedRows(lengths) => (changed, 0, lengths),
    };
    let mut shape = vec![1; weight.dim()];
    if let Some(extent) = shape.get_mut(along) {
        *extent = -1;
    }
    let lines = measured.f_transpose(0, along as i64)?.f_flatten(1, -1)?;
    let norms = lines.f_norm_scalaropt_dim(2.0, [1], true)?.f_reshape(&shape)?;
    let norms = norms.f_add_scalar(f64::from(f32::EPSILON))?;
    changed.f_mul(&lengths.f_reshape(&shape)?.f_div(&norms)?)
}

/// Turns `[…, n, b, b]` of generators, `strength` of the way from none.
fn turns(blocks: &Tensor, limit: f64, strength: f64) -> Result<Tensor, TchError> {
    let mut skew = blocks.f_sub(&blocks.f_transpose(-2, -1)?)?;
    if limit > 0.0 {
        let norm = skew.f_norm()?.f_double_value(&[])? + TINY_NORM;
        if norm > limit {
            skew = skew.f_mul_scalar(limit / norm)?;
        }
    }
    let side = blocks.size().last().copied().unwrap_or(0);
    let one = Tensor::f_eye(side, (Kind::Float, blocks.device()))?;
    let turns = one.f_add(&skew)?.f_matmul(&one.f_sub(&skew)?.f_inverse()?)?;
    turns.f_mul_scalar(strength)?.f_add(&one.f_mul_scalar(1.0 - strength)?)
}

/// Neighbouring output channels in blocks, each block times its matrix of `matrices [n, b, b]`.
fn in_blocks(weight: &Tensor, matrices: &Tensor) -> Result<Tensor, TchError> {
    let (count, side, _) = matrices.size3()?;
    matrices.f_matmul(&weight.f_reshape([count, side, -1])?)?.f_reshape(weight.size())
}

/// One round after the other, each with channels twice as far apart in a block.
fn rounds_of(weight: &Tensor, turns: &Tensor) -> Result<Tensor, TchError> {
    let (rounds, _, side, _) = turns.size4()?;
    let mut turned = weight.shallow_clone();
    let mut far = side / 2;
    for round in 0..rounds {
        let apart = swapped(&turned, 2, far)?;
        turned = swapped(&in_blocks(&apart, &turns.f_select(0, round)?)?, far, 2)?;
        far *= 2;
    }
    Ok(turned)
}

/// Output channels counted as `[…, first, second]`, recounted as `[…, second, first]`.
fn swapped(weight: &Tensor, first: i64, second: i64) -> Result<Tensor, TchError> {
    let rows = weight.size().first().copied().unwrap_or(0);
    let groups = rows / (first * second).max(1);
    weight.f_reshape([groups, first, second, -1])?.f_transpose(1, 2)?.f_reshape(weight.size())
}
