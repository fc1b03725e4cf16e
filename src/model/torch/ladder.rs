use super::super::ModelError;
use crate::service::VaeMode;

/// Tries `modes` in turn until one does not run out of memory; the one that ran.
///
/// Whatever an attempt allocated must be gone when `attempt` returns. `reclaim` is called after each attempt that ran
/// out, the last one included: memory that the attempt freed goes back before anything else is tried or answered.
///
/// # Errors
/// The last attempt's, or the first that is not [`ModelError::OutOfMemory`].
pub(super) fn descend(
    modes: &[VaeMode],
    mut attempt: impl FnMut(VaeMode) -> Result<(), ModelError>,
    reclaim: impl Fn(),
) -> Result<VaeMode, ModelError> {
    let mut left = modes.iter().copied().peekable();
    while let Some(mode) = left.next() {
        let error = match attempt(mode) {
            Ok(()) => return Ok(mode),
            Err(error @ ModelError::OutOfMemory { .. }) => error,
            Err(error) => return Err(error),
        };
        reclaim();
        match left.peek() {
            Some(next) => tracing::warn!(%error, ?next, "trying another way that needs less"),
            None => return Err(error),
        }
    }
    Err(ModelError::Executor { what: "run", cause: "there is no way to run it".to_owned() })
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;
    use crate::service::TileShape;

    const TILES: VaeMode = VaeMode::Tiled(TileShape { width: 64, height: 64, overlap: 16 });

    /// Counts itself among the living.
    struct Held<'a>(&'a Cell<i32>);

    impl<'a> Held<'a> {
        fn new(alive: &'a Cell<i32>) -> Self {
            alive.set(alive.get() + 1);
            Self(alive)
        }
    }

    impl Drop for Held<'_> {
        fn drop(&mut self) {
            self.0.set(self.0.get() - 1);
        }
    }

    /// Runs both modes with `failures` attempts that run out; the answer, and what happened in order.
    fn descend_with(failures: usize, error: fn() -> ModelError) -> (Result<VaeMode, ModelError>, Vec<String>) {
        let (alive, log) = (Cell::new(0), RefCell::new(Vec::new()));
        let attempt = |mode| {
            assert_eq!(alive.get(), 0, "an attempt starts with nothing of the one before it");
            let _input = Held::new(&alive);
            let _activation = Held::new(&alive);
            log.borrow_mut().push(if mode == VaeMode::Full { "full" } else { "tiled" }.to_owned());
            let tried = log.borrow().iter().filter(|entry| *entry != "reclaimed").count();
            if tried <= failures { Err(error()) } else { Ok(()) }
        };
        let reclaim = || {
            assert_eq!(alive.get(), 0, "memory is given back once nothing holds it");
            log.borrow_mut().push("reclaimed".to_owned());
        };
        let answer = descend(&[VaeMode::Full, TILES], attempt, reclaim);
        (answer, log.into_inner())
    }

    fn out_of_memory() -> ModelError {
        ModelError::OutOfMemory { what: "decode", cause: "CUDA out of memory".to_owned() }
    }

    #[test]
    fn what_fits_runs_once() {
        let (answer, log) = descend_with(0, out_of_memory);
        assert_eq!((answer.unwrap(), log), (VaeMode::Full, vec!["full".to_owned()]));
    }

    #[test]
    fn one_failure_leads_to_tiles_after_the_memory_is_back() {
        let (answer, log) = descend_with(1, out_of_memory);
        assert_eq!(answer.unwrap(), TILES);
        assert_eq!(log, ["full", "reclaimed", "tiled"]);
    }

    #[test]
    fn failing_always_ends_with_the_memory_back() {
        let (answer, log) = descend_with(2, out_of_memory);
        assert!(matches!(answer, Err(ModelError::OutOfMemory { .. })));
        assert_eq!(log, ["full", "reclaimed", "tiled", "reclaimed"]);
    }

    #[test]
    fn other_errors_are_not_tried_again() {
        let (answer, log) = descend_with(1, || ModelError::Cancelled);
        assert!(matches!(answer, Err(ModelError::Cancelled)));
        assert_eq!(log, ["full"]);
    }
}
