//! How fast a set of weights is loaded, against the same bytes read into the same kind of memory and nothing else.
//!
//! `cargo bench --features cli --bench weights_load [-- GB [ROUNDS]]` writes a float16 file of UNet-like tensors to the
//! temporary folder, reads it once so that it is cached, and measures in interleaved rounds. Medians are printed.

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use luna_broker::device::{Device, HostDevice, Region};
use luna_broker::model::weights::{WeightPlan, digest_file, digest_region, load};
use luna_broker::model::{ModelError, ModelFile};
use luna_broker::tensor::{CastRule, DType};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const ALIGNMENT: u64 = 64;
/// Bytes that the baseline reads at a time.
const READ_BYTES: usize = 1 << 20;
const MAX_THREADS: usize = 4;
/// Widths of a UNet's levels.
const WIDTHS: [usize; 3] = [320, 640, 1280];

fn main() -> Result<()> {
    let arguments: Vec<f64> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let gigabytes = arguments.first().copied().unwrap_or(1.7);
    let rounds = arguments.get(1).map_or(7, |&rounds| rounds as usize).max(5);
    let path = std::env::temp_dir().join(format!("luna-weights-{}.safetensors", std::process::id()));
    let _removed = Removed(path.clone());
    generate(&path, (gigabytes * 1e9) as usize)?;
    let file = ModelFile::open(&path)?;
    let stored = WeightPlan::of_file(&file, &CastRule::stored(), ALIGNMENT)?;
    let single = WeightPlan::of_file(&file, &CastRule::all(DType::F32), ALIGNMENT)?;
    digest_file(&file, &|_, _| {}, &|| false)?;

    let mut times = vec![Vec::new(); 5];
    for _ in 0..rounds {
        times[0].push(timed(|| baseline(&file, &stored).map(drop))?);
        times[1].push(timed(|| loaded(&file, &stored).map(drop))?);
        times[2].push(timed(|| loaded(&file, &single).map(drop))?);
        times[3].push(timed(|| Ok(digest_file(&file, &|_, _| {}, &|| false).map(drop)?))?);
        let region = loaded(&file, &stored)?;
        times[4].push(timed(|| Ok(digest_region(&stored, &region, &|| false).map(drop)?))?);
    }

    let tensors = stored.tensors.len();
    println!(
        "{tensors} tensors, {:.2} GB, {} threads, median of {rounds} rounds",
        file.size_bytes() as f64 / 1e9,
        threads()
    );
    println!("{:<28} {:>8} {:>8} {:>10}", "", "s", "GB/s", "of baseline");
    let names =
        ["baseline: read only", "load", "load, float16 to float32", "digest of the file", "digest of the region"];
    let against = median(&mut times[0]);
    for (name, times) in names.iter().zip(&mut times) {
        let time = median(times).as_secs_f64();
        let rate = file.size_bytes() as f64 / 1e9 / time;
        println!("{name:<28} {time:>8.3} {rate:>8.2} {:>9.0} %", 100.0 * against.as_secs_f64() / time);
    }
    Ok(())
}

struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            eprintln!("{} is left behind: {error}", self.0.display());
        }
    }
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn loaded(file: &ModelFile, plan: &WeightPlan) -> Result<Arc<dyn Region>> {
    let region = HostDevice::default().allocate(usize::try_from(plan.size_bytes)?)?;
    load(file, plan, &region, &|_, _| {}, &|| false)?;
    Ok(region)
}

/// The data of the file into a fresh region: positioned reads by as many threads, no digest, no layout.
fn baseline(file: &ModelFile, plan: &WeightPlan) -> Result<Arc<dyn Region>> {
    let region = HostDevice::default().allocate(usize::try_from(plan.size_bytes)?)?;
    let start = file.tensors().map(|(_, stored)| stored.bytes.start).min().unwrap_or(0);
    let length = usize::try_from(file.size_bytes())? - start;
    let base = region.address();
    let next = AtomicUsize::new(0);
    let read = || -> std::result::Result<(), ModelError> {
        loop {
            let at = next.fetch_add(READ_BYTES, Ordering::Relaxed);
            if at >= length {
                return Ok(());
            }
            let bytes = READ_BYTES.min(length - at);
            // SAFETY: the region is mapped host memory, larger than the data by its plan; no two threads have the same
            // bytes, and nobody else knows the region.
            let target = unsafe { std::slice::from_raw_parts_mut((base + at) as *mut u8, bytes) };
            file.read_exact_at((start + at) as u64, target)?;
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads()).map(|_| scope.spawn(read)).collect();
        let mine = read();
        others
            .into_iter()
            .map(|other| other.join().expect("a reader does not panic"))
            .fold(mine, |all, one| all.and(one))
    })?;
    Ok(region)
}

/// A safetensors file of about `size_bytes`: convolutions, projections, biases, as a UNet has them.
fn generate(path: &Path, size_bytes: usize) -> Result<()> {
    let mut end = 0;
    let mut header = serde_json::Map::new();
    'fill: for block in 0.. {
        for width in WIDTHS {
            let shapes = [
                vec![width, width, 3, 3],
                vec![width],
                vec![width],
                vec![width, width],
                vec![width, width],
                vec![width, 768],
                vec![8 * width, width],
                vec![width, 4 * width],
                vec![2 * width, 2 * width, 3, 3],
            ];
            for (at, shape) in shapes.into_iter().enumerate() {
                let key = format!("model.diffusion_model.{block}.{width}.{at}.weight");
                let start = end;
                end += shape.iter().product::<usize>() * 2;
                let entry = serde_json::json!({"dtype": "F16", "shape": shape, "data_offsets": [start, end]});
                header.insert(key, entry);
                if end >= size_bytes {
                    break 'fill;
                }
            }
        }
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = BufWriter::with_capacity(READ_BYTES, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    // Finite numbers, none of them the same for long.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..end / 2 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        file.write_all(&((state >> 48) as u16 & 0xbbff).to_le_bytes())?;
    }
    file.into_inner()?.sync_all()?;
    Ok(())
}
