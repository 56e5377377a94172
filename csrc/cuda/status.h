// Every CUDA status becomes an exception that says what failed and what to do; pybind11 makes std::invalid_argument a
// ValueError and std::runtime_error a RuntimeError. Also: what is refused before a launch, the device of a call, and
// driver calls fetched at run time, so that the module loads where there is no driver.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace vitlr::cuda {

[[noreturn]] inline void refuse(const std::string& why) { throw std::invalid_argument(why); }

inline const char* advice(cudaError_t status) {
  switch (status) {
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
      return "no usable CUDA driver or device here; check nvidia-smi, or use VITLR_BACKEND=torch";
    case cudaErrorNoKernelImageForDevice:
      return "vitlr._cuda was built for other GPUs; rebuild with TORCH_CUDA_ARCH_LIST set to this one's";
    case cudaErrorUnsupportedPtxVersion:
      return "the driver is older than the toolkit that built vitlr; build for this GPU by TORCH_CUDA_ARCH_LIST";
    case cudaErrorMemoryAllocation:
      return "free device memory or use smaller batches";
    case cudaErrorLaunchOutOfResources:
    case cudaErrorInvalidConfiguration:
      return "the kernel does not fit this GPU; use VITLR_BACKEND=torch and report it";
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorLaunchFailure:
    case cudaErrorAssert:
      return "an earlier kernel of this process may be the cause; restart it, and find the kernel with compute-sanitizer";
    case cudaErrorStreamCaptureUnsupported:
    case cudaErrorStreamCaptureInvalidated:
    case cudaErrorStreamCaptureImplicit:
      return "run the call once before the graph is captured";
    default:
      return "VITLR_BACKEND=torch does without this kernel";
  }
}

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // else the next call would report it once more
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + "); " +
                           advice(status));
}

// After every <<<>>>: a launch that was refused says so here; what fails while it runs is told by a later call.
inline void check_launch(const char* kernel) { check(cudaPeekAtLastError(), kernel); }

// The device of a call, the caller's one again afterwards. No synchronisation.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) {
      check(cudaSetDevice(device), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// 80 for compute capability 8.0, 90 for 9.0.
inline int capability(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
}

// `exactly`: code for sm_90a runs on 9.0 and nothing else.
inline void require_capability(int device, int wanted, bool exactly, const char* kernel) {
  const int found = capability(device);
  if (exactly ? found != wanted : found < wanted)
    refuse(std::string(kernel) + " needs compute capability " + std::to_string(wanted / 10) + "." +
           std::to_string(wanted % 10) + (exactly ? "" : " or later") + ", device " + std::to_string(device) + " has " +
           std::to_string(found / 10) + "." + std::to_string(found % 10));
}

// A pointer that a kernel will read: on this device, aligned. Tensors are checked in Python; this catches the rest.
inline void require_on_device(const void* pointer, int device, size_t alignment, const char* name) {
  if (pointer == nullptr) refuse(std::string(name) + " is a null pointer");
  if (reinterpret_cast<uintptr_t>(pointer) % alignment)
    refuse(std::string(name) + " is not aligned to " + std::to_string(alignment) + " bytes");
  cudaPointerAttributes found;
  check(cudaPointerGetAttributes(&found, pointer), "cudaPointerGetAttributes");
  if ((found.type != cudaMemoryTypeDevice && found.type != cudaMemoryTypeManaged) || found.device != device)
    refuse(std::string(name) + " does not lie on CUDA device " + std::to_string(device));
}

// An address that is passed to a kernel, and what it has to be.
struct Argument {
  const void* address;
  const char* name;
  size_t alignment;
  bool optional;  // null where there is nothing
};

inline void require_on_device(std::initializer_list<Argument> arguments, int device) {
  for (const Argument& one : arguments)
    if (one.address != nullptr || !one.optional) require_on_device(one.address, device, one.alignment, one.name);
}

// More than 48 KiB of shared memory has to be asked for, once a kernel and device; cheap enough for every launch.
template <class Kernel>
void allow_shared(Kernel* kernel, size_t bytes, const char* name) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        name);
}

// A driver call such as cuTensorMapEncodeTiled, as CUDA 12.0 defines it. The module is not linked with libcuda.
template <class Function>
Function* driver_call(const char* name, unsigned version = 12000) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult answer;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &answer), name);
#else
  (void)version;
  check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &answer), name);
#endif
  if (answer != cudaDriverEntryPointSuccess || found == nullptr)
    throw std::runtime_error(std::string(name) + ": this driver does not have it; update the driver");
  return reinterpret_cast<Function*>(found);
}

}  // namespace vitlr::cuda
