use std::sync::Arc;

use parking_lot::Mutex;

use super::{Entry, Folder, assorted, contents, digest, host, mixed_rule, quietly};
use crate::device::{DeviceError, Place, Region, RegionHandle};
use crate::id::GpuUuid;
use crate::model::weights::{WeightPlan, cast, digest_region};
use crate::model::{ModelError, ModelFile};
use crate::tensor::{CastRule, DType};

/// What the region of `plan` must hold, and the same as entries.
fn expected(plan: &WeightPlan, entries: &[Entry]) -> (Vec<u8>, Vec<Entry>) {
    let mut region = vec![0; plan.size_bytes as usize];
    let wanted = entries.iter().map(|entry| {
        let planned = plan.tensor(&entry.key).unwrap();
        let at = planned.offset as usize;
        let target = &mut region[at..at + planned.meta.size_bytes().unwrap()];
        cast(entry.dtype, planned.meta.dtype, &entry.bytes, target).unwrap();
        Entry { dtype: planned.meta.dtype, bytes: target.to_vec(), ..entry.clone() }
    });
    let wanted = wanted.collect();
    (region, wanted)
}

fn check(file: &ModelFile, entries: &[Entry], rule: &CastRule, region: impl Fn(&WeightPlan) -> Arc<dyn Region>) {
    let plan = WeightPlan::of_file(file, rule, 64).unwrap();
    let region = region(&plan);
    let loaded = quietly(file, &plan, &region).unwrap();
    let (bytes, wanted) = expected(&plan, entries);
    assert!(contents(&region) == bytes, "the region holds the tensors where the plan says, and zeros between");
    assert_eq!(loaded.source, digest(entries));
    assert_eq!(loaded.content, digest(&wanted));
    assert_eq!(digest_region(&plan, &region, &|| false).unwrap(), loaded.content);
}

#[test]
fn every_tensor_lands_where_the_plan_says() {
    let folder = Folder::new();
    // Of the paddings, at most one in eight leaves the data of the file aligned.
    for padding in 0..3 {
        let file = folder.write("file", &assorted(), padding);
        for rule in [CastRule::stored(), mixed_rule(), CastRule::all(DType::F64), CastRule::all(DType::Bf16)] {
            check(&file, &assorted(), &rule, host);
            check(&file, &assorted(), &rule, gpu);
        }
    }
}

#[test]
fn ten_thousand_tiny_tensors() {
    let folder = Folder::new();
    let entries: Vec<Entry> =
        (0..10_000).map(|at| Entry::filled(&format!("{at}.bias"), DType::F16, &[at % 7])).collect();
    let file = folder.write("file", &entries, 1);
    check(&file, &entries, &CastRule::stored(), host);
    check(&file, &entries, &CastRule::all(DType::F32), host);
}

#[test]
fn a_plan_of_something_else_is_refused() {
    let folder = Folder::new();
    let file = folder.write("file", &assorted(), 0);
    let plan = WeightPlan::of_file(&file, &CastRule::stored(), 64).unwrap();
    let refused = |plan: &WeightPlan, region: &Arc<dyn Region>| {
        let error = quietly(&file, plan, region).unwrap_err();
        assert!(matches!(error, ModelError::PlanMismatch { .. }), "{error}");
    };
    let region = host(&plan);
    let with = |change: &dyn Fn(&mut WeightPlan)| {
        let mut changed = plan.clone();
        change(&mut changed);
        changed
    };
    refused(&with(&|plan| plan.tensors.truncate(3)), &region);
    refused(&with(&|plan| plan.tensors.swap(0, 1)), &region);
    refused(&with(&|plan| plan.tensors[5].offset = plan.tensors[4].offset), &region);
    refused(&with(&|plan| plan.tensors[0].key.push('x')), &region);
    refused(&with(&|plan| plan.tensors[0].meta.dtype = DType::F16), &region);
    refused(&with(&|plan| plan.tensors[9].offset = u64::MAX - 1), &region);
    let small = with(&|plan| plan.size_bytes -= 64);
    refused(&plan, &host(&small));
    assert!(contents(&region).iter().all(|&byte| byte == 0), "nothing was written");
}

/// Memory that the CPU cannot reach.
#[derive(Debug)]
struct Gpu(Mutex<Vec<u8>>);

fn gpu(plan: &WeightPlan) -> Arc<dyn Region> {
    Arc::new(Gpu(Mutex::new(vec![0; plan.size_bytes as usize])))
}

// SAFETY: it is no host memory, about which alone something is promised.
unsafe impl Region for Gpu {
    fn size_bytes(&self) -> usize {
        self.0.lock().len()
    }

    fn address(&self) -> usize {
        0x7000_0000_0000
    }

    fn place(&self) -> Place {
        Place::Gpu(GpuUuid([1; 16]))
    }

    fn export(&self) -> Result<RegionHandle, DeviceError> {
        Err(DeviceError::Imported)
    }

    fn opened(&self) {}

    fn copy_in(&self, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        self.0.lock()[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn copy_out(&self, offset: usize, target: &mut [u8]) -> Result<(), DeviceError> {
        target.copy_from_slice(&self.0.lock()[offset..offset + target.len()]);
        Ok(())
    }

    fn record(&self) -> Result<u64, DeviceError> {
        Ok(0)
    }

    fn wait(&self, _: u64) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[cfg(target_os = "linux")]
mod holes {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use super::*;
    use crate::model::weights::digest_file;

    const LENGTH: u64 = 48 << 20;

    /// Bytes of memory that the system has given to a region.
    fn resident(region: &Arc<dyn Region>) -> u64 {
        let RegionHandle::Fd(fd) = region.export().unwrap() else { panic!("a region of the host is a memfd") };
        rustix::fs::fstat(fd).unwrap().st_blocks.cast_unsigned() * 512
    }

    fn is_sparse(path: &Path) -> bool {
        let stat = rustix::fs::stat(path).unwrap();
        stat.st_blocks.cast_unsigned() * 512 < stat.st_size.cast_unsigned() / 2
    }

    #[test]
    fn holes_cost_no_memory_and_what_lies_beside_them_is_read() {
        let folder = Folder::new();
        for padding in [0, 1, 2, 3] {
            let tensors: [(&str, &str, &[u64], u64); 2] =
                [("large", "F32", &[LENGTH / 4], LENGTH), ("small", "F32", &[5], 20)];
            let path = folder.write_hole("sparse", &tensors, padding);
            let start = ModelFile::open(&path).unwrap().tensor("large").unwrap().bytes.start as u64;
            let mut entries =
                [Entry::filled("large", DType::F32, &[LENGTH / 4]), Entry::filled("small", DType::F32, &[5])];
            entries.iter_mut().for_each(|entry| entry.bytes.fill(0));
            // At the beginning, across a chunk's end, around the ends of stored blocks, at the first byte of one, at the end.
            let blocks = [4096, 4 << 20, 40 << 20, 20 << 20].map(|block: u64| block - start);
            for at in [0, (512 << 10) - 3, blocks[0] - 1, blocks[1] - 2, blocks[2] - 3, blocks[3], LENGTH - 6] {
                let bytes = [0x11, 0x42, 0x33, 0x44, 0x55, 0x46];
                File::options().write(true).open(&path).unwrap().write_all_at(&bytes, start + at).unwrap();
                entries[0].bytes[at as usize..at as usize + 6].copy_from_slice(&bytes);
            }
            assert!(is_sparse(&path), "the temporary folder stores no holes");
            let file = ModelFile::open(&path).unwrap();
            assert_eq!(digest_file(&file, &|_, _| {}, &|| false).unwrap(), digest(&entries));
            for rule in [CastRule::stored(), CastRule::all(DType::F16)] {
                let plan = WeightPlan::of_file(&file, &rule, 64).unwrap();
                let region = host(&plan);
                let loaded = quietly(&file, &plan, &region).unwrap();
                assert!(resident(&region) < LENGTH / 16, "{} bytes of memory", resident(&region));
                let (bytes, wanted) = expected(&plan, &entries);
                assert_eq!((loaded.source, loaded.content), (digest(&entries), digest(&wanted)));
                assert!(contents(&region) == bytes);
            }
        }
    }
}
