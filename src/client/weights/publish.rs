use std::sync::Arc;

use super::super::connect::{Client, resolve_locally};
use super::super::input::unexpected_outcome;
use super::super::link::Link;
use super::super::options::CallOptions;
use super::super::router::Answer;
use super::attach::{AttachOptions, take};
use super::attached::Weights;
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{ArenaHandle, Operation, Outcome, PublishRequest, WeightEntry, decode_table, encode_table};
use crate::tensor::{TensorMeta, digest_tensors};
use crate::transport::Attachment;

/// One tensor to publish: contiguous, in host memory.
#[derive(Debug, Clone, Copy)]
pub struct Published<'a> {
    /// Its key.
    pub key: &'a str,
    /// Element type, shape and strides.
    pub meta: TensorMeta,
    /// Its bytes.
    pub bytes: &'a [u8],
}

impl Published<'_> {
    fn check(&self) -> Result<()> {
        let Self { key, meta, bytes } = self;
        meta.validate()?;
        if !meta.is_row_major() {
            let message = format!("{key:?} is not contiguous; nothing was published");
            return Err(Error::new(ErrorKind::InvalidTensor, message, "make it contiguous first"));
        }
        meta.check_fits(bytes.len())?;
        Ok(())
    }

    fn bytes(&self) -> Result<&[u8]> {
        Ok(self.bytes.get(..self.meta.size_bytes()?).unwrap_or_default())
    }
}

impl Client {
    /// Hands tensors to the broker, where others attach them as `name`, and attaches them itself: with the views in their
    /// place, the tensors can go. What the broker has already, from whatever source, is not sent. The tensors must not
    /// change meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where `name` is that of a file, or of a set with other content that somebody has attached;
    /// [`ErrorKind::InvalidTensor`] for tensors that are not contiguous or a key that comes twice, [`ErrorKind::OutOfMemory`],
    /// [`ErrorKind::Unsupported`] where no memory is shared with the broker.
    pub fn publish(&self, name: &str, tensors: &[Published<'_>], options: &CallOptions<'_>) -> Result<Weights> {
        for tensor in tensors {
            tensor.check()?;
        }
        let described: Result<Vec<_>> = tensors
            .iter()
            .map(|tensor| Ok((tensor.key, tensor.meta.dtype, tensor.meta.shape.as_slice(), tensor.bytes()?)))
            .collect();
        let content = digest_tensors(described?);
        let entries: Vec<WeightEntry> = tensors
            .iter()
            .map(|tensor| WeightEntry {
                key: tensor.key.to_owned(),
                dtype: tensor.meta.dtype,
                shape: tensor.meta.shape,
                offset: 0,
            })
            .collect();
        let request = PublishRequest { name: resolve_locally(name), content };
        let table = encode_table(&entries)?;
        self.with_shared_link(|link| {
            let answer = link.call(Operation::Publish(request.clone()), &table, options)?;
            let answer = match &answer.reply.outcome {
                Outcome::Draft(_) => fill(&link, answer, tensors, options)?,
                _ => answer,
            };
            Weights::open(self, take(link, answer, None)?, name, &AttachOptions::default())
        })
    }
}

/// Fills the memory that the broker offers, and says so.
fn fill(link: &Arc<Link>, answer: Answer, tensors: &[Published<'_>], options: &CallOptions<'_>) -> Result<Answer> {
    let Outcome::Draft(offer) = answer.reply.outcome else { return Err(unexpected_outcome()) };
    let table = answer.payload.as_ref().map(super::super::tensor::PooledBytes::received).unwrap_or_default();
    let copied = decode_table(table).map_err(Error::from).and_then(|entries| {
        copy_in(tensors, &entries, &offer.handle, answer.handles.into_iter().next(), offer.size_bytes)
    });
    copied.inspect_err(|_| link.abandon(offer.draft))?;
    link.call(Operation::PublishFilled { draft: offer.draft }, &[], options)
}

/// Copies tensors to their places. The memory is unmapped again when this returns.
#[cfg(target_os = "linux")]
fn copy_in(
    tensors: &[Published<'_>],
    entries: &[WeightEntry],
    handle: &ArenaHandle,
    attached: Option<Attachment>,
    size_bytes: u64,
) -> Result<()> {
    use crate::device::{DraftRegion, Region, Span};
    let (ArenaHandle::Attached, Some(Attachment::Fd(fd))) = (handle, attached) else {
        return Err(Error::new(ErrorKind::Protocol, "the broker did not hand over memory to publish in", ""));
    };
    let region: Arc<dyn Region> = DraftRegion::import(fd, usize::try_from(size_bytes).unwrap_or(usize::MAX))?;
    for tensor in tensors {
        let place = entries.binary_search_by(|entry| entry.key.as_str().cmp(tensor.key)).ok();
        let entry = place.and_then(|at| entries.get(at)).ok_or_else(unexpected_outcome)?;
        let offset = usize::try_from(entry.offset).unwrap_or(usize::MAX);
        let bytes = tensor.bytes()?;
        Span::new(Arc::clone(&region), offset, bytes.len())?.write(bytes)?;
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn copy_in(
    _tensors: &[Published<'_>],
    _entries: &[WeightEntry],
    _handle: &ArenaHandle,
    _attached: Option<Attachment>,
    _size_bytes: u64,
) -> Result<()> {
    Err(Error::new(ErrorKind::Unsupported, "tensors are published on Linux alone", ""))
}
