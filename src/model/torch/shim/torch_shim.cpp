// What the tensor library offers on CUDA and its Rust binding does not: streams, the caching allocator's books, and
// the switches that choose kernels. Plain numbers in and out; no exception leaves a function.
//
// Compiled against the headers of the libtorch in use and opened after that libtorch's CUDA half, which is where all
// symbols it needs come from: nothing is linked.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>

#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

namespace {

// Raised with every change of a struct below; `shim.rs` says the same number.
constexpr uint32_t VERSION = 1;

// Where the words of an error go: cut short and always ended by a zero.
struct Text {
  char* bytes;
  size_t capacity;
};

struct Devices {
  int32_t count;
  // `cudaError_t` of counting them.
  int32_t code;
  // 1000 × major + 10 × minor; 0 without a driver.
  int32_t driver;
  int32_t runtime;
};

struct Facts {
  int32_t major;
  int32_t minor;
  uint64_t total_bytes;
  char name[256];
};

struct StreamNumbers {
  int64_t id;
  int32_t device;
  uintptr_t raw;
};

// What was current before a stream was made current: the device, and the stream on the device of the new one.
struct Before {
  int64_t stream;
  int32_t stream_device;
  int32_t device;
};

struct Memory {
  uint64_t allocated;
  uint64_t reserved;
  uint64_t peak_allocated;
  uint64_t peak_reserved;
};

struct Switches {
  uint8_t cudnn_benchmark;
  uint8_t cudnn_deterministic;
  uint8_t tf32_convolution;
  uint8_t tf32_matmul;
  uint8_t sdpa_flash;
  uint8_t sdpa_memory_efficient;
  uint8_t sdpa_math;
};

void write(Text text, const char* words) noexcept {
  if (text.bytes == nullptr || text.capacity == 0) {
    return;
  }
  const size_t length = strnlen(words, text.capacity - 1);
  std::memcpy(text.bytes, words, length);
  text.bytes[length] = '\0';
}

// Runs `call`; 0 when it returned, 1 when it threw, with the words in `text`.
template <typename Call>
int32_t guarded(Text text, Call call) noexcept {
  try {
    call();
    return 0;
  } catch (const c10::Error& error) {
    write(text, error.what_without_backtrace());
  } catch (const std::exception& error) {
    write(text, error.what());
  } catch (...) {
    write(text, "an exception of an unknown kind");
  }
  return 1;
}

c10::cuda::CUDAStream stream_of(int64_t id, int32_t device) {
  return c10::cuda::CUDAStream::unpack3(id, static_cast<c10::DeviceIndex>(device), c10::DeviceType::CUDA);
}

int32_t devices(Devices* out, Text text) noexcept {
  return guarded(text, [&] {
    int count = 0;
    const cudaError_t code = c10::cuda::GetDeviceCount(&count);
    // The runtime remembers a failure and reports it again from the next unrelated call.
    (void)cudaGetLastError();
    *out = Devices{count, static_cast<int32_t>(code), 0, 0};
    (void)cudaDriverGetVersion(&out->driver);
    (void)cudaRuntimeGetVersion(&out->runtime);
    if (code != cudaSuccess) {
      write(text, cudaGetErrorString(code));
    }
  });
}

// The library decides once per process, at its first look, whether it has a CUDA half.
int32_t has_cuda_half(int32_t* out, Text text) noexcept {
  return guarded(text, [&] { *out = at::detail::getCUDAHooks().hasCUDART() ? 1 : 0; });
}

int32_t open(int32_t device, Facts* out, Text text) noexcept {
  return guarded(text, [&] {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    cudaDeviceProp properties{};
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    *out = Facts{properties.major, properties.minor, properties.totalGlobalMem, {}};
    write(Text{out->name, sizeof(out->name)}, properties.name);
  });
}

int32_t stream(int32_t device, StreamNumbers* out, Text text) noexcept {
  return guarded(text, [&] {
    const auto taken = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, static_cast<c10::DeviceIndex>(device));
    *out = StreamNumbers{taken.id(), device, reinterpret_cast<uintptr_t>(taken.stream())};
  });
}

int32_t make_current(const StreamNumbers* target, Before* before, Text text) noexcept {
  return guarded(text, [&] {
    const auto device = static_cast<c10::DeviceIndex>(target->device);
    const auto replaced = c10::cuda::getCurrentCUDAStream(device);
    *before = Before{replaced.id(), target->device, c10::cuda::current_device()};
    c10::cuda::set_device(device);
    c10::cuda::setCurrentCUDAStream(stream_of(target->id, target->device));
  });
}

int32_t restore(const Before* before, Text text) noexcept {
  return guarded(text, [&] {
    c10::cuda::setCurrentCUDAStream(stream_of(before->stream, before->stream_device));
    // Only where that device is in use already: making it current would set it up, with hundreds of MiB of its memory.
    C10_CUDA_CHECK(c10::cuda::MaybeSetDevice(static_cast<c10::DeviceIndex>(before->device)));
  });
}

int32_t synchronize(const StreamNumbers* target, Text text) noexcept {
  return guarded(text, [&] { stream_of(target->id, target->device).synchronize(); });
}

int32_t empty_cache(Text text) noexcept {
  return guarded(text, [] { c10::cuda::CUDACachingAllocator::emptyCache(); });
}

int32_t memory(int32_t device, Memory* out, Text text) noexcept {
  return guarded(text, [&] {
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    *out = Memory{
        static_cast<uint64_t>(stats.allocated_bytes[all].current),
        static_cast<uint64_t>(stats.reserved_bytes[all].current),
        static_cast<uint64_t>(stats.allocated_bytes[all].peak),
        static_cast<uint64_t>(stats.reserved_bytes[all].peak),
    };
  });
}

int32_t reset_peak(int32_t device, Text text) noexcept {
  return guarded(text, [&] { c10::cuda::CUDACachingAllocator::resetPeakStats(static_cast<c10::DeviceIndex>(device)); });
}

int32_t switches(Switches* out, Text text) noexcept {
  return guarded(text, [&] {
    const auto& context = at::globalContext();
    *out = Switches{
        context.benchmarkCuDNN(),
        context.deterministicCuDNN(),
        context.allowTF32CuDNN(),
        context.allowTF32CuBLAS(),
        context.userEnabledFlashSDP(),
        context.userEnabledMemEfficientSDP(),
        context.userEnabledMathSDP(),
    };
  });
}

int32_t set_switches(const Switches* wanted, Text text) noexcept {
  return guarded(text, [&] {
    auto& context = at::globalContext();
    context.setBenchmarkCuDNN(wanted->cudnn_benchmark != 0);
    context.setDeterministicCuDNN(wanted->cudnn_deterministic != 0);
    context.setAllowTF32CuDNN(wanted->tf32_convolution != 0);
    context.setAllowTF32CuBLAS(wanted->tf32_matmul != 0);
    context.setSDPUseFlash(wanted->sdpa_flash != 0);
    context.setSDPUseMemEfficient(wanted->sdpa_memory_efficient != 0);
    context.setSDPUseMath(wanted->sdpa_math != 0);
  });
}

// The whole interface. `bytes` is its size, so that one built of another source is noticed.
struct Table {
  uint32_t version;
  uint32_t bytes;
  decltype(&devices) devices_call;
  decltype(&has_cuda_half) has_cuda_half_call;
  decltype(&open) open_call;
  decltype(&stream) stream_call;
  decltype(&make_current) make_current_call;
  decltype(&restore) restore_call;
  decltype(&synchronize) synchronize_call;
  decltype(&empty_cache) empty_cache_call;
  decltype(&memory) memory_call;
  decltype(&reset_peak) reset_peak_call;
  decltype(&switches) switches_call;
  decltype(&set_switches) set_switches_call;
};

const Table TABLE = {
    VERSION, sizeof(Table), &devices,     &has_cuda_half, &open,       &stream,   &make_current,
    &restore, &synchronize, &empty_cache, &memory,        &reset_peak, &switches, &set_switches,
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const void* luna_torch_shim() {
  return &TABLE;
}
