//! Small allocations share a block, as on the real driver: exporting one exports its neighbours with it.

use std::sync::Arc;

use crate::code::Result;
use crate::mapping::GRANULE;
use crate::region::Object;

/// Allocations from here on get blocks of their own.
pub(crate) const SMALL: usize = 1 << 20;
const STEP: usize = 512;

struct Slab {
    device: usize,
    object: Arc<Object>,
    taken: Vec<bool>,
}

#[derive(Default)]
pub(crate) struct Slabs(Vec<Slab>);

impl Slabs {
    /// The block and the offset in it of `bytes` that nobody else has.
    pub(crate) fn cut(&mut self, device: usize, bytes: usize) -> Result<(Arc<Object>, usize)> {
        let steps = bytes.div_ceil(STEP);
        for slab in self.0.iter_mut().filter(|slab| slab.device == device) {
            let gap = slab.taken.windows(steps).position(|window| window.iter().all(|taken| !taken));
            if let Some(first) = gap {
                slab.taken[first..first + steps].fill(true);
                return Ok((Arc::clone(&slab.object), first * STEP));
            }
        }
        let object = Arc::new(Object::create(device, GRANULE)?);
        let mut taken = vec![false; GRANULE / STEP];
        taken[..steps].fill(true);
        self.0.push(Slab { device, object: Arc::clone(&object), taken });
        Ok((object, 0))
    }

    /// Takes back what `cut` gave; a block without allocations goes back to the device.
    pub(crate) fn give_back(&mut self, object: &Arc<Object>, offset: usize, bytes: usize) {
        let Some(at) = self.0.iter().position(|slab| Arc::ptr_eq(&slab.object, object)) else { return };
        let slab = &mut self.0[at];
        let first = offset / STEP;
        slab.taken[first..first + bytes.div_ceil(STEP)].fill(false);
        if slab.taken.iter().all(|taken| !taken) {
            self.0.swap_remove(at);
        }
    }
}
