use std::sync::Arc;

use super::super::registry::Registry;
use super::loading::Weights;
use super::memory::WeightPlace;
use super::set::wire_table;
use super::wanted::Wanted;
use crate::error::Result;
use crate::protocol::AttachRequest;
use crate::tensor::CastRule;

impl Weights {
    /// The table of the tensors that attaching `name` as it is would give. Of a file the header is read alone.
    ///
    /// # Errors
    /// As [`Wanted::of_file`].
    pub(in crate::broker) fn header(&self, registry: &Registry, name: String) -> Result<Arc<[u8]>> {
        let published = self.lock().table.published(&name).map(|known| Arc::clone(&known.set));
        if let Some(set) = published {
            return Ok(Arc::clone(&set.table));
        }
        let request = AttachRequest { name, rule: CastRule::default(), gpu: None, replaces: None };
        wire_table(&Wanted::of_file(registry, &request, WeightPlace::Host)?.plan)
    }
}
