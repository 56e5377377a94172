// A CUDA runtime that is none: the whole of vitlr._cuda is linked against it to see, without a driver, what it launches, what
// it refuses, and how it tells of what fails. Two GPUs; an address with bit 44 is on the device that bits 40 to 43 say.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <sstream>
#include <string>

namespace {

std::map<const void*, std::string> kernels;
std::map<std::string, cudaError_t> failures;
std::ostringstream told;
std::string text;
int current = 0, capability = 90;
struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} pushed;

cudaError_t answer(const char* call) {
  const auto found = failures.find(call);
  return found == failures.end() ? cudaSuccess : found->second;
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared, void* stream) {
  told << "launch " << kernels[kernel] << ' ' << grid.x * grid.y * grid.z << ' ' << block.x << ' ' << shared << ' '
       << reinterpret_cast<uintptr_t>(stream) << ' ' << current << '\n';
  return answer("launch");
}

}  // namespace

extern "C" {

#define CONTROL __attribute__((visibility("default")))
CONTROL void fake_reset(int found) { failures.clear(), told.str(""), current = 0, capability = found; }
CONTROL void fake_fail(const char* call, int status) { failures[call] = static_cast<cudaError_t>(status); }
CONTROL const char* fake_log() { return (text = told.str()).c_str(); }
CONTROL int fake_current() { return current; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(void** kernel, const void* host) { return *kernel = const_cast<void*>(host), cudaSuccess; }
cudaError_t __cudaLaunchKernel(void* kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch(kernel, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch(kernel, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  return launch(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}
cudaError_t cudaPeekAtLastError() { return answer("launch"); }
cudaError_t cudaGetLastError() { return told << "cleared\n", answer("launch"); }
const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaErrorNoKernelImageForDevice ? "cudaErrorNoKernelImageForDevice" : "cudaErrorOfTheTest";
}
const char* cudaGetErrorString(cudaError_t) { return "as the test wanted it"; }
cudaError_t cudaGetDevice(int* device) { return *device = current, answer("cudaGetDevice"); }
cudaError_t cudaSetDevice(int device) {
  if (device > 1) return cudaErrorInvalidDevice;
  return current = device, answer("cudaSetDevice");
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const int most = capability == 80 ? 163 : capability == 90 ? 227 : 99;  // KiB of shared memory a block
  *value = which == cudaDevAttrComputeCapabilityMajor           ? capability / 10
           : which == cudaDevAttrComputeCapabilityMinor         ? capability % 10
           : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? most * 1024
                                                                : 132;
  return answer("cudaDeviceGetAttribute");
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return value > 227 * 1024 ? cudaErrorInvalidValue : answer("cudaFuncSetAttribute");
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  std::memset(found, 0, sizeof *found);
  found->type = address >> 44 == 1 ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  found->device = address >> 44 == 1 ? static_cast<int>(address >> 40 & 15) : -1;
  return answer("cudaPointerGetAttributes");
}
// The only driver call that kernels use; the map itself is not looked at.
CUresult encode_tiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t* sizes, const cuuint64_t*,
                      const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  told << "map " << sizes[1] << ' ' << sizes[0] << ' ' << box[1] << ' ' << box[0] << '\n';
  return static_cast<CUresult>(answer("cuTensorMapEncodeTiled"));
}
#if CUDART_VERSION >= 12050
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
#else
cudaError_t cudaGetDriverEntryPoint(const char* name, void** found, unsigned long long,
                                    cudaDriverEntryPointQueryResult* result) {
#endif
  const bool known = std::string(name) == "cuTensorMapEncodeTiled";
  *found = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return answer("cudaGetDriverEntryPoint");
}
}
