// A CUDA driver without a GPU: what Triton calls of it to load and launch a kernel, each of which succeeds.
// It hands every launch to a callback. See fake_driver.py.

#include <cuda.h>

typedef void (*launched_t)(void *function, const unsigned *shape, void **parameters, void *stream);

static launched_t launched;
static long handle = 1000;

void on_launch(launched_t callback) { launched = callback; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  unsigned shape[12] = {config->gridDimX,  config->gridDimY,       config->gridDimZ,
                        config->blockDimX, config->sharedMemBytes, config->numAttrs};
  for (unsigned i = 0; i < config->numAttrs && i < 3; i++) {
    shape[6 + 2 * i] = config->attrs[i].id;
    shape[7 + 2 * i] = config->attrs[i].value.programmaticStreamSerializationAllowed;
  }
  if (launched)
    launched((void *)function, shape, parameters, (void *)config->hStream);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)(handle += 16);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)(handle += 16);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 227 * 1024 : 1 << 16;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "no error";
  return CUDA_SUCCESS;
}

#define SUCCEEDS(name, ...)                                                                                 \
  CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }

SUCCEEDS(cuCtxSetCurrent, CUcontext context)
SUCCEEDS(cuDevicePrimaryCtxRetain, CUcontext *context, CUdevice device)
SUCCEEDS(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
SUCCEEDS(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
