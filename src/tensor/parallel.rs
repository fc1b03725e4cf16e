use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use parking_lot::Mutex;

/// More threads read no faster: memory, not the processor, is what they wait for.
const MAX_THREADS: usize = 4;
/// Work below this many bytes is done before a second thread has started.
const WORTH_A_THREAD: u64 = 1 << 20;

/// Does `work` for every index of `sizes` on several threads, largest first so that none is left with a large one at
/// the end, and returns the results in order. Each thread makes itself a `scratch`. The first error ends the work.
///
/// # Errors
/// What `work` returned first.
pub(crate) fn each<S, T: Send, E: Send>(
    sizes: &[u64],
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(usize, &mut S) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&at| (std::cmp::Reverse(sizes.get(at).copied()), at));
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let error = Mutex::new(None);
    let done = Mutex::new(Vec::with_capacity(sizes.len()));
    let run = || {
        let mut scratch = scratch();
        let mut mine = Vec::new();
        while !failed.load(Ordering::Relaxed)
            && let Some(&at) = order.get(next.fetch_add(1, Ordering::Relaxed))
        {
            match work(at, &mut scratch) {
                Ok(result) => mine.push((at, result)),
                Err(why) => {
                    failed.store(true, Ordering::Relaxed);
                    error.lock().get_or_insert(why);
                }
            }
        }
        done.lock().append(&mut mine);
    };
    thread::scope(|scope| {
        for _ in 1..threads(sizes) {
            // Where the system has no thread left, those that there are do all of it, be it this one alone.
            if thread::Builder::new().spawn_scoped(scope, run).is_err() {
                break;
            }
        }
        run();
    });
    if let Some(why) = error.into_inner() {
        return Err(why);
    }
    let mut done = done.into_inner();
    done.sort_by_key(|&(at, _)| at);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

fn threads(sizes: &[u64]) -> usize {
    let total = sizes.iter().fold(0u64, |total, &size| total.saturating_add(size));
    if total < WORTH_A_THREAD {
        return 1;
    }
    thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS).min(sizes.len())
}
