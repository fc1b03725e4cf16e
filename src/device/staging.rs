use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::{Device, DeviceError, HostDevice, Place, Region, RegionHandle};
use crate::service::Pages;

/// Locks the pages of a host region for as long as the region that it answers lives.
pub type PageLock = Box<dyn Fn(Arc<dyn Region>) -> Result<Arc<dyn Region>, DeviceError> + Send + Sync>;

/// Bytes of host memory that may be page-locked at once: locked pages take memory from everybody, used or not.
#[derive(Debug)]
pub struct LockBudget {
    limit: u64,
    taken: AtomicU64,
}

/// Bytes of a budget, given back when dropped.
#[derive(Debug)]
pub struct LockShare {
    budget: Arc<LockBudget>,
    bytes: u64,
}

impl LockBudget {
    /// Room for `limit` bytes.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self { limit, taken: AtomicU64::new(0) }
    }

    /// Takes room for a region.
    ///
    /// # Errors
    /// [`DeviceError::LockLimit`] where there is too little left.
    pub fn take(self: &Arc<Self>, size_bytes: usize) -> Result<LockShare, DeviceError> {
        let (bytes, limit) = (size_bytes as u64, self.limit);
        let more = |taken: u64| taken.checked_add(bytes).filter(|sum| *sum <= limit);
        match self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(LockShare { budget: Arc::clone(self), bytes }),
            Err(_) => Err(DeviceError::LockLimit { size_bytes, limit }),
        }
    }
}

impl Drop for LockShare {
    fn drop(&mut self) {
        self.budget.taken.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Shared host memory that tensors of a GPU pass through, page-locked where that can be had.
///
/// For slots that are copied from and to and never handed out. Copies out of locked memory that a user calls
/// asynchronous are so, and may still run when the user has given the tensor back.
pub struct StagingDevice {
    host: HostDevice,
    lock: Result<PageLock, String>,
    /// Of all regions made here: one that could not be locked speaks for all. Absent before the first.
    pages: Mutex<Option<Pages>>,
}

impl StagingDevice {
    /// Memory of `host` whose pages `lock` locks.
    #[must_use]
    pub fn locked_by(lock: PageLock, host: HostDevice) -> Self {
        Self { host, lock: Ok(lock), pages: Mutex::default() }
    }

    /// Memory of `host` whose pages nobody can lock, and why.
    #[must_use]
    pub fn pageable(why: String, host: HostDevice) -> Self {
        Self { host, lock: Err(why), pages: Mutex::default() }
    }

    /// Whether the pages of its regions are locked; absent before the first region.
    #[must_use]
    pub fn pages(&self) -> Option<Pages> {
        self.pages.lock().clone()
    }

    /// The region with its pages locked, or as it is: a refusal costs speed and nothing else.
    fn lock(&self, region: Arc<dyn Region>) -> Arc<dyn Region> {
        let locked = match &self.lock {
            Ok(lock) => lock(Arc::clone(&region)).map_err(|error| error.to_string()),
            Err(why) => Err(why.clone()),
        };
        let mut pages = self.pages.lock();
        match locked {
            Ok(locked) => {
                pages.get_or_insert(Pages::Locked);
                locked
            }
            Err(why) => {
                tracing::warn!(why, "memory that tensors of a GPU pass through is not page-locked: copies are slower");
                *pages = Some(Pages::Pageable(why));
                region
            }
        }
    }
}

impl fmt::Debug for StagingDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StagingDevice").field("host", &self.host).field("pages", &self.pages).finish_non_exhaustive()
    }
}

impl Device for StagingDevice {
    fn place(&self) -> Place {
        Place::Host
    }

    /// As of the host; where its pages are locked, all of them take memory at once.
    fn allocate(&self, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        Ok(self.lock(self.host.allocate(size_bytes)?))
    }

    fn import(&self, handle: RegionHandle, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        Ok(self.lock(self.host.import(handle, size_bytes)?))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn refused() -> DeviceError {
        DeviceError::Cuda { call: "cuMemHostRegister_v2", code: 801, name: "CUDA_ERROR_NOT_SUPPORTED".to_owned() }
    }

    #[test]
    fn one_region_that_stays_pageable_speaks_for_all() {
        let calls = AtomicUsize::new(0);
        let lock: PageLock =
            Box::new(
                move |region| if calls.fetch_add(1, Ordering::Relaxed) == 1 { Err(refused()) } else { Ok(region) },
            );
        let staging = StagingDevice::locked_by(lock, HostDevice::default());
        assert_eq!(staging.pages(), None);
        staging.allocate(4096).unwrap();
        assert_eq!(staging.pages(), Some(Pages::Locked));
        staging.allocate(4096).unwrap();
        staging.allocate(4096).unwrap();
        assert!(matches!(staging.pages(), Some(Pages::Pageable(why)) if why.contains("801")));
    }

    #[test]
    fn a_budget_is_given_out_once_and_given_back() {
        let budget = Arc::new(LockBudget::new(100));
        let first = budget.take(60).unwrap();
        assert!(matches!(budget.take(41), Err(DeviceError::LockLimit { size_bytes: 41, limit: 100 })));
        let second = budget.take(40).unwrap();
        drop(first);
        assert!(budget.take(usize::MAX).is_err());
        let _third = budget.take(60).unwrap();
        assert!(budget.take(1).is_err());
        drop(second);
    }

    #[test]
    fn memory_that_nobody_locks_is_there_all_the_same_and_says_why() {
        let staging = StagingDevice::pageable("no GPU".to_owned(), HostDevice::default());
        let region = staging.allocate(4096).unwrap();
        region.copy_in(0, &[7; 16]).unwrap();
        assert_eq!(staging.pages(), Some(Pages::Pageable("no GPU".to_owned())));
    }
}
