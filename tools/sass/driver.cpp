// Takes libcuda's place for what PyTorch loads by name: one device with a live primary context.
#include <cstddef>

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGetCount(int* n) { return *n = 1, 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  if (flags != nullptr) *flags = 0;
  return *active = 1, 0;
}
static int context;
int cuDevicePrimaryCtxRetain(void** c, int) { return *c = &context, 0; }
int cuCtxGetCurrent(void** c) { return *c = &context, 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuGetErrorString(int, const char** text) { return *text = "error of the stand-in driver", 0; }
}
