use std::sync::Arc;
use std::time::Instant;

use super::super::adapters::{Stacked, Waiting, Wish};
use super::super::responder::Responder;
use super::super::state::State;
use super::super::usage::InUse;
use super::Session;
use crate::error::{Error, Result};
use crate::lane::{Entry, Job, Lane};
use crate::service::AdapterStack;

/// What makes a call's work once its adapters are there, and the wish for those.
pub(super) type Enterable<C> = Result<(C, Option<Wish>), Unprepared>;

/// Why a call does not come to run.
pub(super) enum Unprepared {
    /// The request is answered with this; the session goes on.
    Refused(Error),
    /// The bytes behind the request did not come: nothing more can be read from this client.
    Broken(Error),
}

impl<E: Into<Error>> From<E> for Unprepared {
    fn from(error: E) -> Self {
        Self::Refused(error.into())
    }
}

impl Unprepared {
    /// # Errors
    /// What ends the session.
    pub(super) fn answer(self, responder: Responder) -> Result<()> {
        match self {
            Self::Refused(error) => responder.fail(error),
            Self::Broken(error) => {
                let fault = error.into_fault();
                responder.fail(fault.clone());
                return Err(fault.into());
            }
        }
        Ok(())
    }
}

impl Session {
    /// The adapters that are to be put together; `None` where there are none.
    pub(super) fn wish(&self, model: &InUse, adapters: AdapterStack) -> Result<Option<Wish>> {
        match adapters.adapters.is_empty() {
            true => Ok(None),
            false => Wish::new(&self.state, model, adapters).map(Some),
        }
    }

    /// Has work enter a lane: at once or, where there is a wish, once its adapters are there. It holds up nobody until then.
    pub(super) fn enter<W: Job>(
        &self,
        lane: fn(&State) -> &Lane<W>,
        (responder, deadline): (Responder, Option<Instant>),
        wish: Option<Wish>,
        work: impl FnOnce(Responder, Option<Arc<Stacked>>) -> W + Send + 'static,
    ) {
        let (session, request) = (responder.session(), responder.request());
        let Some(wish) = wish else {
            return lane(&self.state).submit(Entry { session, request, deadline, job: work(responder, None) });
        };
        let state = Arc::clone(&self.state);
        let go_on = move |stacked: Result<_>| match stacked {
            Ok(stacked) => {
                let link = Arc::clone(responder.link());
                lane(&state).submit(Entry { session, request, deadline, job: work(responder, Some(stacked)) });
                if link.is_over() {
                    // It came after the session's jobs were taken back.
                    lane(&state).end_session(session);
                }
            }
            Err(error) => responder.fail(error),
        };
        self.state.adapters.obtain(&self.state, wish, Waiting { session, request, go_on: Box::new(go_on) });
    }
}
