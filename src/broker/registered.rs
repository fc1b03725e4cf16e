use std::collections::BTreeMap;

use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::id::SessionId;
use crate::protocol::{ModelReport, RegisteredModel};

/// More models than a worker loads; bounds what one session can have remembered.
const MAX_REGISTERED: usize = 256;

/// Longer than any name that a person or a program makes.
const MAX_TEXT_BYTES: usize = 512;

/// Models that sessions have loaded themselves and told of: the broker has nothing of them but these words.
#[derive(Debug, Default)]
pub(super) struct Registered(Mutex<BTreeMap<(SessionId, String), RegisteredModel>>);

impl Registered {
    /// Remembers a model until its session ends, in place of one of the same name that the session told of before.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] for a name that cannot be shown, [`ErrorKind::Busy`] where the session has told of too
    /// many.
    pub(super) fn add(&self, session: SessionId, model: RegisteredModel) -> Result<()> {
        check_text("name", &model.name)?;
        check_text("family", &model.family)?;
        check_text("device", &model.device)?;
        if model.name.is_empty() {
            let message = "a model was registered without a name";
            return Err(Error::new(ErrorKind::Configuration, message, "give the name that it is to be listed by"));
        }
        let key = (session, model.name.clone());
        let mut models = self.0.lock();
        let is_new = !models.contains_key(&key);
        if is_new && models.keys().filter(|(owner, _)| *owner == session).count() >= MAX_REGISTERED {
            let message = format!("the session has registered {MAX_REGISTERED} models already; {} was not", model.name);
            return Err(Error::new(ErrorKind::Busy, message, "register under a name that is in use, or connect anew"));
        }
        models.insert(key, model);
        Ok(())
    }

    pub(super) fn end_session(&self, session: SessionId) {
        self.0.lock().retain(|(owner, _), _| *owner != session);
    }

    pub(super) fn reports(&self) -> Vec<ModelReport> {
        let models = self.0.lock();
        let report = |((session, name), model): (&(SessionId, String), &RegisteredModel)| ModelReport {
            name: name.clone(),
            path: String::new(),
            service: model.service,
            family: model.family.clone(),
            loaded: true,
            bytes: model.bytes,
            device: model.device.clone(),
            users: 1,
            idle_s: None,
            latent_channels: 0,
            ratio: 0,
            unet: None,
            clip: None,
            registered_by: Some(*session),
        };
        models.iter().map(report).collect()
    }
}

fn check_text(what: &str, text: &str) -> Result<()> {
    if text.len() <= MAX_TEXT_BYTES && !text.chars().any(char::is_control) {
        return Ok(());
    }
    let message = format!("a model cannot be registered with a {what} of {} bytes", text.len());
    let remedy = format!("use at most {MAX_TEXT_BYTES} bytes without control characters");
    Err(Error::new(ErrorKind::Configuration, message, remedy))
}
