use super::super::memory::Held;
use super::super::outbox::Payload;
use super::super::responder::Responder;
use crate::device::{DeviceError, StreamRef};
use crate::model::ModelError;
use crate::protocol::Outcome;
use crate::service::How;
use crate::tensor::TensorMeta;

/// A call that ran: what is left is to hand its result over and its inputs back.
pub(super) struct Finished {
    pub(super) responder: Responder,
    pub(super) output: Held,
    pub(super) meta: TensorMeta,
    pub(super) how: How,
    /// Whether the result crosses as bytes behind the reply.
    pub(super) inline: bool,
}

impl Finished {
    /// Answers; `mark` says of all inputs that they were read.
    pub(super) fn answer<I>(
        self,
        mut inputs: I,
        mark: impl FnOnce(&mut I, &Held) -> Result<(), DeviceError>,
        stream: Option<StreamRef>,
    ) {
        let Self { responder, output, meta, how, inline } = self;
        if let Err(error) = mark(&mut inputs, &output) {
            output.give_up(stream);
            return responder.fail(error);
        }
        if inline {
            drop(inputs);
            return match meta.size_bytes() {
                Ok(length) => {
                    let payload = Payload::Slot { held: output, length };
                    responder.answer_with_payload(Outcome::InlineTensor { meta, how }, payload);
                }
                Err(error) => responder.fail(error),
            };
        }
        let handed_over = output.hand_over(meta, stream);
        // Given back before the client can know, so that its next call finds the slots free; but behind the mark that
        // says when the GPU is done with them.
        drop(inputs);
        match handed_over {
            Ok(descriptor) => responder.answer(Outcome::Tensor { descriptor, how }),
            Err(error) => responder.fail(error),
        }
    }
}

/// An input that the lane's stream could not be made to wait for.
pub(super) fn enqueue_failed(error: DeviceError) -> ModelError {
    ModelError::Executor { what: "waiting for the input", cause: error.to_string() }
}
