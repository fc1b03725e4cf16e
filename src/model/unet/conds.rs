use std::collections::BTreeMap;

use super::super::ModelError;
use super::UnetFacts;
use crate::service::{StepInput, UnetInput};
use crate::tensor::{DType, Dims, TensorMeta};

/// Most conditionings of one run. Two are usual; regions of a picture bring a few more.
const MAX_CONDS: usize = 32;
/// Most tokens that conditionings of different lengths are brought to.
const MAX_TOKENS: u64 = 128 * 77;
/// Most bytes that a run keeps of all its conditionings. Two prompts of SDXL take one or two million.
const MAX_KEPT_BYTES: u64 = 256 << 20;
/// Bytes of an element as it is kept.
const ELEMENT_BYTES: u64 = 4;

/// What a run was sent of each of its conditionings, by the number that the caller gave it: enough to check a step that
/// refers to them.
#[derive(Debug, Default)]
pub struct Conds {
    sent: BTreeMap<u32, Sent>,
}

/// Rows and tokens of a conditioning's context, rows of its vector.
#[derive(Debug, Clone, Copy, Default)]
struct Sent {
    context: Option<(u64, u64)>,
    vector: Option<u64>,
    /// How often it was sent, in part or as a whole.
    times: u64,
}

impl Sent {
    fn kept_bytes(&self, facts: &UnetFacts) -> u64 {
        let context =
            self.context.map_or(0, |(rows, tokens)| rows.saturating_mul(tokens).saturating_mul(facts.context_width));
        let vector = self.vector.zip(facts.vector_width).map_or(0, |(rows, width)| rows.saturating_mul(width));
        context.saturating_add(vector).saturating_mul(ELEMENT_BYTES)
    }
}

/// Which sending of a conditioning a step is meant to run with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CondUse {
    /// The caller's number for it.
    pub cond: u32,
    /// The sending whose parts the step leaves out; 0 where it leaves out none.
    pub needs: u64,
    /// The sending that the step is; 0 where it brings nothing.
    pub brings: u64,
}

/// Which sendings of a run's conditionings have reached the model.
#[derive(Debug, Default)]
pub struct Arrived(BTreeMap<u32, u64>);

impl Arrived {
    /// Checks that what a step leaves out is there: the step that sent it may have been refused after it was checked.
    ///
    /// # Errors
    /// [`ModelError::Conds`].
    pub fn check(&self, facts: &UnetFacts, uses: &[CondUse]) -> Result<(), ModelError> {
        let here = |cond| self.0.get(cond).copied().unwrap_or(0);
        match uses.iter().find(|one| one.needs != 0 && one.needs != here(&one.cond)) {
            None => Ok(()),
            Some(CondUse { cond, .. }) => {
                let reason = format!("the step that sent cond {cond} last did not run; send it again");
                Err(ModelError::Conds { path: facts.path.clone(), reason })
            }
        }
    }

    /// A step ran with these.
    pub fn note(&mut self, uses: &[CondUse]) {
        self.0.extend(uses.iter().filter(|one| one.brings != 0).map(|one| (one.cond, one.brings)));
    }
}

/// What comes out of a step that was checked, and what other steps must be like to run with it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepFacts {
    /// The result: `x`'s element type and size, contiguous.
    pub output: TensorMeta,
    /// Tokens of the context.
    pub tokens: u64,
}

impl Conds {
    /// Checks a step of a run whose rows are split evenly among `conds`, and remembers what it brings. What it leaves out
    /// must have been brought by an earlier one, for as many rows or for one.
    ///
    /// # Errors
    /// As [`UnetFacts::check`]; [`ModelError::Conds`] for conditionings that were never sent, or not for so many rows.
    pub fn check(
        &mut self,
        facts: &UnetFacts,
        input: &StepInput<TensorMeta>,
        conds: &[u32],
    ) -> Result<(StepFacts, Vec<CondUse>), ModelError> {
        let rows = input.x.shape.as_slice().first().copied().unwrap_or(0);
        let each = share(facts, rows, conds)?;
        let refused = |reason: String| ModelError::Conds { path: facts.path.clone(), reason };
        let sent = |cond: &u32| self.sent.get(cond).copied().unwrap_or_default();
        let fits = |cond: &u32, has: u64, what: &str| match has == each || has == 1 {
            true => Ok(()),
            false => {
                Err(refused(format!("cond {cond} was sent {what} of {has} rows, and this step has {each} for it")))
            }
        };
        let tokens = match &input.context {
            Some(context) => context.shape.as_slice().get(1).copied().unwrap_or(0),
            None => {
                let mut tokens = 1;
                for cond in conds {
                    let (has, length) = sent(cond).context.ok_or_else(|| {
                        refused(format!("cond {cond} was never sent in this run, and the step brings no context"))
                    })?;
                    fits(cond, has, "a context")?;
                    tokens = least_common_multiple(tokens, length).filter(|&all| all <= MAX_TOKENS).ok_or_else(|| {
                        refused(format!("the contexts of conds {conds:?} have lengths that fit no common one of at most {MAX_TOKENS}"))
                    })?;
                }
                tokens
            }
        };
        if let (None, Some(_)) = (&input.y, facts.vector_width) {
            for cond in conds {
                let missing = || refused(format!("cond {cond} was never sent a y in this run, which this model needs"));
                fits(cond, sent(cond).vector.ok_or_else(missing)?, "a y")?;
            }
        }
        let complete = complete(facts, input, rows, tokens);
        let output = facts.check(&complete)?;
        let known = conds.iter().filter(|cond| self.sent.contains_key(cond)).count();
        if self.sent.len() + conds.len() - known > MAX_CONDS {
            return Err(refused(format!("a run has at most {MAX_CONDS} conds; open another one")));
        }
        let brought = Sent { context: input.context.map(|_| (each, tokens)), vector: input.y.map(|_| each), times: 0 };
        let others = self.sent.iter().filter(|(cond, _)| !conds.contains(cond)).map(|(_, sent)| sent.kept_bytes(facts));
        let these = conds.iter().map(|cond| {
            let before = sent(cond);
            let after = Sent {
                context: brought.context.or(before.context),
                vector: brought.vector.or(before.vector),
                times: 0,
            };
            after.kept_bytes(facts)
        });
        let kept = others.chain(these).fold(0, u64::saturating_add);
        if kept > MAX_KEPT_BYTES {
            return Err(ModelError::CondsTooLarge { path: facts.path.clone(), bytes: kept, limit: MAX_KEPT_BYTES });
        }
        let leaves_out = input.context.is_none() || (input.y.is_none() && facts.vector_width.is_some());
        let uses = conds.iter().map(|&cond| {
            let sent = self.sent.entry(cond).or_default();
            let needs = if leaves_out { sent.times } else { 0 };
            sent.context = brought.context.or(sent.context);
            sent.vector = brought.vector.or(sent.vector);
            let brings = input.context.is_some() || input.y.is_some();
            sent.times += u64::from(brings);
            CondUse { cond, needs, brings: if brings { sent.times } else { 0 } }
        });
        Ok((StepFacts { output, tokens }, uses.collect()))
    }
}

/// Rows of each conditioning.
///
/// # Errors
/// [`ModelError::Conds`] where they cannot be split evenly.
pub(in crate::model) fn share(facts: &UnetFacts, rows: u64, conds: &[u32]) -> Result<u64, ModelError> {
    let refused = |reason: String| Err(ModelError::Conds { path: facts.path.clone(), reason });
    if conds.is_empty() {
        return refused("a step of a run names at least one cond".to_owned());
    }
    if conds.len() > MAX_CONDS {
        return refused(format!("{} conds; a step has at most {MAX_CONDS}", conds.len()));
    }
    if (1..conds.len()).any(|at| conds.get(..at).is_some_and(|before| before.contains(conds.get(at).unwrap_or(&0)))) {
        return refused(format!("conds {conds:?} name one twice"));
    }
    let count = conds.len() as u64;
    match rows > 0 && rows.is_multiple_of(count) {
        true => Ok(rows / count),
        false => refused(format!("x has {rows} rows, which {count} conds cannot share evenly")),
    }
}

/// The step as one that leaves nothing out.
fn complete(facts: &UnetFacts, input: &StepInput<TensorMeta>, rows: u64, tokens: u64) -> UnetInput<TensorMeta> {
    let of_run = |shape: Dims| TensorMeta::contiguous(DType::F32, shape);
    let context = input.context.unwrap_or_else(|| of_run(Dims::of([rows, tokens, facts.context_width])));
    let vector = || facts.vector_width.map(|width| of_run(Dims::of([rows, width])));
    UnetInput {
        x: input.x,
        timesteps: input.timesteps,
        context,
        y: input.y.or_else(vector),
        control: input.control.clone(),
    }
}

impl UnetFacts {
    /// As [`UnetFacts::check`], of a step that belongs to no run.
    ///
    /// # Errors
    /// As there; [`ModelError::MissingInput`] without a context.
    pub fn check_alone(&self, input: &StepInput<TensorMeta>) -> Result<StepFacts, ModelError> {
        let expected = || format!("[B, any, {}]", self.context_width);
        let missing = || ModelError::MissingInput { path: self.path.clone(), tensor: "context", expected: expected() };
        let context = input.context.ok_or_else(missing)?;
        let (x, timesteps, y, control) = (input.x, input.timesteps, input.y, input.control.clone());
        let output = self.check(&UnetInput { x, timesteps, context, y, control })?;
        Ok(StepFacts { output, tokens: context.shape.as_slice().get(1).copied().unwrap_or(0) })
    }
}

pub(in crate::model) fn least_common_multiple(one: u64, other: u64) -> Option<u64> {
    let (mut divisor, mut rest) = (one, other);
    while rest != 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    one.checked_div(divisor)?.checked_mul(other)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::{Prediction, UnetVariant};
    use super::*;

    fn facts(vector_width: Option<u64>) -> UnetFacts {
        UnetFacts {
            path: PathBuf::from("model.safetensors"),
            family: "generic",
            variant: UnetVariant::Plain,
            prediction: Prediction::Eps,
            zero_terminal_snr: false,
            in_channels: 4,
            out_channels: 4,
            model_channels: 64,
            context_width: 40,
            vector_width,
            levels: 2,
            skips: Vec::new(),
            weight_elements: 0,
            elements_per_position: 0,
            reordered_elements: 0,
        }
    }

    fn meta<const N: usize>(shape: [u64; N]) -> TensorMeta {
        TensorMeta::contiguous(DType::F32, Dims::of(shape))
    }

    fn step(rows: u64, context: Option<[u64; 3]>, y: Option<[u64; 2]>) -> StepInput<TensorMeta> {
        let (x, timesteps) = (meta([rows, 4, 8, 8]), meta([rows]));
        StepInput { x, timesteps, context: context.map(meta), y: y.map(meta), control: None }
    }

    fn reason<T: std::fmt::Debug>(result: Result<T, ModelError>) -> String {
        result.expect_err("it is refused").to_string()
    }

    #[test]
    fn what_was_sent_once_may_be_left_out() {
        let (facts, mut conds) = (facts(Some(16)), Conds::default());
        assert!(reason(conds.check(&facts, &step(2, None, None), &[0, 1])).contains("cond 0 was never sent"));
        let context = Some([2, 77, 40]);
        assert!(reason(conds.check(&facts, &step(2, context, None), &[0, 1])).contains("never sent a y"));
        let (sent, _) = conds.check(&facts, &step(2, context, Some([2, 16])), &[0, 1]).unwrap();
        assert_eq!((sent.tokens, sent.output.shape), (77, Dims::of([2, 4, 8, 8])));
        for (rows, which) in [(2, &[0, 1][..]), (2, &[1, 0]), (1, &[1]), (4, &[0, 1])] {
            assert_eq!(conds.check(&facts, &step(rows, None, None), which).unwrap().0.tokens, 77, "{which:?}");
        }
        assert!(reason(conds.check(&facts, &step(3, None, None), &[0, 1, 2])).contains("cond 2 was never sent"));
        // What did not fit was not remembered.
        assert!(conds.check(&facts, &step(1, Some([1, 77, 41]), Some([1, 16])), &[2]).is_err());
        assert!(reason(conds.check(&facts, &step(1, None, None), &[2])).contains("cond 2 was never sent"));
    }

    #[test]
    fn what_was_sent_by_a_step_that_did_not_run_is_not_there() {
        let (facts, mut conds, mut arrived) = (facts(None), Conds::default(), Arrived::default());
        let context = Some([1, 77, 40]);
        let mut check = |context| conds.check(&facts, &step(1, context, None), &[0]).unwrap().1;
        let (first, second, left_out) = (check(context), check(context), check(None));
        arrived.check(&facts, &first).unwrap();
        arrived.note(&first);
        // The second is refused: what the third was checked against never came.
        assert!(reason(arrived.check(&facts, &left_out)).contains("did not run"));
        arrived.note(&second);
        arrived.check(&facts, &left_out).unwrap();
    }

    #[test]
    fn rows_must_be_those_sent_or_one() {
        let (facts, mut conds) = (facts(None), Conds::default());
        conds.check(&facts, &step(6, Some([6, 77, 40]), None), &[0, 1]).unwrap();
        let words = reason(conds.check(&facts, &step(4, None, None), &[0, 1]));
        assert!(words.contains("a context of 3 rows") && words.contains("has 2"), "{words}");
    }

    #[test]
    fn conds_of_different_lengths_meet_at_a_common_one() {
        let (facts, mut conds) = (facts(None), Conds::default());
        for (cond, tokens) in [(0, 77), (1, 154), (2, 231), (3, 9973)] {
            conds.check(&facts, &step(1, Some([1, tokens, 40]), None), &[cond]).unwrap();
        }
        assert_eq!(conds.check(&facts, &step(3, None, None), &[0, 1, 2]).unwrap().0.tokens, 462);
        assert!(reason(conds.check(&facts, &step(2, None, None), &[0, 3])).contains("no common one"));
    }

    #[test]
    fn a_run_keeps_so_many_bytes_of_its_conds_and_no_more() {
        let (mut facts, mut conds) = (facts(None), Conds::default());
        facts.context_width = 1 << 16;
        let half = MAX_KEPT_BYTES / ELEMENT_BYTES / facts.context_width / 2;
        let mut send = |cond, tokens| conds.check(&facts, &step(1, Some([1, tokens, 1 << 16]), None), &[cond]);
        send(0, half).unwrap();
        send(1, half).unwrap();
        let words = reason(send(2, 1));
        assert!(words.contains("may keep 268435456"), "{words}");
        // What is sent anew takes the place of what was there.
        send(1, 1).unwrap();
        send(2, 1).unwrap();
        assert!(send(0, 2 * half).is_err());
    }

    #[test]
    fn rows_are_shared_evenly_among_conds_that_are_told_apart() {
        let (facts, mut conds) = (facts(None), Conds::default());
        let mut of =
            |rows, conds_of: &[u32]| reason(conds.check(&facts, &step(rows, Some([rows, 77, 40]), None), conds_of));
        assert!(of(2, &[]).contains("at least one"));
        assert!(of(3, &[0, 1]).contains("cannot share evenly"));
        assert!(of(2, &[1, 1]).contains("twice"));
        assert!(of(33, &(0..33).collect::<Vec<_>>()).contains("at most 32"));
        for first in (0..32).step_by(8) {
            let eight: Vec<u32> = (first..first + 8).collect();
            conds.check(&facts, &step(8, Some([8, 77, 40]), None), &eight).unwrap();
        }
        assert!(reason(conds.check(&facts, &step(1, Some([1, 77, 40]), None), &[32])).contains("at most 32 conds"));
        assert!(conds.check(&facts, &step(1, Some([1, 77, 40]), None), &[31]).is_ok(), "a known one is sent anew");
    }
}
