use super::super::shim::Switches;

/// How the tensor library chooses kernels on GPUs. One set for the whole process.
///
/// The library's own defaults stay until somebody sets others: every kind of attention allowed, TF32 in convolutions
/// but not in matrix products, neither benchmarking nor determinism.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaSwitches {
    /// Try all convolution kernels once per shape and take the fastest. Pays where shapes repeat, and takes memory.
    pub cudnn_benchmark: bool,
    /// Convolution kernels whose results repeat bit by bit only.
    pub cudnn_deterministic: bool,
    /// Convolutions of float32 with 10 bits of mantissa, on GPUs that can.
    pub tf32_convolution: bool,
    /// The same for matrix products.
    pub tf32_matmul: bool,
    /// Flash attention.
    pub sdpa_flash: bool,
    /// Memory-efficient attention: what heads too wide for flash attention need.
    pub sdpa_memory_efficient: bool,
    /// Attention by plain matrix products, which holds all scores at once.
    pub sdpa_math: bool,
}

impl From<Switches> for CudaSwitches {
    fn from(Switches(on): Switches) -> Self {
        let [cudnn_benchmark, cudnn_deterministic, tf32_convolution, tf32_matmul, flash, memory_efficient, math] =
            on.map(|switch| switch != 0);
        Self {
            cudnn_benchmark,
            cudnn_deterministic,
            tf32_convolution,
            tf32_matmul,
            sdpa_flash: flash,
            sdpa_memory_efficient: memory_efficient,
            sdpa_math: math,
        }
    }
}

impl From<CudaSwitches> for Switches {
    fn from(switches: CudaSwitches) -> Self {
        let on = [
            switches.cudnn_benchmark,
            switches.cudnn_deterministic,
            switches.tf32_convolution,
            switches.tf32_matmul,
            switches.sdpa_flash,
            switches.sdpa_memory_efficient,
            switches.sdpa_math,
        ];
        Self(on.map(u8::from))
    }
}
