use super::super::{ModelError, Skip};
use super::UnetFacts;
use crate::service::{Control, UnetInput};
use crate::tensor::{Dims, TensorError, TensorMeta};

impl UnetFacts {
    /// Checks everything about a call that can be told from its tensors' descriptions; what comes out: `x`'s element
    /// type and size, contiguous.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] for a tensor that does not fit, [`ModelError::MissingInput`] and
    /// [`ModelError::UnwantedInput`] for one too few or too many.
    pub fn check(&self, input: &UnetInput<TensorMeta>) -> Result<TensorMeta, ModelError> {
        let &[rows, channels, height, width] = input.x.shape.as_slice() else {
            return Err(unexpected("x", self.expected_x(), &input.x));
        };
        if channels != self.in_channels || [rows, height, width].contains(&0) || !input.x.dtype.is_float() {
            return Err(unexpected("x", self.expected_x(), &input.x));
        }
        require("timesteps", &input.timesteps, &[Some(rows)])?;
        require("context", &input.context, &[Some(rows), None, Some(self.context_width)])?;
        match (self.vector_width, &input.y) {
            (Some(width), Some(y)) => require("y", y, &[Some(rows), Some(width)])?,
            (Some(width), None) => {
                let expected = format!("[{rows}, {width}]");
                return Err(ModelError::MissingInput { path: self.path.clone(), tensor: "y", expected });
            }
            (None, Some(_)) => return Err(self.unwanted("y", "it has no layer for a vector".to_owned())),
            (None, None) => {}
        }
        if let Some(control) = &input.control {
            self.check_control(control, [rows, height, width])?;
        }
        let output = TensorMeta::contiguous(input.x.dtype, Dims::of([rows, self.out_channels, height, width]));
        output.validate()?;
        Ok(output)
    }

    fn check_control(&self, control: &Control<TensorMeta>, latent: [u64; 3]) -> Result<(), ModelError> {
        let last = self.skips.last().into_iter();
        check_list("control.input", &control.input, self.skips.iter(), latent)?;
        check_list("control.middle", &control.middle, last, latent)?;
        check_list("control.output", &control.output, self.skips.iter().rev(), latent)?;
        for (name, given, most) in [
            ("control.input", control.input.len(), self.skips.len()),
            ("control.middle", control.middle.len(), 1),
            ("control.output", control.output.len(), self.skips.len()),
        ] {
            if given > most {
                return Err(self.unwanted(name, format!("its list has {given} elements, the model {most} places")));
            }
        }
        Ok(())
    }

    fn expected_x(&self) -> String {
        format!("a latent [B, {}, h, w] of floating-point numbers", self.in_channels)
    }

    fn unwanted(&self, tensor: &'static str, reason: String) -> ModelError {
        ModelError::UnwantedInput { path: self.path.clone(), tensor, reason }
    }
}

/// Checks a list against the shapes that its elements are added to, in the order in which blocks run.
fn check_list<'a>(
    name: &'static str,
    list: &[Option<TensorMeta>],
    skips: impl Iterator<Item = &'a Skip>,
    [rows, height, width]: [u64; 3],
) -> Result<(), ModelError> {
    for (at, skip) in skips.enumerate() {
        let Some(added) = Control::at(list, at) else { continue };
        let given = added.shape.as_slice().first().copied();
        let rows = if given == Some(1) { 1 } else { rows };
        let shape = [Some(rows), Some(skip.channels), Some(skip.side(height)), Some(skip.side(width))];
        require(name, added, &shape)?;
    }
    Ok(())
}

/// Checks shape and element type; an extent that is not given may be any but zero.
fn require(tensor: &'static str, meta: &TensorMeta, shape: &[Option<u64>]) -> Result<(), ModelError> {
    let given = meta.shape.as_slice();
    let fits = |(&extent, wanted): (&u64, &Option<u64>)| extent > 0 && wanted.is_none_or(|wanted| wanted == extent);
    if given.len() == shape.len() && given.iter().zip(shape).all(fits) && meta.dtype.is_float() {
        return Ok(());
    }
    let any = |extent: &Option<u64>| extent.map_or("any".to_owned(), |extent| extent.to_string());
    let expected: Vec<String> = shape.iter().map(any).collect();
    Err(unexpected(tensor, format!("[{}] of floating-point numbers", expected.join(", ")), meta))
}

fn unexpected(tensor: &'static str, expected: String, &TensorMeta { shape, dtype, .. }: &TensorMeta) -> ModelError {
    TensorError::Unexpected { tensor, expected, shape, dtype }.into()
}
