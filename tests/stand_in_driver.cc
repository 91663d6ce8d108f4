// A CUDA driver without a GPU. It writes the calls of hf_kvquant/backends/gpu.py and cuda-core as
// lines to the file that STAND_IN_TRACE names, and refuses all others. It is built as libcuda.so.1.
//
// Contexts are 0x1000 + device, functions 0x4000 + device. A launch without a context fails like
// that of a thread which has not called the runtime; a launch on stream 0xbad always fails. Code
// that begins with "too new" is not loaded.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cstring>
#include <string>

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidImage = 200, kInvalidContext = 201,
              kNotSupported = 801;
uintptr_t current = 0;

FILE* trace() {
  static FILE* file = getenv("STAND_IN_TRACE") ? fopen(getenv("STAND_IN_TRACE"), "w") : nullptr;
  return file;
}
template <class... T>
void note(const char* format, T... values) {
  if (trace() == nullptr) return;
  fprintf(trace(), format, values...);
  fputc('\n', trace());
  fflush(trace());
}

int refused() { return kNotSupported; }

}  // namespace

extern "C" {
int cuInit(unsigned) { return kSuccess; }
int cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
int cuDeviceGetCount(int* count) { return *count = 2, kSuccess; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, kSuccess; }
int cuDeviceGetAttribute(int* value, int, int) { return *value = 0, kSuccess; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  return *context = reinterpret_cast<void*>(uintptr_t(0x1000 + device)), kSuccess;
}
int cuDevicePrimaryCtxRelease_v2(int) { return kSuccess; }
int cuCtxGetCurrent(void** context) {
  return *context = reinterpret_cast<void*>(current), kSuccess;
}
int cuCtxSetCurrent(void* context) {
  current = reinterpret_cast<uintptr_t>(context);
  note("context %lx", current);
  return kSuccess;
}
int cuCtxGetDevice(int* device) { return *device = int(current - 0x1000), kSuccess; }
int cuLibraryLoadData(void** library, const void* code, void*, void*, unsigned, void*, void*,
                      unsigned) {
  if (std::strncmp(static_cast<const char*>(code), "too new", 7) == 0) return kInvalidImage;
  return *library = reinterpret_cast<void*>(0x2000), kSuccess;
}
int cuLibraryUnload(void*) { return note("unload"), kSuccess; }
int cuLibraryGetKernel(void** kernel, void*, const char* name) {
  note("kernel %s", name);
  return *kernel = reinterpret_cast<void*>(0x3000), kSuccess;
}
int cuKernelGetFunction(void** function, void*) {
  return *function = reinterpret_cast<void*>(0x3000 + current), kSuccess;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  note("load %lx, attribute %d", reinterpret_cast<uintptr_t>(function), attribute);
  return *value = 32, kSuccess;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  note("set %lx, attribute %d to %d", reinterpret_cast<uintptr_t>(function), attribute, value);
  return kSuccess;
}
int cuGetErrorName(int, const char** name) { return *name = "A_STAND_IN_ERROR", kSuccess; }
int cuGetErrorString(int, const char** text) { return *text = "refused", kSuccess; }

// The first words of both parameters: a struct by value, and an address.
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned,
                   unsigned, unsigned shared, void* stream, void** parameters, void**) {
  const auto* first = static_cast<const unsigned long*>(parameters[0]);
  const auto* second = static_cast<const unsigned long*>(parameters[1]);
  if (current == 0) return note("launch without a context"), kInvalidContext;
  if (stream == reinterpret_cast<void*>(0xbad)) return kInvalidValue;
  note("launch %lx grid %u %u %u threads %u shared %u stream %lx: %lx %lx, %lx",
       reinterpret_cast<uintptr_t>(function), x, y, z, threads, shared,
       reinterpret_cast<uintptr_t>(stream), first[0], first[1], second[0]);
  return kSuccess;
}

// Its attributes are written behind the launch: their numbers, and what they hold.
struct Attribute {
  int id;
  char padding[4];
  int value;
  char rest[60];
};
static_assert(sizeof(Attribute) == 72, "as in cuda.h");
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  const Attribute* attributes;
  unsigned number;
};
int cuLaunchKernelEx(const Config* config, void* function, void** parameters, void** extra) {
  const auto& [x, y, z] = config->grid;
  const auto& [threads, one, other] = config->block;
  const int status = cuLaunchKernel(function, x, y, z, threads, one, other, config->shared,
                                    config->stream, parameters, extra);
  for (unsigned i = 0; i < config->number && status == kSuccess; ++i) {
    note("with attribute %d of %d", config->attributes[i].id, config->attributes[i].value);
  }
  return status;
}

int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
  static void* self = dlopen("libcuda.so.1", RTLD_LAZY);
  *function = dlsym(self, (std::string(name) + "_v2").c_str());
  if (*function == nullptr) *function = dlsym(self, name);
  if (*function == nullptr) *function = reinterpret_cast<void*>(refused);
  if (status != nullptr) *status = 0;
  return kSuccess;
}
int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
}
