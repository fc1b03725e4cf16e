use super::super::responder::Responder;
use crate::error::{ErrorKind, Fault};
use crate::lane::{Refusal, StopSignal};
use crate::service::Service;

/// Answers a request that was not run.
pub(super) fn refuse(service: Service, responder: Option<Responder>, why: Refusal) {
    if let Some(responder) = responder {
        let fault = refusal(service, why, responder.client());
        responder.fail(fault);
    }
}

/// The fault that answers a request of `client`'s which was not run.
fn refusal(service: Service, why: Refusal, client: &str) -> Fault {
    match why {
        Refusal::Full { capacity } => Fault::new(
            ErrorKind::Busy,
            format!("the {} lane has {capacity} requests waiting; this one was not queued", service.name()),
            "send it again after a pause, or raise --lane-capacity",
        ),
        Refusal::Cancelled => Fault::new(ErrorKind::Cancelled, "the request was cancelled while it waited", ""),
        Refusal::Expired => late("before its turn came; it was not run"),
        Refusal::Unready { waited } => Fault::new(
            ErrorKind::Timeout,
            format!(
                "GPU work that {client} enqueued before its mark on the input was not done after {:.1} s; the request was \
                 not run, and the input and all tensors are intact",
                waited.as_secs_f64()
            ),
            "look for what holds up the stream that writes the input, then send it again, or raise --input-patience",
        ),
        Refusal::SessionEnded => Fault::new(ErrorKind::Cancelled, "the session ended while the request waited", ""),
        Refusal::ShuttingDown => Fault::new(
            ErrorKind::ShuttingDown,
            "the broker is stopping; the request was not run",
            "send it again once the broker is back",
        ),
    }
}

/// What answers a request that was taken back, or whose time was up, just before it ran.
pub(super) fn taken_back(stop: &StopSignal<'_>) -> Fault {
    match stop.is_late() {
        true => late("before it ran"),
        false => Fault::new(ErrorKind::Cancelled, "the request was cancelled before it ran", ""),
    }
}

pub(super) fn late(when: &str) -> Fault {
    let message = format!("the request's time was up {when}");
    Fault::new(ErrorKind::Timeout, message, "allow more time, or send fewer requests at once")
}
