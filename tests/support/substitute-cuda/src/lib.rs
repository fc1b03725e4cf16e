//! A stand-in for `libcuda.so` that tests put in front of the real one, so that production CUDA code runs in real
//! processes on machines without a GPU.
//!
//! Device memory is shared files in a folder of the run, a device pointer is the address at which such a file is
//! mapped, a stream is a thread and an event two counters. What is refused, and with which code, follows `rules.tsv`
//! beside this crate; `tests/cuda_rules` replays that table on this library and on a real driver. A green run proves
//! protocol, bookkeeping and order of work. It proves nothing about CUDA: there are no kernels, no page tables, and
//! host memory is stricter than two GPU contexts are.
//!
//! # Settings
//! All are environment variables, read when `cuInit` is called.
//!
//! | variable | effect | example |
//! | --- | --- | --- |
//! | `SUBSTITUTE_CUDA_RUN` | folder of the shared files; processes see each other's memory only within one. Default: one for each user in the temporary folder | `/tmp/run-1` |
//! | `SUBSTITUTE_CUDA_DEVICES` | names of the GPUs; a UUID is made from each name. Default: one, `substitute` | `alpha,beta` |
//! | `CUDA_VISIBLE_DEVICES` | as with the real driver: indices or `GPU-…` UUIDs (or their beginnings), reorders and hides | `1,0` |
//! | `SUBSTITUTE_CUDA_NO_DEVICE` | `cuInit` finds no device (100) | `1` |
//! | `SUBSTITUTE_CUDA_MEMORY` | bytes of each GPU, counted over all living processes of the run; what lies beyond is refused (2). Default: 16 GiB | `8388608` |
//! | `SUBSTITUTE_CUDA_DIRTY` | fresh memory holds what somebody else might have left there | `1` |
//! | `SUBSTITUTE_CUDA_P2P` | the GPUs may reach each other | `1` |
//! | `SUBSTITUTE_CUDA_IPC` | `refused`: handles are made but memory and events do not open (400), as on WSL2 | `refused` |
//! | `SUBSTITUTE_CUDA_FAIL_OPEN` | the n-th `cuIpcOpenMemHandle` of this process fails (205); `n+`: each from the n-th | `1`, `2+` |
//! | `SUBSTITUTE_CUDA_FAIL_EVENT_OPEN` | the same for `cuIpcOpenEventHandle` | `1+` |
//! | `SUBSTITUTE_CUDA_PID_NAMESPACE` | name of this process's PID namespace; legacy handles of another do not open (1), file descriptors cross | `container-a` |
//! | `SUBSTITUTE_CUDA_CORRUPT_IMPORT` | legacy imports succeed, but show private zeroes instead of the exporter's memory | `1` |
//! | `SUBSTITUTE_CUDA_VMM` | `refused`: `cuMemExportToShareableHandle` is not supported (801) | `refused` |
//! | `SUBSTITUTE_CUDA_FAIL_IMPORT` | the n-th (`n+`: each from the n-th) `cuMemImportFromShareableHandle` fails (801) | `1` |
//! | `SUBSTITUTE_CUDA_HOST_REGISTER` | `refused`: `cuMemHostRegister` is not supported (801) | `refused` |
//! | `SUBSTITUTE_CUDA_DELAY_MS` | every job of a stream waits so long before it starts | `200` |
//! | `SUBSTITUTE_CUDA_LOSE_EVENTS` | records of interprocess events count as done at once, before the work before them | `1` |
//! | `SUBSTITUTE_CUDA_LEAKS` | at exit, what is still alive is written to `<prefix>.<pid>`, a line `name value` for each kind | `/tmp/run-1/leaks` |
//!
//! `substituteCudaLive` and `substituteCudaReport` (not part of CUDA) give the same counts at any time, and
//! `substituteCudaTransit` the bytes that copies took between host memory and a GPU's, page-locked or not.
//! `substituteCudaRefuseMaps` has the next so many `cuMemMap` of the process fail (2).
//!
//! # Differences that a test must know
//! - Fresh memory reads as zeroes unless it is set to be dirty; the real driver promises nothing.
//! - The work of a killed process never finishes. A wait for its event ends, as if the event were recorded.
//! - Another context than a device's primary one cannot be made, so "one context for each importing process" is not
//!   checked. Pools, managed memory and MIG are left out.
//! - A process must not fork after `cuInit`, as with the real driver.
#![cfg(target_os = "linux")]
#![allow(non_snake_case, reason = "the functions have the names of the driver's")]

mod abi;
mod attribute;
mod code;
mod context;
mod copy;
mod device;
mod event;
mod event_page;
mod faults;
mod handle;
mod host;
mod ipc;
mod ipc_event;
mod leaks;
mod mapping;
mod memory;
mod ordered;
mod plain;
mod pointer;
mod region;
mod run;
mod slab;
mod stream;
mod thread_of_work;
mod transit;
mod vmm;
mod vmm_range;
mod vmm_share;
