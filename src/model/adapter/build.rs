use std::collections::BTreeMap;
use std::path::Path;

use super::super::ModelError;
use super::super::header::quote;
use super::change::{Change, Delta, Factor, Lengths, Part};
use super::names::LayerFacts;
use super::piece::{Family, Piece};
use super::settings::Said;
use crate::tensor::DType;

/// What is known of a layer's alpha.
pub(super) struct Alpha {
    /// From a tensor of its own, which goes before the rest.
    pub(super) stored: Option<f64>,
    /// From settings.
    pub(super) said: Option<Said>,
}

/// Puts the pieces that a file has for one layer together, and checks them against it.
pub(super) struct Builder<'a> {
    path: &'a Path,
    layer: &'a LayerFacts,
    /// What is not used yet.
    pieces: BTreeMap<Piece, Part>,
    alpha: Alpha,
    /// The first of all keys, to tell by it what is incomplete.
    first: String,
}

/// Rows and columns; of what has more extents, all but the first together.
type Sides = (u64, u64);

impl<'a> Builder<'a> {
    pub(super) fn new(path: &'a Path, layer: &'a LayerFacts, pieces: BTreeMap<Piece, Part>, alpha: Alpha) -> Self {
        let first = pieces.values().next().map_or_else(String::new, |part| quote(&part.key));
        Self { path, layer, pieces, alpha, first }
    }

    pub(super) fn build(mut self) -> Result<Change<Part>, ModelError> {
        for part in self.pieces.values() {
            if !part.stored.element().is_some_and(DType::is_float) {
                return Err(self.wrong(part, format!("is stored as {}; it must be floating-point", part.stored.dtype)));
            }
        }
        let families: Vec<Family> = self.pieces.keys().filter_map(|piece| piece.family()).collect();
        let family = families.first().copied();
        if let (Some(&last), Some(part)) = (families.last(), self.pieces.values().next())
            && family != Some(last)
        {
            return Err(self.wrong(part, "changes a weight that another key of the file changes in another way"));
        }
        let (weight, scale) = match family {
            Some(family) => {
                let (delta, rank) = self.delta(family)?;
                (Some(delta), self.scale(family, rank))
            }
            None => (None, 1.0),
        };
        let dora = self.dora(family)?;
        let bias = self.pieces.remove(&Piece::BiasDifference);
        if let Some(part) = &bias
            && part.stored.elements() != self.rows()
        {
            return Err(self.misfit(part, &[self.rows()]));
        }
        match self.pieces.values().next() {
            Some(part) => Err(self.wrong(part, "belongs to nothing else that the file has for this layer")),
            None => Ok(Change { weight, scale, dora, bias }),
        }
    }

    /// What the change is multiplied by, but for the strength.
    fn scale(&self, family: Family, rank: Option<u64>) -> f64 {
        match (&self.alpha, rank) {
            (Alpha { stored: Some(alpha), .. }, Some(rank)) => alpha / rank as f64,
            (Alpha { stored: None, said: Some(said) }, _) if family.has_rank() => said.scale(rank),
            _ => 1.0,
        }
    }

    /// Lengths that the weight has after a change of this family.
    fn dora(&mut self, family: Option<Family>) -> Result<Option<Lengths<Part>>, ModelError> {
        let magnitude = self.pieces.remove(&Piece::Magnitude);
        let Some(part) = self.pieces.remove(&Piece::DoraScale).or_else(|| magnitude.clone()) else { return Ok(None) };
        if !family.is_some_and(|family| family.has_rank() || family == Family::Glora) {
            return Err(self.wrong(&part, "has nothing beside it that it could scale"));
        }
        let Some(magnitude) = magnitude else { return self.lengths(part).map(Some) };
        if magnitude.key != part.key {
            return Err(self.wrong(&part, format!("says again what {} says", quote(&magnitude.key))));
        }
        self.must(&magnitude, magnitude.stored.elements() == self.rows())?;
        Ok(Some(Lengths::ChangedRows(magnitude)))
    }

    /// A change of the weight, and the rank that alpha is divided by.
    fn delta(&mut self, family: Family) -> Result<(Delta<Part>, Option<u64>), ModelError> {
        let whole = matches!(family, Family::Difference | Family::Set);
        if let (false, 0..2, Some(part)) = (whole, self.layer.weight.len(), self.pieces.values().next()) {
            return Err(self.wrong(part, format!("has no place beside the normalisation {}", self.layer.stem)));
        }
        match family {
            Family::LowRank => self.low_rank(),
            Family::Hada => {
                use Piece::{HadaT1, HadaT2, HadaW1A, HadaW1B, HadaW2A, HadaW2B};
                if self.pieces.contains_key(&HadaT1) != self.pieces.contains_key(&HadaT2) {
                    return Err(self.missing(if self.pieces.contains_key(&HadaT1) { HadaT2 } else { HadaT1 }));
                }
                let rank = self.rows_of(HadaW1B)?;
                let first = self.factor(None, [HadaW1A, HadaW1B], Some(HadaT1))?;
                let second = self.factor(None, [HadaW2A, HadaW2B], Some(HadaT2))?;
                for (_, part, sides) in [&first, &second] {
                    self.must(part, *sides == (self.rows(), self.inner()))?;
                }
                Ok((Delta::Hada([first.0, second.0]), Some(rank)))
            }
            Family::Kron => {
                use Piece::{KronT2, KronW1, KronW1A, KronW1B, KronW2, KronW2A, KronW2B};
                // Where both are products, alpha is divided by the rank of the second.
                let rank = self.rows_of(KronW2B).or_else(|_| self.rows_of(KronW1B)).ok();
                let (first, _, sides) = self.factor(Some(KronW1), [KronW1A, KronW1B], None)?;
                let (second, part, other) = self.factor(Some(KronW2), [KronW2A, KronW2B], Some(KronT2))?;
                let product = (sides.0.saturating_mul(other.0), sides.1.saturating_mul(other.1));
                self.must(&part, product == (self.rows(), self.inner()))?;
                Ok((Delta::Kron([first, second]), rank))
            }
            Family::Glora => self.glora(),
            Family::Oft => Ok((self.oft()?, None)),
            Family::Difference => {
                let part = self.take(Piece::Difference)?;
                self.check_whole(&part)?;
                Ok((Delta::Difference(part), None))
            }
            Family::Set => {
                let part = self.take(Piece::Set)?;
                self.check_whole(&part)?;
                Ok((Delta::Set(part), None))
            }
        }
    }

    fn low_rank(&mut self) -> Result<(Delta<Part>, Option<u64>), ModelError> {
        let (up, down, mid) = (self.take(Piece::Up)?, self.take(Piece::Down)?, self.pieces.remove(&Piece::Mid));
        let (rank, columns) = self.sides(&down)?;
        match &mid {
            Some(mid) => {
                let outer = self.core(mid, rank)?;
                self.is(&down, (rank, self.columns()))?;
                self.is(&up, (self.rows(), outer))?;
            }
            None => {
                self.must(&down, columns == self.inner())?;
                self.is(&up, (self.rows(), rank))?;
            }
        }
        Ok((Delta::LowRank { up, down, mid }, Some(rank)))
    }

    /// A matrix with one of its parts, to blame it, and its sides.
    fn factor(
        &mut self,
        whole: Option<Piece>,
        [a, b]: [Piece; 2],
        core: Option<Piece>,
    ) -> Result<(Factor<Part>, Part, Sides), ModelError> {
        if let Some(part) = whole.and_then(|piece| self.pieces.remove(&piece)) {
            let sides = self.sides(&part)?;
            return Ok((Factor::Whole(part.clone()), part, sides));
        }
        let (a, b) = (self.take(a)?, self.take(b)?);
        let (inner, columns) = self.sides(&b)?;
        if let Some(core) = core.and_then(|piece| self.pieces.remove(&piece)) {
            let outer = self.core(&core, inner)?;
            let (wanted, rows) = self.sides(&a)?;
            self.must(&a, wanted == outer)?;
            let sides = (rows, columns.saturating_mul(self.kernel()));
            return Ok((Factor::Tucker { a, b: b.clone(), core }, b, sides));
        }
        let (rows, rank) = self.sides(&a)?;
        self.must(&a, rank == inner)?;
        Ok((Factor::Product { a, b: b.clone() }, b, (rows, columns)))
    }

    fn glora(&mut self) -> Result<(Delta<Part>, Option<u64>), ModelError> {
        let [a1, a2] = [self.take(Piece::GloraA1)?, self.take(Piece::GloraA2)?];
        let [b1, b2] = [self.take(Piece::GloraB1)?, self.take(Piece::GloraB2)?];
        let sides = [self.sides(&a1)?, self.sides(&a2)?, self.sides(&b1)?, self.sides(&b2)?];
        let [(a1_rows, a1_columns), (a2_rows, a2_columns), (b1_rows, b1_columns), (b2_rows, b2_columns)] = sides;
        let is_old = b2_columns == b1_rows && b1_rows == a1_rows && a1_rows == a2_columns;
        let is_new = b2_rows == b1_columns && b1_columns == a1_columns && a1_columns == a2_rows;
        // A rank as large as a square weight fits both.
        let square = a2_rows == self.rows() && self.rows() == self.inner();
        let old = is_old && (!is_new || square);
        let rank = if old { a1_rows } else { a2_rows };
        let (rows, columns, inner) = (self.rows(), self.columns(), self.inner());
        let wanted = match old {
            true => [(rank, inner), (inner, rank), (rank, inner), (rows, rank)],
            false => [(columns, rank), (rank, columns), (rows, rank), (rank, inner)],
        };
        for (part, wanted) in [&a1, &a2, &b1, &b2].into_iter().zip(wanted) {
            self.is(part, wanted)?;
        }
        Ok((Delta::Glora { a1, a2, b1, b2, old }, Some(rank)))
    }

    fn oft(&mut self) -> Result<Delta<Part>, ModelError> {
        let blocks = self.take(Piece::OftBlocks)?;
        let rescale = self.pieces.remove(&Piece::Rescale);
        let extents = extents(&blocks);
        let (rounds, fits) = match *extents.as_slice() {
            [count, rows, columns] => (false, rows == columns && count.checked_mul(rows) == Some(self.rows())),
            [turns, count, rows, columns] => {
                // Each round's blocks are spread twice as far as those of the one before.
                let reach = u32::try_from(turns).ok().and_then(|turns| rows.checked_mul(2u64.checked_pow(turns)?));
                let whole = reach.is_some_and(|reach| reach > 0 && (2 * self.rows()).is_multiple_of(reach));
                (true, whole && rows == columns && rows % 2 == 0 && count.checked_mul(rows) == Some(self.rows()))
            }
            _ => (false, false),
        };
        self.must(&blocks, fits && blocks.stored.elements() > 0)?;
        if let Some(part) = &rescale {
            self.must(part, part.stored.elements() == self.rows())?;
        }
        Ok(Delta::Oft { blocks, rescale, rounds, limit: self.alpha.stored.unwrap_or(0.0) })
    }

    /// Lengths of rows or of columns.
    fn lengths(&self, part: Part) -> Result<Lengths<Part>, ModelError> {
        let shape = extents(&part);
        let of_rows = shape.first() == Some(&self.rows()) && part.stored.elements() == self.rows();
        let of_columns = shape.first() == Some(&1)
            && shape.get(1) == Some(&self.columns())
            && part.stored.elements() == self.columns();
        self.must(&part, of_rows || of_columns)?;
        Ok(if of_rows { Lengths::Rows(part) } else { Lengths::Columns(part) })
    }

    fn check_whole(&self, part: &Part) -> Result<(), ModelError> {
        let fits = extents(part).first() == self.layer.weight.first()
            && part.stored.elements() == self.layer.weight.iter().product::<u64>();
        match fits {
            true => Ok(()),
            false => Err(self.misfit(part, &self.layer.weight)),
        }
    }

    /// Checks a core `[outer, inner, k, k]` with the layer's kernel; gives `outer`.
    fn core(&self, part: &Part, inner: u64) -> Result<u64, ModelError> {
        let kernel = self.layer.weight.get(2..).unwrap_or_default();
        match extents(part).as_slice() {
            &[outer, own, ref rest @ ..] if outer > 0 && own == inner && rest.len() == 2 && rest == kernel => Ok(outer),
            _ => Err(self.wrong_shape(part)),
        }
    }

    fn rows(&self) -> u64 {
        self.layer.weight.first().copied().unwrap_or(0)
    }

    fn columns(&self) -> u64 {
        self.layer.weight.get(1).copied().unwrap_or(1)
    }

    fn kernel(&self) -> u64 {
        self.layer.weight.iter().skip(2).product()
    }

    fn inner(&self) -> u64 {
        self.columns() * self.kernel()
    }

    fn take(&mut self, piece: Piece) -> Result<Part, ModelError> {
        self.pieces.remove(&piece).ok_or_else(|| self.missing(piece))
    }

    fn rows_of(&self, piece: Piece) -> Result<u64, ModelError> {
        self.pieces.get(&piece).ok_or_else(|| self.missing(piece)).and_then(|part| Ok(self.sides(part)?.0))
    }

    /// The sides of what is at least a matrix and not empty.
    fn sides(&self, part: &Part) -> Result<Sides, ModelError> {
        match extents(part).as_slice() {
            [rows, rest @ ..] if !rest.is_empty() && part.stored.elements() > 0 => Ok((*rows, rest.iter().product())),
            _ => Err(self.wrong_shape(part)),
        }
    }

    fn is(&self, part: &Part, wanted: Sides) -> Result<(), ModelError> {
        match self.sides(part)? {
            own if own == wanted => Ok(()),
            _ => Err(self.misfit(part, &[wanted.0, wanted.1])),
        }
    }

    fn must(&self, part: &Part, fits: bool) -> Result<(), ModelError> {
        if fits { Ok(()) } else { Err(self.wrong_shape(part)) }
    }

    fn wrong_shape(&self, part: &Part) -> ModelError {
        let LayerFacts { stem, weight, .. } = self.layer;
        self.wrong(part, format!("has shape {:?}, which does not fit {stem} of {weight:?}", part.stored.shape))
    }

    fn misfit(&self, part: &Part, wanted: &[u64]) -> ModelError {
        let LayerFacts { stem, weight, .. } = self.layer;
        let own = &part.stored.shape;
        self.wrong(part, format!("has shape {own:?}; {stem} of {weight:?} takes {wanted:?}"))
    }

    fn missing(&self, piece: Piece) -> ModelError {
        let reason = format!("{} needs a {} beside it, which is not there", self.first, piece.name());
        ModelError::AdapterFile { path: self.path.to_owned(), reason }
    }

    fn wrong(&self, part: &Part, reason: impl std::fmt::Display) -> ModelError {
        let reason = format!("{} {reason}", quote(&part.key));
        ModelError::AdapterFile { path: self.path.to_owned(), reason }
    }
}

fn extents(part: &Part) -> Vec<u64> {
    part.stored.shape.iter().map(|&extent| extent as u64).collect()
}
