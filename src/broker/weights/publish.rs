use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::super::memory::attach;
use super::super::outbox::Payload;
use super::super::responder::Responder;
use super::super::state::State;
use super::loading::{Job, Waiter, Weights};
use super::memory::{WeightDraft, WeightPlace};
use super::set::{WeightSet, wire_table};
use super::table::Table;
use crate::device::DeviceError;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{ContentDigest, DraftId, SessionId, WeightSetId};
use crate::model::weights::{WeightPlan, digest_region};
use crate::protocol::{DraftOffer, Outcome, PublishRequest, WeightEntry};
use crate::transport::Attachment;

/// Longer than any name that a person or a program makes.
const MAX_NAME_BYTES: usize = 512;

/// More than a client fills at once; bounds what one that never finishes can hold.
const MAX_DRAFTS: usize = 8;

/// Sets that clients are filling.
#[derive(Debug, Default)]
pub(super) struct Drafts {
    next: u64,
    open: BTreeMap<DraftId, Draft>,
}

#[derive(Debug)]
pub(super) struct Draft {
    session: SessionId,
    name: String,
    plan: WeightPlan,
    content: ContentDigest,
    memory: WeightDraft,
}

impl Drafts {
    /// Drops the drafts of a session and gives their room back.
    pub(super) fn end_session(&mut self, session: SessionId, table: &mut Table) {
        self.open.retain(|_, draft| {
            let stays = draft.session != session;
            if !stays {
                table.unreserve(draft.plan.size_bytes);
            }
            stays
        });
    }
}

/// What becomes of a wish to publish.
enum Step {
    /// The set is there.
    There(WeightSetId),
    /// It is to be filled.
    Fill { offer: DraftOffer, table: Arc<[u8]>, handles: Vec<Attachment> },
}

impl Weights {
    /// Answers with memory for the tensors, or with the set where it is there already.
    pub(in crate::broker) fn publish(
        &self,
        responder: Responder,
        request: PublishRequest,
        entries: Vec<WeightEntry>,
        is_file: bool,
    ) {
        let name = request.name.clone();
        match self.prepare(responder.session(), request, entries, is_file) {
            Err(error) => responder.fail(error),
            Ok(Step::There(id)) => self.hand_over(id, Waiter { responder, name, replaces: None }),
            Ok(Step::Fill { offer, table, handles }) => {
                responder.answer_with(Outcome::Draft(Box::new(offer)), Some(Payload::Table(table)), handles);
            }
        }
    }

    fn prepare(
        &self,
        session: SessionId,
        request: PublishRequest,
        entries: Vec<WeightEntry>,
        is_file: bool,
    ) -> Result<Step> {
        let PublishRequest { name, content } = request;
        check_name(&name)?;
        let place = WeightPlace::Host;
        let described = entries.into_iter().map(|entry| {
            let meta = entry.meta();
            (entry.key, meta)
        });
        let plan = WeightPlan::of_tensors(described, place.alignment())?;
        let mut inner = self.inner.lock();
        if is_file {
            let message = format!("{name} is the name of a file that others attach by it; nothing was published");
            return Err(Error::new(ErrorKind::InUse, message, "publish under another name"));
        }
        if let Some(known) = inner.table.published(&name) {
            let is_same = known.set.content == content && known.set.plan == plan;
            if !is_same && !known.holders.is_empty() {
                return Err(Error::new(
                    ErrorKind::InUse,
                    format!(
                        "{name} is published with other content, and {} sessions have that attached; \
                         nothing was published",
                        known.by_session().len()
                    ),
                    "publish under another name, or have them give it back",
                ));
            }
        }
        if let Some(id) = inner.table.of_content(content, place) {
            inner.table.publish(id, &name);
            return Ok(Step::There(id));
        }
        if inner.drafts.open.values().filter(|draft| draft.session == session).count() >= MAX_DRAFTS {
            let message = format!("the session is filling {MAX_DRAFTS} sets already");
            return Err(Error::new(ErrorKind::Busy, message, "finish publishing one of them first"));
        }
        let table = wire_table(&plan)?;
        let size_bytes = usize::try_from(plan.size_bytes).unwrap_or(usize::MAX);
        inner.table.reserve(plan.size_bytes, &name)?;
        let allocated = WeightDraft::allocate(place, None, size_bytes).and_then(|memory| {
            let handle = memory.region().export()?;
            Ok((memory, handle))
        });
        let (memory, handle) = allocated.inspect_err(|_| inner.table.unreserve(plan.size_bytes))?;
        let mut handles = Vec::new();
        let handle = attach(handle, &mut handles);
        inner.drafts.next += 1;
        let draft = DraftId(inner.drafts.next);
        let offer = DraftOffer { draft, size_bytes: plan.size_bytes, handle };
        inner.drafts.open.insert(draft, Draft { session, name, plan, content, memory });
        Ok(Step::Fill { offer, table, handles })
    }

    /// A draft is complete: looks at what it contains, and answers with the set.
    pub(in crate::broker) fn filled(&self, state: &Arc<State>, responder: Responder, draft: DraftId) {
        let mut inner = self.inner.lock();
        let is_theirs = inner.drafts.open.get(&draft).is_some_and(|one| one.session == responder.session());
        let taken = if is_theirs { inner.drafts.open.remove(&draft) } else { None };
        drop(inner);
        match taken {
            Some(draft) => self.send(Job::Publish(Filled { state: Arc::clone(state), draft, responder })),
            None => {
                let message = format!("this session is filling no draft {draft}");
                responder.fail(Error::new(ErrorKind::Stale, message, "publish the tensors anew"));
            }
        }
    }
}

fn check_name(name: &str) -> Result<()> {
    let is_good = !name.is_empty() && name.len() <= MAX_NAME_BYTES && !name.chars().any(char::is_control);
    if is_good {
        return Ok(());
    }
    let message = format!("a set cannot be published under a name of {} bytes", name.len());
    let remedy = format!("use 1 to {MAX_NAME_BYTES} bytes without control characters");
    Err(Error::new(ErrorKind::Configuration, message, remedy))
}

/// A draft that its client says it has filled.
#[derive(Debug)]
pub(super) struct Filled {
    state: Arc<State>,
    draft: Draft,
    responder: Responder,
}

impl Filled {
    pub(super) fn complete(self) {
        let Self { state, draft, responder } = self;
        let (bytes, name) = (draft.plan.size_bytes, draft.name.clone());
        let weights = &state.weights;
        let sealed = seal(&state, draft);
        let mut inner = weights.inner.lock();
        inner.table.unreserve(bytes);
        let kept = sealed.map(|set| {
            // Somebody else may have published the same meanwhile.
            let same = inner.table.of_content(set.content, set.place);
            let id = same.unwrap_or_else(|| inner.table.insert(set));
            inner.table.publish(id, &name);
            id
        });
        drop(inner);
        match kept {
            Ok(id) => weights.hand_over(id, Waiter { responder, name, replaces: None }),
            Err(error) => responder.fail(error),
        }
    }
}

fn seal(state: &Arc<State>, draft: Draft) -> Result<WeightSet> {
    let Draft { name, plan, content, memory, .. } = draft;
    let memory = memory.seal().map_err(|error| match error {
        DeviceError::StillMapped => Error::new(
            ErrorKind::Protocol,
            format!("{name} is still mapped for writing by its publisher; it was not published"),
            "unmap it before saying that it is filled",
        ),
        error => error.into(),
    })?;
    let found = digest_region(&plan, &memory.region, &|| state.stopping.load(Ordering::Acquire))?;
    if found != content {
        return Err(Error::new(
            ErrorKind::InvalidTensor,
            format!("{name} contains something else than was announced; it was not published"),
            "do not change tensors while they are published",
        ));
    }
    let table = wire_table(&plan)?;
    let id = state.weights.inner.lock().table.new_id();
    Ok(WeightSet { id, place: WeightPlace::Host, plan, table, source: content, content, memory })
}
