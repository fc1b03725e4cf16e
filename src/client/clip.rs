use super::compute::{Computed, Sources, compute};
use super::connect::Client;
use super::input::{Input, unexpected_outcome};
use super::options::CallOptions;
use super::tensor::Tensor;
use super::unet::located;
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{ClipRequest, ModelReport, Operation, Outcome, TensorSource, Times};
use crate::service::{
    AdapterStack, AdapterTaken, ClipInput, ClipKind, ClipOptions, ClipPrompt, ClipText, ClipTokens, IgnoredEmbedding,
    Service, Token, WeightedToken,
};
use crate::tensor::{DType, Dims, TensorMeta};

/// Text encoders that the broker runs.
#[derive(Debug, Clone)]
pub struct Clip {
    client: Client,
    models: Vec<String>,
    adapters: AdapterStack,
    info: ModelReport,
}

/// An encoded prompt.
#[derive(Debug, Clone)]
pub struct ClipOutput {
    /// The conditioning: float32 `[1, positions, width]`, in the slot it was computed in.
    pub cond: Tensor,
    /// The pooled row: float32 `[1, width]`.
    pub pooled: Tensor,
    /// Embeddings that the prompt names in vain; it was encoded without them.
    pub ignored: Vec<IgnoredEmbedding>,
    /// What the encoders took up of each adapter.
    pub adapters: Vec<AdapterTaken>,
    /// When it ran, by the broker's clock.
    pub times: Times,
    /// Bytes the client copied to hand tokens over.
    pub copied_in_bytes: u64,
    /// Bytes copied to bring the results back, or still to be copied where they are staged; 0 where they are read in
    /// place.
    pub copied_out_bytes: u64,
}

impl Clip {
    pub(super) fn new(client: Client, models: Vec<String>, info: ModelReport) -> Self {
        Self { client, models, adapters: AdapterStack::default(), info }
    }

    /// The same text encoders with these adapters in every prompt. The first prompt waits until they have been read and put
    /// together, and delays nobody else by that; the encoders are not modified.
    #[must_use]
    pub fn with_adapters(&self, adapters: &AdapterStack) -> Self {
        Self { adapters: located(adapters), ..self.clone() }
    }

    /// Has the broker read adapters and put them together now, instead of with the first prompt that asks for them; what
    /// the encoders take up of each.
    ///
    /// # Errors
    /// [`ErrorKind::ModelNotFound`] for an adapter that is not there, [`ErrorKind::InvalidModel`] for one that does not fit.
    pub fn prefetch(&self, adapters: &AdapterStack, options: &CallOptions<'_>) -> Result<Vec<AdapterTaken>> {
        let (models, adapters) = (self.models.clone(), located(adapters));
        match self.client.ask(Operation::Prefetch { service: Service::Clip, models, adapters }, options)? {
            Outcome::Adapters(taken) => Ok(taken),
            _ => Err(unexpected_outcome()),
        }
    }

    /// What the text encoders are.
    #[must_use]
    pub fn info(&self) -> &ModelReport {
        &self.info
    }

    /// The client they are reached through.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Encodes a prompt in words, as the diffusion model was trained with: `(word:1.2)` weighs, `embedding:name` is a file
    /// in the broker's folders for embeddings, and a long prompt goes on in further chunks.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] for a prompt of more than 64 KiB or 128 chunks; [`ErrorKind::OutOfMemory`],
    /// [`ErrorKind::Busy`], [`ErrorKind::Timeout`], [`ErrorKind::ConnectionLost`]. An embedding that cannot be had is no
    /// error: [`ClipOutput::ignored`] tells of it.
    pub fn encode(&self, text: &str) -> Result<ClipOutput> {
        let text = ClipText { text: text.to_owned(), text_g: None };
        self.encode_with(&text, ClipOptions::default(), &self.client.default_options())
    }

    /// As [`Clip::encode`], with a text of its own for CLIP-G, another block's result, and waiting as `options` say.
    ///
    /// # Errors
    /// As [`Clip::encode`]; [`ErrorKind::Cancelled`] where `options` interrupt it.
    pub fn encode_with(&self, text: &ClipText, how: ClipOptions, options: &CallOptions<'_>) -> Result<ClipOutput> {
        self.call(&ClipInput::Text(text.clone()), how, options)
    }

    /// Encodes tokens: one prompt for each encoder of the set.
    ///
    /// # Errors
    /// As [`Clip::encode`]; [`ErrorKind::InvalidTensor`] also for chunks of different lengths, for tokens or rows that an
    /// encoder does not take, and for prompts that are missing or too many.
    pub fn encode_tokens(&self, prompts: &[ClipPrompt]) -> Result<ClipOutput> {
        self.encode_tokens_with(prompts, ClipOptions::default(), &self.client.default_options())
    }

    /// As [`Clip::encode_tokens`], with another block's result, and waiting as `options` say.
    ///
    /// # Errors
    /// As [`Clip::encode_tokens`]; [`ErrorKind::Cancelled`] where `options` interrupt it.
    pub fn encode_tokens_with(
        &self,
        prompts: &[ClipPrompt],
        how: ClipOptions,
        options: &CallOptions<'_>,
    ) -> Result<ClipOutput> {
        let packed = prompts.iter().map(Packed::of).collect::<Result<Vec<_>>>()?;
        let tokens = packed.iter().map(Packed::tokens).collect::<Result<Vec<_>>>()?;
        self.call(&ClipInput::Tokens(tokens), how, options)
    }

    fn call(&self, input: &ClipInput<Input<'_>>, how: ClipOptions, options: &CallOptions<'_>) -> Result<ClipOutput> {
        let inputs: Vec<Input<'_>> = input.each().copied().collect();
        let operation = |sources: Sources, result| {
            let mut sources = sources.into_iter();
            // In the order in which they were given.
            let mut next = |_: &Input<'_>| -> Result<TensorSource> { sources.next().ok_or_else(unexpected_outcome) };
            let input = input.try_map(&mut next)?;
            let (models, adapters) = (self.models.clone(), self.adapters.clone());
            let request = ClipRequest { models, input, options: how, adapters, result };
            Ok(Operation::Clip(Box::new(request)))
        };
        let computed = self.client.with_link(|link| compute(link, &inputs, &operation, options))?;
        let Computed { tensor: cond, second, ignored, adapters, times, copied_in_bytes, copied_out_bytes, .. } =
            computed;
        let pooled = second.ok_or_else(unexpected_outcome)?;
        Ok(ClipOutput { cond, pooled, ignored, adapters, times, copied_in_bytes, copied_out_bytes })
    }
}

/// A prompt's tokens as they cross.
struct Packed {
    kind: ClipKind,
    ids: Vec<u8>,
    weights: Option<Vec<u8>>,
    rows: Vec<u8>,
    chunks: u64,
    length: u64,
    width: u64,
}

impl Packed {
    fn of(prompt: &ClipPrompt) -> Result<Self> {
        let ClipPrompt { kind, chunks } = prompt;
        let length = chunks.first().map_or(0, Vec::len);
        if chunks.iter().any(|chunk| chunk.len() != length) {
            return Err(uneven(*kind, "chunks", length, chunks.iter().map(Vec::len)));
        }
        let all = || chunks.iter().flatten();
        let rows: Vec<&[f32]> = all().filter_map(|at| row(at)).collect();
        let width = rows.first().map_or(0, |row| row.len());
        if rows.iter().any(|row| row.len() != width) {
            return Err(uneven(*kind, "rows", width, rows.iter().map(|row| row.len())));
        }
        let mut next_row = 0;
        let mut id = |at: &WeightedToken| -> Result<i32> {
            Ok(match at.token {
                Token::Id(id) => i32::try_from(id).map_err(|_| no_such_token(*kind, id))?,
                Token::Vector(_) => {
                    next_row -= 1;
                    next_row
                }
            })
        };
        let mut ids = Vec::new();
        for at in all() {
            ids.extend(id(at)?.to_ne_bytes());
        }
        let weighted = all().any(|at| at.weight != 1.0);
        let weights = weighted.then(|| all().flat_map(|at| at.weight.to_ne_bytes()).collect());
        let rows = rows.iter().flat_map(|row| row.iter()).flat_map(|value| value.to_ne_bytes()).collect();
        let (chunks, length, width) = (chunks.len() as u64, length as u64, width as u64);
        Ok(Self { kind: *kind, ids, weights, rows, chunks, length, width })
    }

    fn tokens(&self) -> Result<ClipTokens<Input<'_>>> {
        let positions = Dims::of([self.chunks, self.length]);
        let ids = Input::new(TensorMeta::contiguous(DType::I32, positions), &self.ids)?;
        let weights = TensorMeta::contiguous(DType::F32, positions);
        let weights = self.weights.as_ref().map(|bytes| Input::new(weights, bytes)).transpose()?;
        let count = (self.rows.len() as u64 / 4).checked_div(self.width).unwrap_or(0);
        let rows = TensorMeta::contiguous(DType::F32, Dims::of([count, self.width]));
        let rows = (count > 0).then(|| Input::new(rows, &self.rows)).transpose()?;
        Ok(ClipTokens { kind: self.kind, ids, weights, rows })
    }
}

fn row(at: &WeightedToken) -> Option<&[f32]> {
    match &at.token {
        Token::Vector(row) => Some(row),
        Token::Id(_) => None,
    }
}

fn uneven(kind: ClipKind, what: &str, first: usize, mut all: impl Iterator<Item = usize>) -> Error {
    let other = all.find(|&length| length != first).unwrap_or(first);
    let message = format!("{what} of a prompt for {kind} have one length, not {first} and {other}");
    Error::new(ErrorKind::InvalidTensor, message, "fill shorter chunks with the encoder's padding")
}

fn no_such_token(kind: ClipKind, id: u32) -> Error {
    let message = format!("no encoder has a token {id}, as one for {kind} is");
    Error::new(ErrorKind::InvalidTensor, message, "pass token ids as the encoder's tokenizer gives them")
}
