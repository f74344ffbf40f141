/* A CUDA driver on host memory, compiled against the real cuda.h: if agentrt's ctypes signatures, structures or constants
 * differ from the header, this file does not compile or the copies come out wrong. Work runs at once; an event reports
 * "not ready" on its first query. A launch does what the copy kernels do with their table. */
#include <cuda.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

_Static_assert(CUDA_ERROR_INVALID_VALUE == 1 && CUDA_ERROR_NOT_READY == 600, "results");
_Static_assert(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT == 16, "attribute");
_Static_assert(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR == 75 && CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR == 76, "attribute");
_Static_assert(CU_POINTER_ATTRIBUTE_DEVICE_POINTER == 3 && CU_STREAM_NON_BLOCKING == 1, "attribute");
_Static_assert(CU_MEMHOSTALLOC_PORTABLE == 1 && CU_MEMHOSTALLOC_DEVICEMAP == 2 && CU_MEMORYTYPE_UNIFIED == 4, "flags");
_Static_assert(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == 8, "attribute");
_Static_assert(CU_MEMCPY_SRC_ACCESS_ORDER_STREAM == 1 && CU_MEMCPY_SRC_ACCESS_ORDER_ANY == 3, "order");
_Static_assert(CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE == 1, "flag");
_Static_assert(sizeof(CUmemcpyAttributes) == ATTRIBUTES_BYTES && offsetof(CUmemcpyAttributes, flags) == ATTRIBUTES_FLAGS, "layout");
_Static_assert(sizeof(CUDA_MEMCPY2D) == COPY2D_BYTES && offsetof(CUDA_MEMCPY2D, dstDevice) == COPY2D_DST, "layout");
_Static_assert(offsetof(CUDA_MEMCPY2D, srcDevice) == COPY2D_SRC && offsetof(CUDA_MEMCPY2D, Height) == COPY2D_HEIGHT, "layout");

static struct stats { int launches, batches, copies, copies_2d, contexts, grid, threads, shared, max_shared, alive; } stats;
static size_t block_bytes;
static int fail_next;

struct event { int asked; double at; };

struct stats *stub_stats(void) { return &stats; }
void stub_set(size_t bytes, int fail) { block_bytes = bytes; fail_next = fail; }

static CUresult work(void) {
    if (stats.contexts <= 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (fail_next && --fail_next == 0) return CUDA_ERROR_ILLEGAL_ADDRESS;
    return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal + 40; return CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    if (device != 40) return CUDA_ERROR_INVALID_DEVICE;
    strncpy(name, "Stub", length);
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    if (device != 40) return CUDA_ERROR_INVALID_DEVICE;
    *value = which == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132 : which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : 0;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)(size_t)(device + 1); return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext context) { if ((size_t)context != 41) return CUDA_ERROR_INVALID_CONTEXT; stats.contexts++; return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext *context) { *context = (CUcontext)(size_t)41; stats.contexts--; return CUDA_SUCCESS; }
CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return CUDA_SUCCESS; }
CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
    if (flags != CU_STREAM_NON_BLOCKING || priority != -5) return CUDA_ERROR_INVALID_VALUE;
    *stream = (CUstream)(size_t)0x7fff12345678ull;
    return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream stream) { (void)stream; return CUDA_SUCCESS; }
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) { (void)stream; return event && !flags ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { (void)stream; *status = CU_STREAM_CAPTURE_STATUS_NONE; return CUDA_SUCCESS; }
CUresult cuEventCreate(CUevent *event, unsigned flags) {
    (void)flags;
    *event = calloc(1, sizeof(struct event));
    stats.alive++;
    return CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
    struct timespec now;
    (void)stream;
    clock_gettime(CLOCK_MONOTONIC, &now);
    ((struct event *)event)->at = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
    return work();
}
CUresult cuEventQuery(CUevent event) { return ((struct event *)event)->asked++ ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY; }
CUresult cuEventSynchronize(CUevent event) { ((struct event *)event)->asked = 1; return CUDA_SUCCESS; }
#undef cuEventElapsedTime
CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end) {
    *milliseconds = (float)(((struct event *)end)->at - ((struct event *)start)->at);
    return CUDA_SUCCESS;
}
CUresult cuEventDestroy(CUevent event) { free(event); stats.alive--; return CUDA_SUCCESS; }
CUresult cuMemAlloc(CUdeviceptr *address, size_t bytes) { *address = (CUdeviceptr)aligned_alloc(256, (bytes + 255) / 256 * 256); return CUDA_SUCCESS; }
CUresult cuMemFree(CUdeviceptr address) { free((void *)address); return CUDA_SUCCESS; }
CUresult cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
    if (flags != (CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP)) return CUDA_ERROR_INVALID_VALUE;
    *address = aligned_alloc(256, (bytes + 255) / 256 * 256);
    return CUDA_SUCCESS;
}
CUresult cuMemFreeHost(void *address) { free(address); return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr address) {
    if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
    *(CUdeviceptr *)data = address;
    return CUDA_SUCCESS;
}
CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream) {
    CUresult result = work();
    (void)stream;
    if (!result) memmove((void *)dst, (void *)src, bytes), stats.copies++;
    return result;
}
CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D *c, CUstream stream) {
    CUresult result = work();
    (void)stream;
    if (c->srcMemoryType != CU_MEMORYTYPE_UNIFIED || c->dstMemoryType != CU_MEMORYTYPE_UNIFIED || c->srcXInBytes || c->dstY) return CUDA_ERROR_INVALID_VALUE;
    for (size_t row = 0; !result && row < c->Height; row++)
        memmove((char *)c->dstDevice + row * c->dstPitch, (char *)c->srcDevice + row * c->srcPitch, c->WidthInBytes);
    stats.copies_2d++;
    return result;
}
static CUresult batch(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, CUmemcpyAttributes *attrs, size_t *indices, size_t n, CUstream stream) {
    CUresult result = work();
    if (!stream || n != 1 || indices[0] != 0 || attrs->srcAccessOrder != CU_MEMCPY_SRC_ACCESS_ORDER_STREAM || attrs->flags) return CUDA_ERROR_INVALID_VALUE;
    for (size_t i = count; !result && i-- > 0;) memmove((void *)dsts[i], (void *)srcs[i], sizes[i]);
    stats.batches++;
    return result;
}
#ifdef CUDA_12
#undef cuMemcpyBatchAsync
CUresult cuMemcpyBatchAsync(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, CUmemcpyAttributes *attrs, size_t *indices, size_t n, size_t *failed, CUstream stream) {
    *failed = 0;
    return batch(dsts, srcs, sizes, count, attrs, indices, n, stream);
}
#else
CUresult cuMemcpyBatchAsync(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, CUmemcpyAttributes *attrs, size_t *indices, size_t n, CUstream stream) {
    return batch(dsts, srcs, sizes, count, attrs, indices, n, stream);
}
#endif
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    if (memcmp(image, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
    *module = (CUmodule)(size_t)0x5000;
    return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    if ((size_t)module != 0x5000 || strncmp(name, "kv_copy", 7)) return CUDA_ERROR_NOT_FOUND;
    *function = (CUfunction)(size_t)0x6000;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    (void)function;
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) stats.max_shared = value;
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream, void **p, void **extra) {
    CUresult result = work();
    (void)stream;
    if ((size_t)function != 0x6000 || gy != 1 || gz != 1 || by != 1 || bz != 1 || extra) return CUDA_ERROR_INVALID_VALUE;
    const long long *table = *(const long long **)p[0];
    int pairs = *(int *)p[1], buffers = *(int *)p[2];
    long long src_stride = *(long long *)p[3], dst_stride = *(long long *)p[4];
    for (int b = 0; !result && b < buffers; b++)
        for (int i = 0; i < pairs; i++)
            if (table[2 * i] >= 0 && table[2 * i + 1] >= 0)
                memmove((char *)table[2 * pairs + buffers + b] + table[2 * i + 1] * dst_stride, (char *)table[2 * pairs + b] + table[2 * i] * src_stride, block_bytes);
    stats.launches++, stats.grid = gx, stats.threads = bx, stats.shared = shared;
    return result;
}
CUresult cuGetErrorName(CUresult error, const char **name) { *name = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "?"; return CUDA_SUCCESS; }
