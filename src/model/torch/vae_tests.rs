//! What a call does when memory runs out, on a network that fails when told to.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use tch::{TchError, Tensor};

use super::*;
use crate::device::{Device, InProcessDevice};
use crate::service::TileShape;
use crate::tensor::{DType, Dims};

/// A network that gives each latent element one pixel, and runs out of memory as often as told.
#[derive(Debug)]
struct Failing {
    left: Rc<Cell<u32>>,
    /// Bytes of this process whenever the network was asked for something.
    seen: Rc<RefCell<Vec<i64>>>,
}

impl Net for Failing {
    fn decode(&self, latent: &Tensor) -> Option<Result<Tensor, TchError>> {
        self.seen.borrow_mut().push(resident_bytes());
        if self.left.get() == 0 {
            return Some(latent.f_narrow(1, 0, 3).and_then(|image| image.f_contiguous()));
        }
        self.left.set(self.left.get() - 1);
        let words = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB.";
        Some(Err(TchError::Torch(words.to_owned())))
    }

    fn encode(&self, _image: &Tensor) -> Option<Result<Tensor, TchError>> {
        None
    }
}

/// Memory of this process that is in use, as the system counts it.
fn resident_bytes() -> i64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<i64>().ok()).unwrap_or(0) * 4096
}

/// As many channels as make 67 MB of float32 of a latent that is one tile of every shape.
const CHANNELS: u64 = 1 << 14;
const SIDE: u64 = 32;
/// More than other tests of this process come and go with, and less than an attempt holds.
const CLEAR_BYTES: i64 = 40 << 20;

/// Decodes a latent of half-precision numbers, which an attempt first makes float32 of, with so many failures. The
/// answer, and the bytes of this process at each call of the network and after all.
fn decode(failures: u32, mode: VaeMode) -> (Result<VaeMode, ModelError>, Vec<i64>) {
    let (left, seen) = (Rc::new(Cell::new(failures)), Rc::new(RefCell::new(Vec::new())));
    let net = Box::new(Failing { left: Rc::clone(&left), seen: Rc::clone(&seen) });
    let backing = Backing::Gpu(Target::Cpu);
    let mut vae = TorchVae { net, ratio: 1, target: Target::Cpu, backing };
    let meta = TensorMeta::contiguous(DType::F16, Dims::of([1, CHANNELS, SIDE, SIDE]));
    let plan = VaePlan {
        operation: VaeOperation::Decode,
        output: TensorMeta::contiguous(DType::F32, Dims::of([1, SIDE, SIDE, 3])),
        mode,
    };
    let span = |bytes| Span::new(InProcessDevice.allocate(bytes).unwrap(), 0, bytes).unwrap();
    let (input, output) = (span(meta.size_bytes().unwrap()), span(plan.output.size_bytes().unwrap()));
    // One half everywhere: a picture that shows where nothing was written.
    input.write(&0x3800u16.to_ne_bytes().repeat(meta.elements().unwrap())).unwrap();
    let answer = vae.run(&plan, ModelInput { meta, memory: &input }, &output, &|| false);
    if answer.is_ok() {
        let image = output.elements::<f32>(plan.output.elements().unwrap()).unwrap();
        assert!(image.iter().all(|&value| (value - 0.5).abs() < 1e-6), "all of the picture is there");
    }
    seen.borrow_mut().push(resident_bytes());
    (answer, seen.take())
}

#[test]
fn a_call_that_runs_out_once_drops_everything_is_run_in_tiles_and_says_so() {
    let (answer, _) = decode(0, VaeMode::Full);
    assert_eq!(answer.unwrap(), VaeMode::Full);
    let (answer, seen) = decode(1, VaeMode::Full);
    assert_eq!(answer.unwrap(), VaeMode::Tiled(TileShape { width: 64, height: 64, overlap: 16 }));
    let [full, tiled, _after] = seen[..] else { panic!("{seen:?}") };
    assert!(tiled - full < CLEAR_BYTES, "the second attempt came on top of the first: {seen:?}");
}

#[test]
fn a_call_that_always_runs_out_is_an_error_that_holds_nothing() {
    let (answer, seen) = decode(u32::MAX, VaeMode::Full);
    let Err(ModelError::OutOfMemory { what: "decode", cause }) = answer else { panic!("{answer:?}") };
    assert!(cause.contains("CUDA out of memory"), "{cause}");
    let [full, tiled, after] = seen[..] else { panic!("{seen:?}") };
    assert!(tiled - full < CLEAR_BYTES, "the second attempt came on top of the first: {seen:?}");
    assert!(cfg!(not(target_os = "linux")) || tiled - after > CLEAR_BYTES, "something is still held: {seen:?}");
}

#[test]
fn tiles_that_were_asked_for_are_not_replaced_by_others() {
    let tiles = VaeMode::Tiled(TileShape { width: 512, height: 512, overlap: 64 });
    let (answer, _) = decode(1, tiles);
    assert!(matches!(answer, Err(ModelError::OutOfMemory { .. })), "{answer:?}");
    assert_eq!(decode(0, tiles).0.unwrap(), tiles);
}
