use std::collections::HashMap;
use std::sync::{Arc, Weak};

use super::service::Stacked;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{ContentDigest, ModelId};
use crate::service::AdapterMode;

/// What tells one stack from another: the model, what the adapters contain and how strong each is, in their order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct StackKey {
    pub(super) model: ModelId,
    /// Strengths by their bits: what is not the same to the last bit is another stack.
    pub(super) adapters: Vec<(ContentDigest, u64)>,
    pub(super) mode: AdapterMode,
}

/// Stacks that are kept, the least recently used of which give way to others.
#[derive(Debug, Default)]
pub(super) struct Stacks {
    kept: HashMap<StackKey, Kept>,
    /// No longer given to anybody; runs may still have them.
    outgoing: Vec<Outgoing>,
    uses: u64,
    bytes: u64,
}

/// What is still in use somewhere, and its bytes: nobody becomes its last owner by asking for them.
#[derive(Debug)]
struct Outgoing {
    stacked: Weak<Stacked>,
    bytes: u64,
}

#[derive(Debug)]
struct Kept {
    stacked: Arc<Stacked>,
    last_used: u64,
}

impl Kept {
    /// Whether a request or a run has it. Those count on until they are done, so it must not give way.
    fn is_used(&self) -> bool {
        Arc::strong_count(&self.stacked) > 1
    }
}

impl Stacks {
    pub(super) fn get(&mut self, key: &StackKey) -> Option<Arc<Stacked>> {
        self.uses += 1;
        let kept = self.kept.get_mut(key)?;
        kept.last_used = self.uses;
        Some(Arc::clone(&kept.stacked))
    }

    /// Keeps a new stack. The one that was kept under the same key meanwhile is answered instead. Also answered is what gave
    /// way, to be dropped where nobody waits for that.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] where it and those in use take more than `budget`.
    pub(super) fn keep(
        &mut self,
        key: StackKey,
        stacked: Arc<Stacked>,
        budget: u64,
    ) -> Result<(Arc<Stacked>, Vec<Arc<Stacked>>)> {
        if let Some(same) = self.get(&key) {
            return Ok((same, vec![stacked]));
        }
        let wanted = stacked.stack.size_bytes();
        let (outgoing, used) = (self.outgoing_bytes(), self.used_bytes());
        if used.saturating_add(wanted) > budget {
            let message = format!(
                "the adapters take {wanted} bytes, and those that others use {used}; together they may take {budget}"
            );
            let remedy =
                "close runs that are done, use adapters of lower rank or mode \"side\", or raise --adapter-bytes";
            return Err(Error::new(ErrorKind::OutOfMemory, message, remedy));
        }
        let mut given_way = Vec::new();
        while self.bytes.saturating_add(outgoing).saturating_add(wanted) > budget {
            let unused = self.kept.iter().filter(|(_, kept)| !kept.is_used());
            let Some(oldest) = unused.min_by_key(|(_, kept)| kept.last_used).map(|(key, _)| key.clone()) else { break };
            given_way.extend(self.remove(&oldest));
        }
        self.bytes += wanted;
        self.outgoing.retain(|outgoing| !std::ptr::eq(outgoing.stacked.as_ptr(), Arc::as_ptr(&stacked)));
        self.kept.insert(key, Kept { stacked: Arc::clone(&stacked), last_used: self.uses });
        Ok((stacked, given_way))
    }

    /// Puts another stack in the place of one, where it and those in use take no more than `budget`. Answers what is not kept.
    pub(super) fn replace(&mut self, key: &StackKey, stacked: Arc<Stacked>, budget: u64) -> Vec<Arc<Stacked>> {
        let Some(before) = self.remove(key) else { return vec![stacked] };
        match self.keep(key.clone(), stacked, budget) {
            Ok((_, mut given_way)) => {
                given_way.push(before);
                given_way
            }
            // It was kept before, so there is room for it.
            Err(_) => self.keep(key.clone(), before, u64::MAX).map_or_else(|_| Vec::new(), |(_, given_way)| given_way),
        }
    }

    /// Takes out what was made for a model.
    pub(super) fn forget(&mut self, model: ModelId) -> Vec<Arc<Stacked>> {
        let keys: Vec<_> = self.kept.keys().filter(|key| key.model == model).cloned().collect();
        keys.iter().filter_map(|key| self.remove(key)).collect()
    }

    fn remove(&mut self, key: &StackKey) -> Option<Arc<Stacked>> {
        let kept = self.kept.remove(key)?;
        self.bytes = self.bytes.saturating_sub(kept.stacked.stack.size_bytes());
        if kept.is_used() {
            let (stacked, bytes) = (Arc::downgrade(&kept.stacked), kept.stacked.stack.size_bytes());
            self.outgoing.push(Outgoing { stacked, bytes });
        }
        Some(kept.stacked)
    }

    /// Bytes of what is no longer kept and still in use.
    fn outgoing_bytes(&mut self) -> u64 {
        self.outgoing.retain(|outgoing| outgoing.stacked.strong_count() > 0);
        self.outgoing.iter().map(|outgoing| outgoing.bytes).sum()
    }

    /// Bytes of what is in use, kept or not.
    pub(super) fn used_bytes(&mut self) -> u64 {
        let kept = self.kept.values().filter(|kept| kept.is_used()).map(|kept| kept.stacked.stack.size_bytes());
        kept.sum::<u64>().saturating_add(self.outgoing_bytes())
    }

    /// Bytes of what is kept, and of what is in use besides.
    pub(super) fn bytes(&mut self) -> u64 {
        self.bytes.saturating_add(self.outgoing_bytes())
    }

    /// Every stack with the number of its users, the longest unused first.
    pub(super) fn all(&self) -> Vec<(&StackKey, &Stacked, usize)> {
        let mut all: Vec<_> = self.kept.iter().collect();
        all.sort_by_key(|(_, kept)| kept.last_used);
        all.into_iter().map(|(key, kept)| (key, &*kept.stacked, Arc::strong_count(&kept.stacked) - 1)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::service::Heat;
    use super::*;
    use crate::model::ReadyStack;

    fn key(number: u8) -> StackKey {
        let adapters = vec![(ContentDigest([number; 32]), 1f64.to_bits())];
        StackKey { model: ModelId(u64::from(number % 2)), adapters, mode: AdapterMode::Auto }
    }

    fn stacked(bytes: u64) -> Arc<Stacked> {
        Arc::new(Stacked {
            stack: ReadyStack::new(Arc::new(()), bytes),
            model: String::new(),
            adapters: Vec::new(),
            taken: Vec::new(),
            heat: Heat::default(),
        })
    }

    /// Keeps a stack of 40 of 100 bytes that nobody uses.
    fn keep(stacks: &mut Stacks, number: u8) {
        stacks.keep(key(number), stacked(40), 100).unwrap();
    }

    #[test]
    fn the_longest_unused_gives_way() {
        let mut stacks = Stacks::default();
        keep(&mut stacks, 1);
        keep(&mut stacks, 2);
        assert!(stacks.get(&key(1)).is_some());
        keep(&mut stacks, 3);
        assert!(stacks.get(&key(2)).is_none() && stacks.get(&key(1)).is_some() && stacks.get(&key(3)).is_some());
        assert_eq!(stacks.bytes(), 80);
    }

    #[test]
    fn what_is_in_use_stays_and_bounds_what_comes() {
        let mut stacks = Stacks::default();
        let (used, _) = stacks.keep(key(1), stacked(40), 100).unwrap();
        keep(&mut stacks, 2);
        let error = stacks.keep(key(3), stacked(61), 100).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
        assert!(stacks.get(&key(2)).is_some(), "nothing gave way in vain");
        let (_, given_way) = stacks.keep(key(3), stacked(60), 100).unwrap();
        assert_eq!(given_way.len(), 1);
        drop(used);
        keep(&mut stacks, 2);
        assert!(stacks.get(&key(1)).is_none());
    }

    #[test]
    fn the_first_of_two_that_were_made_at_once_is_everybodys() {
        let mut stacks = Stacks::default();
        let (first, _) = stacks.keep(key(1), stacked(40), 100).unwrap();
        let (second, dropped) = stacks.keep(key(1), stacked(40), 100).unwrap();
        assert!(Arc::ptr_eq(&first, &second) && dropped.len() == 1);
        assert_eq!(stacks.bytes(), 40);
    }

    #[test]
    fn a_larger_stack_takes_the_place_of_one_only_where_there_is_room() {
        let mut stacks = Stacks::default();
        keep(&mut stacks, 1);
        let (used, _) = stacks.keep(key(2), stacked(40), 100).unwrap();
        assert_eq!(stacks.replace(&key(1), stacked(70), 100).len(), 0);
        assert_eq!((stacks.get(&key(1)).unwrap().stack.size_bytes(), stacks.bytes()), (40, 80));
        assert_eq!(stacks.replace(&key(1), stacked(60), 100).len(), 1);
        assert_eq!((stacks.get(&key(1)).unwrap().stack.size_bytes(), stacks.bytes()), (60, 100));
        drop(used);
        assert_eq!(stacks.replace(&key(3), stacked(10), 100).len(), 1, "of what is gone nothing is kept");
    }

    #[test]
    fn what_is_in_use_counts_after_its_place_was_taken() {
        let mut stacks = Stacks::default();
        let (used, _) = stacks.keep(key(1), stacked(40), 100).unwrap();
        assert_eq!(stacks.replace(&key(1), stacked(70), 100).len(), 0, "both do not fit");
        assert_eq!(stacks.bytes(), 40);
        drop(stacks.replace(&key(1), stacked(50), 100));
        assert_eq!(stacks.bytes(), 90);
        drop(stacks.forget(ModelId(1)));
        assert_eq!(stacks.bytes(), 40);
        let error = stacks.keep(key(2), stacked(61), 100).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
        drop(used);
        assert_eq!(stacks.bytes(), 0);
        stacks.keep(key(2), stacked(61), 100).unwrap();
    }

    #[test]
    fn a_model_takes_its_stacks_along() {
        let mut stacks = Stacks::default();
        keep(&mut stacks, 1);
        keep(&mut stacks, 2);
        assert_eq!(stacks.forget(ModelId(1)).len(), 1);
        assert_eq!(stacks.bytes(), 40);
        assert!(stacks.get(&key(1)).is_none() && stacks.get(&key(2)).is_some());
    }
}
