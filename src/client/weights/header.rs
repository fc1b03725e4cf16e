use super::super::connect::{Client, resolve_locally};
use super::super::input::unexpected_outcome;
use super::super::tensor::PooledBytes;
use crate::error::Result;
use crate::protocol::{Operation, Outcome, decode_table};
use crate::tensor::TensorMeta;

impl Client {
    /// Keys, element types and shapes of the tensors that a safetensors file, or a published set, has as it is stored. The
    /// broker reads a file's header for it and loads nothing, and no memory need be shared.
    ///
    /// # Errors
    /// [`ErrorKind::ModelNotFound`](crate::ErrorKind::ModelNotFound),
    /// [`ErrorKind::InvalidModel`](crate::ErrorKind::InvalidModel).
    pub fn header(&self, name: &str) -> Result<Vec<(String, TensorMeta)>> {
        let name = resolve_locally(name);
        let options = self.default_options();
        self.with_link(|link| {
            let answer = link.call(Operation::Header { name: name.clone() }, &[], &options)?;
            let Outcome::Header = answer.reply.outcome else { return Err(unexpected_outcome()) };
            let table = answer.payload.as_ref().map(PooledBytes::received).unwrap_or_default();
            let entries = decode_table(table)?;
            Ok(entries.into_iter().map(|entry| (entry.key.clone(), entry.meta())).collect())
        })
    }
}
