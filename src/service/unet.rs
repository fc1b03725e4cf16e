use serde::{Deserialize, Serialize};

/// What one forward takes, over what stands for a tensor: descriptions where it is checked, tensors where it is run.
///
/// `B` rows, which may belong to several requests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UnetInput<T> {
    /// The noisy latent `[B, channels, height, width]`, scaled as the sampler does, with what an inpaint or instruct
    /// model takes beside it.
    pub x: T,
    /// The step of each row, `[B]`: 0…999 in training, fractions allowed.
    pub timesteps: T,
    /// The encoded prompt `[B, tokens, width]`.
    pub context: T,
    /// The vector `[B, width]` of the models that take one: pooled prompt, sizes, crops.
    pub y: Option<T>,
    /// What a ControlNet or T2I adapter gives.
    pub control: Option<Control<T>>,
}

/// Tensors added inside of the network, in the lists that ComfyUI passes. Each list is used up from its **end**, one
/// element per block in the order in which blocks run, holes included; a list that is shorter leaves the last blocks
/// without. A tensor has as many rows as the latent, or one for all of them, in any floating-point type.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Control<T> {
    /// Added to what each block on the way down gives, the first convolution included (T2I adapters).
    pub input: Vec<Option<T>>,
    /// Added to what the middle gives; only the last element is used.
    pub middle: Vec<Option<T>>,
    /// Added to the skips as the way up takes them, the lowest resolution first (ControlNets).
    pub output: Vec<Option<T>>,
}

impl<T> Default for Control<T> {
    fn default() -> Self {
        Self { input: Vec::new(), middle: Vec::new(), output: Vec::new() }
    }
}

impl<T> UnetInput<T> {
    /// The same with every tensor replaced.
    ///
    /// # Errors
    /// The first that `f` returns.
    pub fn try_map<'a, U, E>(&'a self, f: &mut impl FnMut(&'a T) -> Result<U, E>) -> Result<UnetInput<U>, E> {
        Ok(UnetInput {
            x: f(&self.x)?,
            timesteps: f(&self.timesteps)?,
            context: f(&self.context)?,
            y: self.y.as_ref().map(&mut *f).transpose()?,
            control: self.control.as_ref().map(|control| control.try_map(f)).transpose()?,
        })
    }
}

impl<T> Control<T> {
    /// The same with every tensor replaced.
    ///
    /// # Errors
    /// The first that `f` returns.
    pub fn try_map<'a, U, E>(&'a self, f: &mut impl FnMut(&'a T) -> Result<U, E>) -> Result<Control<U>, E> {
        let mut list = |tensors: &'a [Option<T>]| {
            tensors.iter().map(|tensor| tensor.as_ref().map(&mut *f).transpose()).collect::<Result<_, E>>()
        };
        Ok(Control { input: list(&self.input)?, middle: list(&self.middle)?, output: list(&self.output)? })
    }

    /// What is added for the block that runs as number `at` of the list's.
    pub(crate) fn at(list: &[Option<T>], at: usize) -> Option<&T> {
        list.get(list.len().checked_sub(at + 1)?)?.as_ref()
    }
}

impl<T> UnetInput<T> {
    /// Every tensor, in the order in which they cross.
    pub fn each<'a>(&'a self) -> impl Iterator<Item = &'a T> + use<'a, T> {
        let Self { x, timesteps, context, y, control } = self;
        [x, timesteps, context].into_iter().chain(y).chain(control.iter().flat_map(Control::each))
    }
}

impl<T> Control<T> {
    /// Every tensor, in the order in which they cross.
    pub fn each<'a>(&'a self) -> impl Iterator<Item = &'a T> + use<'a, T> {
        let Self { input, middle, output } = self;
        input.iter().chain(middle).chain(output).filter_map(Option::as_ref)
    }
}

/// What one step takes where it may be of a run: that has what is left out here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepInput<T> {
    /// As [`UnetInput::x`].
    pub x: T,
    /// As [`UnetInput::timesteps`].
    pub timesteps: T,
    /// As [`UnetInput::context`].
    pub context: Option<T>,
    /// As [`UnetInput::y`].
    pub y: Option<T>,
    /// As [`UnetInput::control`].
    pub control: Option<Control<T>>,
}

impl<T> From<UnetInput<T>> for StepInput<T> {
    fn from(input: UnetInput<T>) -> Self {
        let UnetInput { x, timesteps, context, y, control } = input;
        Self { x, timesteps, context: Some(context), y, control }
    }
}

impl<T> StepInput<T> {
    /// The same with every tensor replaced, in the order in which they cross.
    ///
    /// # Errors
    /// The first that `f` returns.
    pub fn try_map<'a, U, E>(&'a self, f: &mut impl FnMut(&'a T) -> Result<U, E>) -> Result<StepInput<U>, E> {
        Ok(StepInput {
            x: f(&self.x)?,
            timesteps: f(&self.timesteps)?,
            context: self.context.as_ref().map(&mut *f).transpose()?,
            y: self.y.as_ref().map(&mut *f).transpose()?,
            control: self.control.as_ref().map(|control| control.try_map(f)).transpose()?,
        })
    }

    /// Every tensor, in the order in which they cross.
    pub fn each<'a>(&'a self) -> impl Iterator<Item = &'a T> + use<'a, T> {
        let Self { x, timesteps, context, y, control } = self;
        [x, timesteps].into_iter().chain(context).chain(y).chain(control.iter().flat_map(Control::each))
    }

    /// As [`StepInput::each`], to be changed.
    pub fn each_mut<'a>(&'a mut self) -> impl Iterator<Item = &'a mut T> + use<'a, T> {
        let Self { x, timesteps, context, y, control } = self;
        let control = control.iter_mut().flat_map(|Control { input, middle, output }| {
            input.iter_mut().chain(middle).chain(output).filter_map(Option::as_mut)
        });
        [x, timesteps].into_iter().chain(context).chain(y).chain(control)
    }

    /// Gives every tensor away.
    pub fn into_each(self, take: &mut impl FnMut(T)) {
        let Self { x, timesteps, context, y, control } = self;
        let control = control
            .into_iter()
            .flat_map(|Control { input, middle, output }| input.into_iter().chain(middle).chain(output).flatten());
        [x, timesteps].into_iter().chain(context).chain(y).chain(control).for_each(take);
    }
}
