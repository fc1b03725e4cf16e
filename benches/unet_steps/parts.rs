//! The figures, one function each.

use std::env;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use luna_broker::client::{CallOptions, Client, Input, Unet};
use luna_broker::model::RunMemory;
use luna_broker::service::{AdapterStack, BlockCache, CacheVerdict, RunSettings, UnetInput};
use tch::{Kind, Tensor};

use super::AnyError;
use super::made::{self, Stored};
use super::scene::{Scene, Step, load, median, verdict};
use super::unet::Numbers;

/// Side of the latent where the figure names none.
const SIDE: u64 = 32;
/// Latents that requests together are timed for.
const SIDES: [u64; 3] = [16, 32, 64];

/// How long a file takes to be ready, and what of it is private memory.
pub(super) fn ready(folder: &Path, single: &Path) -> Result<(), AnyError> {
    const ROUNDS: usize = 5;
    let (mut times, mut private) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (before, began) = (private_bytes()?, Instant::now());
        let unet = load(single)?;
        times.push(began.elapsed().as_secs_f64());
        private.push(private_bytes()?.saturating_sub(before) as f64 / 1e6);
        drop(unet);
    }
    let (time, private) = (median(&mut times), median(&mut private));
    println!("  float32 file ready                {:9.3} s       below 1 s: {}", time, verdict(time < 1.0));
    println!("    private memory                  {private:9.1} MB      below 100 MB: {}", verdict(private < 100.0));
    let half = made::model(folder, "half", &Numbers::SD15, Stored::F16)?;
    let elements: usize = Numbers::SD15.entries().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let source = Tensor::zeros([elements as i64], (Kind::Half, tch::Device::Cpu));
    let (mut converted, mut loaded) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let began = Instant::now();
        drop(source.to_kind(Kind::Float));
        converted.push(began.elapsed().as_secs_f64());
        let began = Instant::now();
        drop(load(&half)?);
        loaded.push(began.elapsed().as_secs_f64());
    }
    std::fs::remove_file(half)?;
    let ratio = median(&mut loaded) / median(&mut converted);
    println!("  float16 file ready                {:9.3} s", median(&mut loaded));
    println!("    converted and written alone     {:9.3} s", median(&mut converted));
    println!("    ratio                           {ratio:9.3}         at most 1.3: {}", verdict(ratio <= 1.3));
    Ok(())
}

/// Bytes of memory that no file stands behind.
fn private_bytes() -> Result<u64, AnyError> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).ok_or("the system does not say")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<u64>()? * 1024)
}

/// What an adapter of rank 16 beside every linear layer of attention costs, and changing it from step to step.
pub(super) fn lora(scene: &mut Scene, folder: &Path, rounds: usize) -> Result<(), AnyError> {
    let paths = [made::lora(folder, "one", &scene.unet, 0)?, made::lora(folder, "other", &scene.unet, 1000)?];
    let stacks = [scene.stack(&paths[0])?, scene.stack(&paths[1])?];
    let step = [Step::new(scene, SIDE, 1)?];
    let (mut plain, mut with, mut changing) = (Vec::new(), Vec::new(), Vec::new());
    scene.time(&step, None)?;
    for _ in 0..rounds {
        let alone = scene.time(&step, None)?.as_secs_f64();
        let beside = scene.time(&step, Some(&stacks[0]))?.as_secs_f64();
        // The stack before was the same, and here it was the other.
        let again = scene.time(&step, Some(&stacks[0]))?.as_secs_f64();
        let other = scene.time(&step, Some(&stacks[1]))?.as_secs_f64();
        plain.push(alone);
        with.push(beside / alone - 1.0);
        changing.push(other / again - 1.0);
    }
    let (share, switch) = (median(&mut with), median(&mut changing));
    println!("  forward, latent {SIDE} x {SIDE}, two rows  {:9.3} s", median(&mut plain));
    println!(
        "    with LoRA of rank 16, attention {:9.2} % more  at most 10 %: {}",
        share * 100.0,
        verdict(share <= 0.1)
    );
    println!("    with another one than before    {:9.2} % more than with the same again", switch * 100.0);
    Ok(())
}

/// What a step costs that the block cache leaves out.
pub(super) fn cache(name: &str, scene: &mut Scene, rounds: usize, most: f64) -> Result<(), AnyError> {
    let step = Step::new(scene, SIDE, 1)?;
    let of =
        |threshold| RunMemory::new(&RunSettings { cache: Some(BlockCache::new(threshold)), ..RunSettings::default() });
    let (mut computes, mut leaves_out) = (of(0.0), of(1e9));
    scene.time_run(&step, &mut leaves_out)?;
    scene.time_run(&step, &mut computes)?;
    let (mut shares, mut forwards) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (whole, cache) = scene.time_run(&step, &mut computes)?;
        let (hit, left_out) = scene.time_run(&step, &mut leaves_out)?;
        if (cache.verdict, left_out.verdict) != (CacheVerdict::Different, CacheVerdict::Hit) {
            return Err(format!("{cache:?} and {left_out:?}").into());
        }
        forwards.push(whole.as_secs_f64());
        shares.push(hit.as_secs_f64() / whole.as_secs_f64());
    }
    let share = median(&mut shares);
    println!("  {name}: forward {:.3} s", median(&mut forwards));
    println!(
        "    a step left out                 {:9.2} % of it  at most {:.0} %: {}",
        share * 100.0,
        most * 100.0,
        verdict(share <= most)
    );
    Ok(())
}

/// Requests together against one after the other.
pub(super) fn batch(scene: &mut Scene, rounds: usize) -> Result<(), AnyError> {
    println!("  requests together, seconds for each (share of one alone)");
    for side in SIDES {
        let steps = (0..4).map(|seed| Step::new(scene, side, seed)).collect::<Result<Vec<_>, _>>()?;
        let mut times = [1, 2, 4].map(|_| Vec::new());
        scene.time(&steps, None)?;
        for _ in 0..rounds {
            for (count, times) in [1, 2, 4].into_iter().zip(&mut times) {
                let taken = scene.time(steps.get(..count).unwrap_or_default(), None)?;
                times.push(taken.as_secs_f64() / count as f64);
            }
        }
        let [one, two, four] = times.each_mut().map(|times| median(times));
        println!(
            "    latent {side:2} x {side:2}: one {one:.3}, two {two:.3} ({:.2}), four {four:.3} ({:.2})",
            two / one,
            four / one
        );
    }
    Ok(())
}

/// Killed with this program, however that ends.
struct Broker(Child);

impl Drop for Broker {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

fn connect(socket: &str) -> Result<Client, AnyError> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match Client::connect(Some(socket)) {
            Ok(client) => return Ok(client),
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// A step through the broker against the same step in this process.
pub(super) fn remote(scene: &mut Scene, model: &Path, folder: &Path, rounds: usize) -> Result<(), AnyError> {
    let (broker, unet) = served(model, folder, "broker.sock", &[])?;
    // What may run requests together, beside what runs one at a time.
    let (other, singly) = served(model, folder, "singly.sock", &["--max-batch", "1"])?;
    let step = [Step::new(scene, SIDE, 1)?];
    let [Step { x, timesteps, context, output, .. }] = &step;
    let bytes = [x.bytes()?, timesteps.bytes()?, context.bytes()?];
    let input = UnetInput {
        x: Input::new(x.meta, &bytes[0])?,
        timesteps: Input::new(timesteps.meta, &bytes[1])?,
        context: Input::new(context.meta, &bytes[2])?,
        y: None,
        control: None,
    };
    let (mut trips, mut shares, mut ratios, mut lone) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        let began = Instant::now();
        let answer = unet.call(&input, &AdapterStack::default(), &CallOptions::default())?;
        let trip = began.elapsed().as_secs_f64();
        let began = Instant::now();
        singly.call(&input, &AdapterStack::default(), &CallOptions::default())?;
        let alone = began.elapsed().as_secs_f64();
        let here = scene.time(&step, None)?.as_secs_f64();
        if round == 0 {
            if answer.tensor.bytes()? != output.bytes()? {
                return Err("the broker's result differs from this process's".into());
            }
            continue;
        }
        let run = (answer.times.finished_ns - answer.times.started_ns) as f64 / 1e9;
        trips.push(trip);
        shares.push((trip - run) / run);
        ratios.push(trip / here);
        lone.push(trip / alone);
    }
    drop((broker, other));
    let (share, ratio) = (median(&mut shares), median(&mut ratios));
    println!("  step through the broker           {:9.3} s", median(&mut trips));
    println!(
        "    round trip - execution          {:9.3} %       at most 1 %: {}",
        share * 100.0,
        verdict(share <= 0.01)
    );
    println!("    remote / in-process             {ratio:9.3}         at most 1.03: {}", verdict(ratio <= 1.03));
    println!("    batching / one at a time        {:9.3}         of a client that is alone", median(&mut lone));
    Ok(())
}

/// A broker of its own, and the model there.
fn served(model: &Path, folder: &Path, name: &str, options: &[&str]) -> Result<(Broker, Unet), AnyError> {
    let socket = folder.join(name).to_string_lossy().into_owned();
    let program = env::var_os("LUNA_BROKER_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_luna-broker").into());
    let mut command = Command::new(program);
    let broker = Broker(command.args(["serve", "--socket", &socket]).args(options).stderr(Stdio::null()).spawn()?);
    let client = connect(&socket)?;
    Ok((broker, client.unet(&model.to_string_lossy())?))
}
