use std::collections::HashMap;

/// How much of the weights that processes have mapped they have written to. Each process is looked at once.
#[derive(Debug, Default)]
pub(super) struct Diverged {
    /// Bytes of pages of their own, by inode of the mapped memory; absent where the system does not tell.
    looked_at: HashMap<u32, Option<HashMap<u64, u64>>>,
}

impl Diverged {
    /// Bytes of pages that the process has made its own of the memory with this inode.
    pub(super) fn of(&mut self, pid: u32, inode: u64) -> Option<u64> {
        let by_inode = self.looked_at.entry(pid).or_insert_with(|| own_pages(pid));
        by_inode.as_ref().map(|by_inode| by_inode.get(&inode).copied().unwrap_or_default())
    }
}

/// Bytes of anonymous pages in a process's mappings of shared memory, by inode. A private mapping of a file has such pages
/// exactly where it was written to.
#[cfg(target_os = "linux")]
fn own_pages(pid: u32) -> Option<HashMap<u64, u64>> {
    use procfs::process::{MMapPath, Process};
    let process = Process::new(i32::try_from(pid).ok()?).ok()?;
    let mut by_inode = HashMap::new();
    for mapping in process.smaps().ok()? {
        if matches!(&mapping.pathname, MMapPath::Path(path) if path.as_os_str().as_encoded_bytes().starts_with(b"/memfd:"))
        {
            *by_inode.entry(mapping.inode).or_default() += mapping.extension.map.get("Anonymous").copied().unwrap_or(0);
        }
    }
    Some(by_inode)
}

#[cfg(not(target_os = "linux"))]
fn own_pages(_pid: u32) -> Option<HashMap<u64, u64>> {
    None
}
