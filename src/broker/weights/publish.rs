use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::super::memory::attach;
use super::super::outbox::Payload;
use super::super::responder::Responder;
use super::super::state::State;
use super::handing::Grant;
use super::loading::{Inner, Weights};
use super::memory::{WeightDraft, WeightPlace};
use super::set::{WeightSet, booked_bytes, wire_table};
use super::table::Table;
use super::work::{Job, caught};
use crate::device::DeviceError;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{ContentDigest, DraftId, RequestId, SessionId};
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
    /// Requests that say a draft is filled and wait for the look at it; whether they were taken back.
    completing: BTreeMap<(SessionId, RequestId), bool>,
}

#[derive(Debug)]
pub(super) struct Draft {
    session: SessionId,
    /// The request that it answers.
    request: RequestId,
    name: String,
    plan: WeightPlan,
    content: ContentDigest,
    memory: WeightDraft,
    /// Bytes of the memory, and of what describes it.
    reserved: u64,
}

impl Drafts {
    /// Drops the drafts of a session and gives their room back.
    pub(super) fn end_session(&mut self, session: SessionId, table: &mut Table) {
        self.end(table, |draft| draft.session == session);
    }

    /// Drops the draft that a request was answered with.
    pub(super) fn recall(&mut self, session: SessionId, request: RequestId, table: &mut Table) {
        self.end(table, |draft| draft.session == session && draft.request == request);
        if let Some(is_taken_back) = self.completing.get_mut(&(session, request)) {
            *is_taken_back = true;
        }
    }

    fn end(&mut self, table: &mut Table, is_meant: impl Fn(&Draft) -> bool) {
        self.open.retain(|_, draft| {
            let stays = !is_meant(draft);
            if !stays {
                table.forsake(draft.memory.region());
                table.unreserve(WeightPlace::Host, draft.reserved);
            }
            stays
        });
    }
}

/// What becomes of a wish to publish.
enum Step {
    /// The set is there.
    There(Grant),
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
        match self.prepare(&responder, request, entries, is_file) {
            Err(error) => responder.fail(error),
            Ok(Step::There(grant)) => self.hand_over(grant, responder),
            Ok(Step::Fill { offer, table, handles }) => {
                responder.answer_with(Outcome::Draft(Box::new(offer)), Some(Payload::Table(table)), handles);
            }
        }
    }

    fn prepare(
        &self,
        asker: &Responder,
        request: PublishRequest,
        entries: Vec<WeightEntry>,
        is_file: bool,
    ) -> Result<Step> {
        let PublishRequest { name, content } = request;
        let session = asker.session();
        check_name(&name)?;
        let place = WeightPlace::Host;
        let described = entries.into_iter().map(|entry| {
            let meta = entry.meta();
            (entry.key, meta)
        });
        let plan = WeightPlan::of_tensors(described, place.alignment())?;
        let table = wire_table(&plan)?;
        let mut inner = self.lock();
        if is_file {
            let message = format!("{name} is the name of a file that others attach by it; nothing was published");
            return Err(Error::new(ErrorKind::InUse, message, "publish under another name"));
        }
        inner.table.check_free(&name, content)?;
        if let Some(id) = inner.table.of_content(content, place) {
            inner.table.publish(id, &name)?;
            return Ok(Step::There(inner.grant(id, asker, &name)?));
        }
        if inner.drafts.open.values().filter(|draft| draft.session == session).count() >= MAX_DRAFTS {
            let message = format!("the session is filling {MAX_DRAFTS} sets already");
            return Err(Error::new(ErrorKind::Busy, message, "finish publishing one of them first"));
        }
        let size_bytes = usize::try_from(plan.size_bytes).unwrap_or(usize::MAX);
        let reserved = booked_bytes(&plan);
        inner.table.reserve(place, reserved, &name)?;
        let allocated = WeightDraft::allocate(place, None, size_bytes).and_then(|memory| {
            let handle = memory.region().export()?;
            Ok((memory, handle))
        });
        let (memory, handle) = allocated.inspect_err(|_| inner.table.unreserve(place, reserved))?;
        let mut handles = Vec::new();
        let handle = attach(handle, &mut handles);
        inner.drafts.next += 1;
        let draft = DraftId(inner.drafts.next);
        let offer = DraftOffer { draft, size_bytes: plan.size_bytes, handle };
        inner
            .drafts
            .open
            .insert(draft, Draft { session, request: asker.request(), name, plan, content, memory, reserved });
        Ok(Step::Fill { offer, table, handles })
    }

    /// The client will not fill a draft after all.
    pub(in crate::broker) fn abandon(&self, session: SessionId, draft: DraftId) {
        let mut inner = self.lock();
        let Inner { table, drafts, .. } = &mut *inner;
        if drafts.open.get(&draft).is_some_and(|one| one.session == session)
            && let Some(draft) = drafts.open.remove(&draft)
        {
            table.forsake(draft.memory.region());
            table.unreserve(WeightPlace::Host, draft.reserved);
        }
    }

    /// A draft is complete: looks at what it contains, and answers with the set.
    pub(in crate::broker) fn filled(&self, state: &Arc<State>, responder: Responder, draft: DraftId) {
        let mut inner = self.lock();
        let is_theirs = inner.drafts.open.get(&draft).is_some_and(|one| one.session == responder.session());
        let taken = if is_theirs { inner.drafts.open.remove(&draft) } else { None };
        if taken.is_some() {
            inner.drafts.completing.insert((responder.session(), responder.request()), false);
        }
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
        let (bytes, name) = (draft.reserved, draft.name.clone());
        let weights = &state.weights;
        let sealed = caught(|| seal(&state, draft));
        let mut inner = weights.lock();
        inner.table.unreserve(WeightPlace::Host, bytes);
        let is_taken_back = inner.drafts.completing.remove(&(responder.session(), responder.request()));
        let granted = sealed.and_then(|set| {
            // Somebody else may have published something meanwhile: the same, or other tensors under this name.
            let refused = match is_taken_back {
                Some(true) => Err(Error::new(ErrorKind::Cancelled, format!("{name} was not published"), "")),
                _ => inner.table.check_free(&name, set.content),
            };
            refused.inspect_err(|_| inner.table.forsake(Arc::clone(&set.memory.region)))?;
            let id = inner.table.insert_once(set);
            inner.table.publish(id, &name)?;
            inner.grant(id, &responder, &name)
        });
        inner.table.drop_forsaken();
        drop(inner);
        weights.answer(granted, responder);
    }

    /// Nobody will complete it.
    pub(super) fn give_up(self, why: Error) {
        let mut inner = self.state.weights.lock();
        inner.table.unreserve(WeightPlace::Host, self.draft.reserved);
        inner.drafts.completing.remove(&(self.responder.session(), self.responder.request()));
        drop(inner);
        self.responder.fail(why);
    }
}

fn seal(state: &Arc<State>, draft: Draft) -> Result<WeightSet> {
    let Draft { name, plan, content, memory, reserved, .. } = draft;
    let memory = memory.seal().map_err(|error| match error {
        DeviceError::StillMapped => Error::new(
            ErrorKind::Protocol,
            format!("{name} is still mapped for writing by its publisher; it was not published"),
            "unmap it before saying that it is filled",
        ),
        error => error.into(),
    })?;
    // Whoever fills memory touches every page of it. Reading pages that nobody touched would make the system provide
    // them, however many were claimed.
    let claimed = plan.tensors.iter().map(|tensor| tensor.meta.size_bytes().unwrap_or(usize::MAX) as u64);
    if memory.stored_bytes.is_some_and(|stored| stored < claimed.fold(0, u64::saturating_add)) {
        let message = format!("{name} was not filled; it was not published");
        return Err(Error::new(ErrorKind::InvalidTensor, message, "write every tensor to its place first"));
    }
    let found = digest_region(&plan, &memory.region, &|| state.stopping.load(Ordering::Acquire))?;
    if found != content {
        return Err(Error::new(
            ErrorKind::InvalidTensor,
            format!("{name} contains something else than was announced; it was not published"),
            "do not change tensors while they are published",
        ));
    }
    let table = wire_table(&plan)?;
    let id = state.weights.lock().table.new_id();
    Ok(WeightSet {
        id,
        place: WeightPlace::Host,
        plan,
        table,
        source: content,
        content,
        memory,
        booked_bytes: reserved,
    })
}
