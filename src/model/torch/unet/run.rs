use tch::{Kind, TchError, Tensor};

use super::super::super::layout::unet::Input;
use super::super::super::{Control, ModelError, UnetInput};
use super::super::target::Target;
use super::super::{dtype_of, failed};
use super::WHAT;
use super::blocks::{EPS, Pass};
use super::embed::sinusoids;
use super::load::TorchUnet;
use super::patches::Patches;
use crate::tensor::{Dims, TensorMeta};

/// A forward after its first residual block: enough to tell how far the input is from an earlier one.
///
/// Holds all that the rest of the forward takes, in the element type computed in.
#[derive(Debug)]
pub struct Started {
    h0: Tensor,
    h1: Tensor,
    /// Activated, `[B, width]`.
    embed: Tensor,
    context: Tensor,
    control: Control<Tensor>,
    patches: Patches,
    target: Target,
    /// Element type of the input, and so of the output.
    kind: Kind,
}

impl Started {
    /// What `input_blocks.0` gave, control added: `[B, channels, h, w]`.
    pub fn h0(&self) -> &Tensor {
        &self.h0
    }

    /// What `input_blocks.1` gave, control added: the same shape.
    pub fn h1(&self) -> &Tensor {
        &self.h1
    }

    /// What is added inside of the network, for every row.
    pub(super) fn control(&self) -> &Control<Tensor> {
        &self.control
    }

    /// The forward of some of its rows only, in the order of `rows`: of the requests that a cache does not answer.
    ///
    /// # Errors
    /// [`ModelError::Executor`] for rows that are not there, [`ModelError::OutOfMemory`].
    pub fn select(&self, rows: &[u32]) -> Result<Self, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let _current = self.target.make_current()?;
        let rows: Vec<i64> = rows.iter().map(|&row| row.into()).collect();
        let index = Tensor::f_from_slice(&rows).and_then(|index| index.f_to_device(self.target.device()));
        let index = index.map_err(failed(WHAT))?;
        let select = |tensor: &Tensor| tensor.f_index_select(0, &index);
        let taken = || {
            Ok(Self {
                h0: select(&self.h0)?,
                h1: select(&self.h1)?,
                embed: select(&self.embed)?,
                context: select(&self.context)?,
                control: self.control.try_map(&mut |tensor| select(tensor))?,
                patches: self.patches.select(&rows),
                target: self.target.clone(),
                kind: self.kind,
            })
        };
        taken().map_err(failed(WHAT))
    }
}

impl TorchUnet {
    /// The network's output for `input`: in `input.x`'s element type and size, on the model's device.
    ///
    /// # Errors
    /// As [`TorchUnet::start`].
    pub fn forward(&self, input: &UnetInput<Tensor>, patches: &Patches) -> Result<Tensor, ModelError> {
        let started = self.start(input, patches)?;
        let end = self.rest(&started)?;
        self.finish(&started, &end)
    }

    /// Runs the network up to its first residual block. Nothing of `input` is written to. Context and control are not
    /// copied where they are as the model computes with them: they must stay as they are while the answer is used.
    ///
    /// # Errors
    /// [`crate::model::UnetFacts::check`]'s before anything is computed; [`ModelError::Changed`],
    /// [`ModelError::OutOfMemory`], [`ModelError::Executor`].
    pub fn start(&self, input: &UnetInput<Tensor>, patches: &Patches) -> Result<Started, ModelError> {
        let meta = self.facts.check(&input.try_map(&mut |tensor| describe(tensor))?)?;
        let rows = meta.shape.as_slice().first().copied().unwrap_or(0).cast_signed();
        patches.check(rows, &self.base.file)?;
        self.base.check_unchanged()?;
        let _no_grad = tch::no_grad_guard();
        let _current = self.base.target.make_current()?;
        self.started(input, rows, patches).map_err(failed(WHAT))
    }

    /// Runs what is between the first residual block and the output layers: `[B, channels, h, w]`, as
    /// [`Started::h1`].
    ///
    /// # Errors
    /// [`ModelError::OutOfMemory`], [`ModelError::Executor`].
    pub fn rest(&self, started: &Started) -> Result<Tensor, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let _current = self.base.target.make_current()?;
        self.ended(started).map_err(failed(WHAT))
    }

    /// Runs the output layers on `h`, which is what [`TorchUnet::rest`] gave or what stands for it.
    ///
    /// # Errors
    /// [`ModelError::Executor`] where `h` has not the size of the forward, [`ModelError::OutOfMemory`].
    pub fn finish(&self, started: &Started, h: &Tensor) -> Result<Tensor, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let _current = self.base.target.make_current()?;
        let mut wanted = started.h0.size();
        if let (Some(channels), Some(own)) = (wanted.get_mut(1), self.net.norm_out.weight.size().first()) {
            *channels = *own;
        }
        if !h.defined() || h.size() != wanted {
            let cause = format!("the last layers take {wanted:?}");
            return Err(ModelError::Executor { what: WHAT, cause });
        }
        self.finished(started, h).map_err(failed(WHAT))
    }

    fn started(&self, input: &UnetInput<Tensor>, rows: i64, patches: &Patches) -> Result<Started, TchError> {
        let own =
            |tensor: &Tensor| tensor.f_to_device(self.base.target.device())?.f_to_kind(self.base.kind)?.f_contiguous();
        // One row of control is all rows'; a view, without memory of its own.
        let mut all_rows = |tensor: &Tensor| {
            let (_, channels, height, width) = tensor.size4()?;
            own(tensor)?.f_expand([rows, channels, height, width], false)
        };
        let control = match &input.control {
            Some(control) => control.try_map(&mut all_rows)?,
            None => Control::default(),
        };
        let embed = self.embed(input, patches)?;
        let context = own(&input.context)?;
        let pass = Pass { embed: &embed, context: &context, patches };
        let mut h0 = pass.conv3(&self.net.conv_in, &own(&input.x)?)?;
        h0 = add(h0, &control.input, 0)?;
        let mut h1 = h0.shallow_clone();
        if let Some(first) = self.net.inputs.first() {
            h1 = add(input_block(&pass, first, h1)?, &control.input, 1)?;
        }
        let kind = input.x.f_kind()?;
        Ok(Started {
            h0,
            h1,
            embed,
            context,
            control,
            patches: patches.clone(),
            target: self.base.target.clone(),
            kind,
        })
    }

    /// Timestep and vector as all residual blocks take them: activated once for all.
    fn embed(&self, input: &UnetInput<Tensor>, patches: &Patches) -> Result<Tensor, TchError> {
        let own = |tensor: &Tensor| tensor.f_to_device(self.base.target.device())?.f_to_kind(self.base.kind);
        let two = |[first, second]: &[_; 2], x: &Tensor| {
            let hidden = patches.linear(first, x)?.f_silu_()?;
            patches.linear(second, &hidden)
        };
        let steps = sinusoids(&input.timesteps.f_to_device(self.base.target.device())?, self.facts.model_channels)?;
        let mut embed = two(&self.net.time_embed, &own(&steps)?)?;
        if let (Some(layers), Some(y)) = (&self.net.label_embed, &input.y) {
            embed = embed.f_add_(&two(layers, &own(y)?.f_contiguous()?)?)?;
        }
        embed.f_silu_()
    }

    fn ended(&self, started: &Started) -> Result<Tensor, TchError> {
        let Started { embed, context, control, patches, .. } = started;
        let pass = Pass { embed, context, patches };
        let mut skips = vec![started.h0.shallow_clone(), started.h1.shallow_clone()];
        let mut h = started.h1.shallow_clone();
        for (at, input) in self.net.inputs.iter().enumerate().skip(1) {
            h = add(input_block(&pass, input, h)?, &control.input, at + 1)?;
            skips.push(h.shallow_clone());
        }
        if let Some(middle) = &self.net.middle {
            h = pass.res(&middle.first, h)?;
            if let Some((transformer, second)) = &middle.rest {
                h = pass.transformer(transformer, h)?;
                h = pass.res(second, h)?;
            }
        }
        h = add(h, &control.middle, 0)?;
        for (at, output) in self.net.outputs.iter().enumerate() {
            let Some(skip) = skips.pop() else {
                return Err(TchError::Shape("more blocks on the way up than on the way down".to_owned()));
            };
            h = Tensor::f_cat(&[h, add(skip, &control.output, at)?], 1)?;
            h = pass.block(&output.block, h)?;
            if let (Some(layer), Some(next)) = (&output.up, skips.last()) {
                // To the sides of the next skip: twice as long, or one less where halving rounded up.
                let (_, _, height, width) = next.size4()?;
                h = h.f_upsample_nearest2d([height, width], None, None)?;
                h = pass.conv3(layer, &h)?;
            }
        }
        Ok(h)
    }

    fn finished(&self, started: &Started, h: &Tensor) -> Result<Tensor, TchError> {
        let h = h.f_to_device(self.base.target.device())?.f_to_kind(self.base.kind)?.f_contiguous()?;
        let mut y = started.patches.group_norm(&self.net.norm_out, &h, EPS)?.f_silu_()?;
        y = started.patches.conv(&self.net.conv_out, &y, 1, 1)?;
        y.f_to_kind(started.kind)
    }
}

fn input_block(pass: &Pass<'_>, input: &Input<Tensor>, x: Tensor) -> Result<Tensor, TchError> {
    match input {
        Input::Block(block) => pass.block(block, x),
        Input::Down(layer) => pass.patches.conv(layer, &x, 2, 1),
    }
}

/// Adds what the list has for the block that runs as number `at`. Not in place: others hold the same tensor.
fn add(h: Tensor, list: &[Option<Tensor>], at: usize) -> Result<Tensor, TchError> {
    match Control::at(list, at) {
        Some(added) => h.f_add(added),
        None => Ok(h),
    }
}

/// A tensor's description, as far as it matters whether it fits.
fn describe(tensor: &Tensor) -> Result<TensorMeta, ModelError> {
    let unknown = |cause: &str| ModelError::Executor { what: WHAT, cause: cause.to_owned() };
    if !tensor.defined() {
        return Err(unknown("an input is not a tensor"));
    }
    let dtype = dtype_of(tensor.f_kind().map_err(failed(WHAT))?);
    let dtype = dtype.ok_or_else(|| unknown("an input has elements of a kind that is not computed with"))?;
    let shape: Vec<u64> = tensor.size().iter().map(|extent| extent.cast_unsigned()).collect();
    Ok(TensorMeta::contiguous(dtype, Dims::new(&shape)?))
}
