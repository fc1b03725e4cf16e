use super::super::StoredTensor;
use super::report::AdapterKind;

/// A tensor of an adapter's file.
#[derive(Debug, Clone)]
pub(in crate::model) struct Part {
    pub(in crate::model) key: String,
    pub(in crate::model) stored: StoredTensor,
}

/// What an adapter changes in one layer; complete, and of shapes that fit it.
#[derive(Debug)]
pub(in crate::model) struct Change<T> {
    pub(in crate::model) weight: Option<Delta<T>>,
    /// What a difference is multiplied by beside the strength: alpha over rank.
    pub(in crate::model) scale: f64,
    /// Lengths that rows or columns have after the change.
    pub(in crate::model) dora: Option<Lengths<T>>,
    /// Added to the bias, times the strength.
    pub(in crate::model) bias: Option<T>,
}

/// Lengths set apart from directions; by what the changed weight is divided before they are given to it.
#[derive(Debug)]
pub(in crate::model) enum Lengths<T> {
    /// `[out, 1, …]`. The lengths that rows had before the change: not what the method's authors wrote, but what ComfyUI
    /// computes for files of the trainers that store them so.
    Rows(T),
    /// `[1, in, …]`. The lengths of the changed columns.
    Columns(T),
    /// As many as rows. Their lengths with the change, as peft does it.
    ChangedRows(T),
}

/// A change of a weight `[out, in]` or `[out, in, k, k]`. Trailing extents of one are there or not, as trainers like.
#[derive(Debug)]
pub(in crate::model) enum Delta<T> {
    /// `up [out, r]`, `down [r, in·k·k]`; with a middle, `mid [r, q, k, k]` and `down [q, in]`.
    LowRank { up: T, down: T, mid: Option<T> },
    /// The elementwise product of both.
    Hada([Factor<T>; 2]),
    /// Every element of the first times all of the second.
    Kron([Factor<T>; 2]),
    /// `W·a1·a2 + b1·b2`, or in files of the first trainers `W·a2·a1 + b2·b1`.
    Glora { a1: T, a2: T, b1: T, b2: T, old: bool },
    /// Skew-symmetric generators `[n, b, b]`, or of several rounds `[m, n, b, b]`, limited to a norm of `limit` where
    /// that is above 0; `rescale` has a factor per output channel.
    Oft { blocks: T, rescale: Option<T>, rounds: bool, limit: f64 },
    /// In the size of the weight.
    Difference(T),
    /// In the size of the weight.
    Set(T),
}

/// A matrix, whole or as a product.
#[derive(Debug)]
pub(in crate::model) enum Factor<T> {
    Whole(T),
    /// `a [rows, r]`, `b [r, columns]`.
    Product {
        a: T,
        b: T,
    },
    /// `a [r, rows]`, `b [q, columns]` around `core [r, q, k, k]`.
    Tucker {
        a: T,
        b: T,
        core: T,
    },
}

impl<T> Change<T> {
    /// In which way it changes the layer.
    pub(super) fn kind(&self) -> AdapterKind {
        match &self.weight {
            Some(_) if self.dora.is_some() => AdapterKind::Dora,
            Some(Delta::LowRank { .. }) => AdapterKind::Lora,
            Some(Delta::Hada(_)) => AdapterKind::Loha,
            Some(Delta::Kron(_)) => AdapterKind::Lokr,
            Some(Delta::Glora { .. }) => AdapterKind::Glora,
            Some(Delta::Oft { rounds: false, .. }) => AdapterKind::Oft,
            Some(Delta::Oft { rounds: true, .. }) => AdapterKind::Boft,
            Some(Delta::Set(_)) => AdapterKind::Set,
            Some(Delta::Difference(_)) | None => AdapterKind::Difference,
        }
    }
}

#[cfg(feature = "torch")]
impl<T> Change<T> {
    /// The same change with every tensor replaced.
    pub(in crate::model) fn try_map<U, E, F>(&self, f: &mut F) -> Result<Change<U>, E>
    where
        F: FnMut(&T) -> Result<U, E>,
    {
        Ok(Change {
            weight: self.weight.as_ref().map(|delta| delta.try_map(f)).transpose()?,
            scale: self.scale,
            dora: self.dora.as_ref().map(|lengths| lengths.try_map(f)).transpose()?,
            bias: self.bias.as_ref().map(&mut *f).transpose()?,
        })
    }

    /// Whether what it does to the weight depends on what others did before.
    pub(in crate::model) fn depends_on_order(&self) -> bool {
        let apart = matches!(self.weight, Some(Delta::Glora { .. } | Delta::Oft { .. } | Delta::Set(_)));
        apart || self.dora.is_some()
    }

    /// Whether it can run beside the layer.
    pub(in crate::model) fn is_low_rank(&self) -> bool {
        matches!(self.weight, Some(Delta::LowRank { .. })) && self.dora.is_none()
    }
}

#[cfg(feature = "torch")]
impl<T> Lengths<T> {
    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Lengths<U>, E> {
        Ok(match self {
            Self::Rows(lengths) => Lengths::Rows(f(lengths)?),
            Self::Columns(lengths) => Lengths::Columns(f(lengths)?),
            Self::ChangedRows(lengths) => Lengths::ChangedRows(f(lengths)?),
        })
    }
}

#[cfg(feature = "torch")]
impl<T> Delta<T> {
    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Delta<U>, E> {
        Ok(match self {
            Self::LowRank { up, down, mid } => {
                Delta::LowRank { up: f(up)?, down: f(down)?, mid: mid.as_ref().map(f).transpose()? }
            }
            Self::Hada([first, second]) => Delta::Hada([first.try_map(f)?, second.try_map(f)?]),
            Self::Kron([first, second]) => Delta::Kron([first.try_map(f)?, second.try_map(f)?]),
            Self::Glora { a1, a2, b1, b2, old } => {
                Delta::Glora { a1: f(a1)?, a2: f(a2)?, b1: f(b1)?, b2: f(b2)?, old: *old }
            }
            Self::Oft { blocks, rescale, rounds, limit } => {
                let (blocks, rescale) = (f(blocks)?, rescale.as_ref().map(f).transpose()?);
                Delta::Oft { blocks, rescale, rounds: *rounds, limit: *limit }
            }
            Self::Difference(difference) => Delta::Difference(f(difference)?),
            Self::Set(weight) => Delta::Set(f(weight)?),
        })
    }
}

#[cfg(feature = "torch")]
impl<T> Factor<T> {
    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Factor<U>, E> {
        Ok(match self {
            Self::Whole(whole) => Factor::Whole(f(whole)?),
            Self::Product { a, b } => Factor::Product { a: f(a)?, b: f(b)? },
            Self::Tucker { a, b, core } => Factor::Tucker { a: f(a)?, b: f(b)?, core: f(core)? },
        })
    }
}
