use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use super::super::connect::Client;
use super::super::link::Link;
use super::super::options::CallOptions;
use super::super::tensor::{Storage, Tensor};
use super::attach::{AttachOptions, Handed, hand};
use super::map::WeightMap;
use crate::device::{Place, Span};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{AttachmentId, ContentDigest, GpuUuid};
use crate::protocol::{Operation, WeightEntry};
use crate::tensor::{CastRule, TensorMeta};

/// Weights that lie in the broker's memory once for everybody, as this process sees them. Cloning shares them; the hold
/// on them ends with the last clone and the last tensor.
///
/// Each tensor is a view; attachments of the same set in one session share it. In host memory a write to one gives this
/// process a page of its own: no other sees it, and `status` counts it. The memory stays mapped for as long as anything refers to it, whatever becomes of the broker.
#[derive(Debug, Clone)]
pub struct Weights {
    attached: Arc<Attached>,
}

/// What the tensors of one attachment share.
pub(in crate::client) struct Attached {
    client: Client,
    name: String,
    rule: CastRule,
    gpu: Option<GpuUuid>,
    content: ContentDigest,
    tensors: BTreeMap<String, WeightEntry>,
    /// Shared with the session's other attachments of the same set.
    map: Arc<WeightMap>,
    hold: Mutex<Hold>,
    /// Held while the weights are reattached, which takes its time: `hold` stays free for whoever looks at it.
    reattaching: Mutex<()>,
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached")
            .field("name", &self.name)
            .field("tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}

/// The right to the weights, in one session.
struct Hold {
    link: Arc<Link>,
    attachment: AttachmentId,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.link.detach(self.attachment);
    }
}

impl Attached {
    /// This process's ordinal of the GPU that the weights lie on.
    pub(in crate::client) fn ordinal(&self) -> Option<i32> {
        self.map.ordinal()
    }
}

impl Weights {
    /// Maps what was handed over.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] for a table that does not fit the memory, else [`crate::device::DeviceError`].
    pub(super) fn open(client: &Client, handed: Handed, name: &str, options: &AttachOptions<'_>) -> Result<Self> {
        let Handed { link, weights, entries, handle, gpu } = handed;
        // From here on dropping it gives the attachment back.
        let hold = Hold { link, attachment: weights.attachment };
        let map = hold
            .link
            .weight_maps
            .share(weights.set, || WeightMap::open(&weights.handle, handle, weights.size_bytes, gpu.as_deref()))?;
        for entry in &entries {
            check_inside(entry, weights.size_bytes)?;
        }
        let tensors = entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
        let attached = Attached {
            client: client.clone(),
            name: name.to_owned(),
            rule: options.rule.clone(),
            gpu: options.gpu,
            content: weights.content,
            tensors,
            map,
            hold: Mutex::new(hold),
            reattaching: Mutex::default(),
        };
        Ok(Self { attached: Arc::new(attached) })
    }

    /// What they were asked for by.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.attached.name
    }

    /// What the tensors contain.
    #[must_use]
    pub fn content(&self) -> ContentDigest {
        self.attached.content
    }

    /// Bytes of shared memory that they lie in.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.attached.map.region().size_bytes() as u64
    }

    /// Where they begin: an address of this process, of the GPU where they lie there. Valid while a clone or a tensor lives.
    #[must_use]
    pub fn address(&self) -> usize {
        self.attached.map.region().address()
    }

    /// The memory they lie in.
    #[must_use]
    pub fn place(&self) -> Place {
        self.attached.map.region().place()
    }

    /// Number of tensors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.attached.tensors.len()
    }

    /// Whether there are none, which cannot be.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.attached.tensors.is_empty()
    }

    /// Keys with element type and shape, in order.
    pub fn metas(&self) -> impl ExactSizeIterator<Item = (&str, TensorMeta)> {
        self.attached.tensors.iter().map(|(key, entry)| (key.as_str(), entry.meta()))
    }

    /// Keys, in order.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.attached.tensors.keys().map(String::as_str)
    }

    /// The tensor called `key`: a view, which keeps the weights mapped and held.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] where there is none, naming keys that are alike.
    pub fn tensor(&self, key: &str) -> Result<Tensor> {
        let entry = self.attached.tensors.get(key).ok_or_else(|| self.missing(key))?;
        let meta = entry.meta();
        let offset = usize::try_from(entry.offset).unwrap_or(usize::MAX);
        let span = Span::new(self.attached.map.region(), offset, meta.size_bytes()?)?;
        Ok(Tensor::new(meta, Storage::Attached { weights: Arc::clone(&self.attached), span }))
    }

    fn missing(&self, key: &str) -> Error {
        let end = key.rsplit('.').next().unwrap_or(key);
        let alike = self.keys().find(|known| known.ends_with(key) || key.ends_with(*known));
        let alike = alike.or_else(|| self.keys().find(|known| known.ends_with(end)));
        let hint = alike.map_or_else(|| "it has no key like it".to_owned(), |alike| format!("it has {alike:?}"));
        let message = format!("{} has no tensor {key:?}", self.name());
        Error::new(ErrorKind::InvalidTensor, message, hint)
    }

    /// Whether the broker still counts these weights as held: what to ask before computing with them.
    ///
    /// # Errors
    /// [`ErrorKind::ConnectionLost`] where the broker is gone, [`ErrorKind::Stale`] where they were unloaded by force.
    /// They stay readable in either case, unless reattaching failed as told there; [`Weights::reattach`] makes it good
    /// again.
    pub fn check(&self) -> Result<()> {
        self.check_with(&self.attached.client.default_options())
    }

    /// As [`Weights::check`], waiting as `options` say.
    ///
    /// # Errors
    /// As [`Weights::check`].
    pub fn check_with(&self, options: &CallOptions<'_>) -> Result<()> {
        self.attached.map.check()?;
        let hold = || {
            let hold = self.attached.hold.lock();
            (Arc::clone(&hold.link), hold.attachment)
        };
        let mut asked = hold();
        loop {
            let (link, attachment) = &asked;
            let checked = link.call(Operation::CheckAttached { attachment: *attachment }, &[], options).map(|_| ());
            // Reattached by another thread meanwhile: what was asked about is given back.
            let now = hold();
            if checked.is_ok() || (Arc::ptr_eq(&now.0, link) && now.1 == *attachment) {
                return checked;
            }
            asked = now;
        }
    }

    /// Takes a hold on the same weights anew, of a broker that was restarted or that had unloaded them, and puts its memory
    /// behind the addresses of the old: tensors and modules made of these weights, also by other attachments of the same
    /// set in this session, go on. Pages that were written to hold what they should again. The old memory is given up.
    /// On a GPU this waits for the work enqueued so far, and nothing that uses the weights may be enqueued meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`] where the weights of that name are not the same any more,
    /// [`ErrorKind::Unsupported`] for memory of a GPU that the driver hands out in no way that allows it, or as
    /// [`Client::attach`]. The old memory is kept then, except where a GPU's driver maps neither the new memory nor, after
    /// that, the old: this too is [`ErrorKind::Stale`], as is every [`Weights::check`] until reattaching succeeds, and what
    /// computes with the weights before fails as the driver pleases.
    pub fn reattach(&self) -> Result<()> {
        self.reattach_with(&AttachOptions::default())
    }

    /// As [`Weights::reattach`], waiting and telling progress as `options` say. Element types and place stay what they are.
    ///
    /// # Errors
    /// As [`Weights::reattach`].
    pub fn reattach_with(&self, options: &AttachOptions<'_>) -> Result<()> {
        self.attached.client.with_shared_link(|link| self.attached.reattach(link, options))
    }
}

impl Attached {
    fn reattach(&self, link: Arc<Link>, options: &AttachOptions<'_>) -> Result<()> {
        let _reattaching = self.reattaching.lock();
        let options = AttachOptions { rule: self.rule.clone(), gpu: self.gpu, ..options.clone() };
        let replaces = {
            let hold = self.hold.lock();
            Arc::ptr_eq(&link, &hold.link).then_some(hold.attachment)
        };
        // Without the lock: whoever is told how far it is may ask whether the weights are still held.
        let Handed { link, weights, entries, handle, .. } = hand(link, &self.name, &options, replaces)?;
        // Whichever of the two is dropped is given back: the old one only once the new one has taken its place.
        let new = Hold { link, attachment: weights.attachment };
        let is_same = weights.content == self.content
            && entries.len() == self.tensors.len()
            && entries.iter().all(|entry| self.tensors.get(&entry.key) == Some(entry));
        if !is_same {
            return Err(Error::new(
                ErrorKind::Stale,
                format!("{} holds other weights than those that were attached, which stay readable", self.name),
                "attach it anew, and build what uses it anew",
            ));
        }
        let mut hold = self.hold.lock();
        self.map.replace(&weights.handle, handle)?;
        new.link.weight_maps.note(weights.set, &self.map);
        let old = std::mem::replace(&mut *hold, new);
        drop(hold);
        drop(old);
        Ok(())
    }
}

/// That a tensor lies within its memory.
fn check_inside(entry: &WeightEntry, size_bytes: u64) -> Result<()> {
    let meta = entry.meta();
    meta.validate()?;
    let end = entry.offset.checked_add(meta.size_bytes()? as u64);
    let is_aligned = entry.offset.is_multiple_of(meta.dtype.size_bytes() as u64);
    if end.is_some_and(|end| end <= size_bytes) && is_aligned {
        return Ok(());
    }
    let message = format!("the broker says that {:?} lies outside the memory it handed over", entry.key);
    Err(Error::new(ErrorKind::Protocol, message, ""))
}
