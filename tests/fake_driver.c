// A CUDA driver without a GPU: what Triton calls of it to load and launch a kernel, each of which succeeds.
// It hands every launch to a callback. See fake_driver.py.

#include <cuda.h>

// shape: grid, threads, shared memory, number of attributes, and id and value of each.
typedef void (*record_t)(void *function, const unsigned *shape, void **parameters, void *stream);

static record_t record;
static long handle = 1000;

void call_at_launches(record_t callback) { record = callback; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  unsigned shape[14] = {config->gridDimX,  config->gridDimY,       config->gridDimZ,
                        config->blockDimX, config->sharedMemBytes, config->numAttrs};
  for (unsigned i = 0; i < config->numAttrs && i < 4; i++) {
    shape[6 + 2 * i] = config->attrs[i].id;
    shape[7 + 2 * i] = config->attrs[i].value.programmaticStreamSerializationAllowed;
  }
  if (record)
    record((void *)function, shape, parameters, (void *)config->hStream);
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

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
