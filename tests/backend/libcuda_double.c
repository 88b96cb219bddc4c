/* libcuda_double.c - a libcuda.so.1 of the calls that flashrt makes, on host memory.
 *
 * IS: what lets the real cuda.bindings.driver and flashrt's cuda/driver.py run on a machine without
 * a GPU, so that calling conventions (structs, enums, parameter arrays, result tuples) are checked.
 * IS NOT: a GPU; streams run at once; of kernels only `add_one` (and `advance`, of flashrt's own)
 * does anything.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NO_DEVICE = 100,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  NOT_FOUND = 500,
  NOT_READY = 600,
  ILLEGAL_ADDRESS = 700
};
typedef uint64_t Device;
typedef struct {
  int32_t *p;
  int32_t n;
} AddOne; /* the argument block of the only kernel */
typedef struct {
  void *kernel;
  AddOne arguments;
} Node;
typedef struct {
  int n;
  Node nodes[4096];
} Graph;
typedef struct {
  Graph *capturing;
} Stream;

static __thread void *current; /* contexts are per thread */
static int contexts[2], polls, module, add_one, advance, nothing, max_shared, n_modules;
static size_t used, sizes[64];
static void *blocks[64], *mapped; /* the last of mapped host memory */

static const char *option(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value ? value : otherwise;
}

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : atoi(option("DOUBLE_INIT", "0")); }
int cuDriverGetVersion(int *v) {
  *v = atoi(option("DOUBLE_VERSION", "13000"));
  return SUCCESS;
}
int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return ordinal < atoi(option("DOUBLE_DEVICES", "1")) ? SUCCESS : 101;
}
int cuDeviceGetName(char *name, int n, int device) {
  snprintf(name, n, "Double %d", device);
  return SUCCESS;
}
int cuDeviceTotalMem(size_t *n, int device) {
  (void)device;
  *n = 1 << 30;
  return SUCCESS;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  int major = atoi(option("DOUBLE_MAJOR", "9"));
  *value = attribute == 75   ? major
           : attribute == 76 ? 0
           : attribute == 16 ? 132
           : attribute == 18 ? atoi(option("DOUBLE_INTEGRATED", "0"))
           : attribute == 97 ? 232448
                             : -1;
  return *value < 0 ? INVALID_VALUE : SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **c, int device) {
  *c = &contexts[device];
  return SUCCESS;
}
int cuDevicePrimaryCtxRelease(int device) { /* the last user's release destroys it */
  return current == &contexts[device] ? INVALID_CONTEXT : SUCCESS;
}
int cuCtxGetCurrent(void **c) {
  *c = current;
  return SUCCESS;
}
int cuCtxSetCurrent(void *c) {
  current = c;
  return SUCCESS;
}
#define NEED_CONTEXT \
  if (current != &contexts[0] && current != &contexts[1]) return INVALID_CONTEXT

int cuGetErrorString(int error, const char **text) {
  *text = error == OUT_OF_MEMORY     ? "out of memory"
          : error == ILLEGAL_ADDRESS ? "an illegal memory access"
                                     : "an error";
  return SUCCESS;
}
int cuGetErrorName(int error, const char **text) {
  (void)error;
  *text = "CUDA_ERROR";
  return SUCCESS;
}

int cuMemAlloc(Device *p, size_t n) {
  NEED_CONTEXT;
  if (n > (1 << 30) - used) return OUT_OF_MEMORY;
  int i = 0;
  while (blocks[i]) i++;
  blocks[i] = malloc(n), sizes[i] = n, used += n;
  *p = (Device)(uintptr_t)blocks[i];
  return SUCCESS;
}
int cuMemFree(Device p) {
  NEED_CONTEXT;
  int i = 0;
  while (blocks[i] != (void *)(uintptr_t)p)
    if (++i == 64) return INVALID_VALUE;
  used -= sizes[i], blocks[i] = NULL;
  free((void *)(uintptr_t)p);
  return SUCCESS;
}
int cuMemGetInfo(size_t *nfree, size_t *total) {
  NEED_CONTEXT;
  *nfree = (1 << 30) - used;
  *total = 1 << 30;
  return SUCCESS;
}
int cuMemHostAlloc(void **p, size_t n, unsigned flags) {
  NEED_CONTEXT;
  if (flags && flags != 3) return INVALID_VALUE; /* portable and mapped, or neither */
  *p = malloc(n);
  if (flags) mapped = *p;
  return SUCCESS;
}
int cuMemHostGetDevicePointer(Device *p, void *host, unsigned flags) {
  NEED_CONTEXT;
  *p = (Device)(uintptr_t)host;
  return flags || host != mapped ? INVALID_VALUE : SUCCESS;
}
int cuMemFreeHost(void *p) {
  free(p);
  return SUCCESS;
}
int cuMemcpyHtoDAsync(Device d, const void *s, size_t n, Stream *t) {
  (void)t;
  memcpy((void *)(uintptr_t)d, s, n);
  return SUCCESS;
}
typedef struct { /* CUDA_MEMCPY2D */
  size_t src_x, src_y;
  int src_type;
  const char *src_host;
  Device src;
  void *src_array;
  size_t src_pitch, dst_x, dst_y;
  int dst_type;
  char *dst_host;
  Device dst;
  void *dst_array;
  size_t dst_pitch, width, height;
} Copy2D;
int cuMemcpy2DAsync(const Copy2D *c, Stream *t) {
  NEED_CONTEXT;
  (void)t;
  if (c->src_x || c->src_y || c->dst_x || c->dst_y || c->src_type != 1 || c->dst_type != 2 ||
      c->width > c->dst_pitch)
    return INVALID_VALUE;
  for (size_t row = 0; row < c->height; row++)
    memcpy((char *)(uintptr_t)c->dst + row * c->dst_pitch, c->src_host + row * c->src_pitch,
           c->width);
  return SUCCESS;
}
int cuMemcpyDtoHAsync(void *d, Device s, size_t n, Stream *t) {
  (void)t;
  memcpy(d, (void *)(uintptr_t)s, n);
  return SUCCESS;
}
int cuMemcpyDtoDAsync(Device d, Device s, size_t n, Stream *t) {
  (void)t;
  memcpy((void *)(uintptr_t)d, (void *)(uintptr_t)s, n);
  return SUCCESS;
}
int cuMemsetD8Async(Device d, unsigned char byte, size_t n, Stream *t) {
  (void)t;
  memset((void *)(uintptr_t)d, byte, n);
  return SUCCESS;
}
int cuStreamCreate(Stream **t, unsigned flags) {
  NEED_CONTEXT;
  *t = calloc(1, sizeof **t);
  return flags == 1 ? SUCCESS : INVALID_VALUE;
}
int cuStreamDestroy(Stream *t) {
  free(t);
  return SUCCESS;
}
int cuStreamSynchronize(Stream *t) {
  (void)t;
  return atoi(option("DOUBLE_SYNC", "0"));
}
int cuStreamWaitEvent(Stream *t, void *e, unsigned flags) {
  (void)t;
  (void)e;
  return flags ? INVALID_VALUE : SUCCESS;
}
int cuEventCreate(void **e, unsigned flags) {
  *e = malloc(1);
  return flags <= 2 ? SUCCESS : INVALID_VALUE;
}
int cuEventDestroy(void *e) {
  free(e);
  return SUCCESS;
}
int cuEventRecord(void *e, Stream *t) {
  (void)e;
  (void)t;
  polls = 1;
  return SUCCESS;
}
int cuEventSynchronize(void *e) {
  (void)e;
  return SUCCESS;
}
int cuEventQuery(void *e) {
  (void)e;
  return polls-- > 0 ? NOT_READY : SUCCESS;
}
int cuEventElapsedTime(float *ms, void *a, void *b) {
  (void)a;
  (void)b;
  *ms = 1.5f;
  return SUCCESS;
}

int cuModuleLoadData(void **m, const void *image) {
  NEED_CONTEXT;
  *m = &module;
  n_modules++;
  return memcmp(image, "cubin", 5) && memcmp(image,
                                             "\x7f"
                                             "ELF",
                                             4)
             ? INVALID_IMAGE
             : SUCCESS;
}
int cuModuleUnload(void *m) {
  NEED_CONTEXT;
  return m == &module && n_modules-- > 0 ? SUCCESS : INVALID_VALUE;
}
int cuModuleGetFunction(void **f, void *m, const char *name) {
  *f = !strcmp(name, "add_one") ? &add_one : !strcmp(name, "advance") ? &advance : &nothing;
  return m == &module && strcmp(name, "missing") ? SUCCESS : NOT_FOUND;
}
int cuFuncSetAttribute(void *f, int attribute, int value) {
  if (f != &add_one && f != &nothing && f != &advance) return INVALID_VALUE;
  if (attribute == 9) return value == 100 ? SUCCESS : INVALID_VALUE; /* one value for all */
  if (attribute != 8 || value > 232448) return INVALID_VALUE;
  max_shared = value;
  return SUCCESS;
}
static void run(const Node *node) {
  const AddOne *a = &node->arguments;
  if (node->kernel == &add_one)
    for (int i = 0; i < a->n; i++) a->p[i]++;
  if (node->kernel == &advance) a->p[0] += a->p[1];
}
static int launch(void *f, const unsigned *geometry, unsigned shared, Stream *t, void **params) {
  NEED_CONTEXT;
  if (shared > 49152 && (int)shared > max_shared) return INVALID_VALUE;
  Node node = {.kernel = f};
  memcpy(&node.arguments, params[0], f == &add_one ? sizeof node.arguments : sizeof(void *));
  for (int i = 0; i < 6; i++) /* add_one: grid 1 2 3, block 4 5 6 */
    if (f == &add_one && geometry[i] != (unsigned)(i + 1)) return INVALID_VALUE;
  if (t->capturing) t->capturing->nodes[t->capturing->n++] = node;
  else run(&node);
  return SUCCESS;
}
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, Stream *t, void **params, void **extra) {
  if (extra) return INVALID_VALUE;
  return launch(f, (unsigned[]){gx, gy, gz, bx, by, bz}, shared, t, params);
}
typedef struct {
  int id;
  char pad[4];
  int value;
  char rest[60];
} LaunchAttribute;
typedef struct {
  unsigned geometry[6], shared;
  Stream *stream;
  LaunchAttribute *attributes;
  unsigned n;
} LaunchConfig;
int cuLaunchKernelEx(const LaunchConfig *c, void *f, void **params, void **extra) {
  if (extra || c->n != 1 || c->attributes[0].id != 6 || c->attributes[0].value != 1)
    return INVALID_VALUE;
  return launch(f, c->geometry, c->shared, c->stream, params);
}

int cuStreamBeginCapture(Stream *t, int mode) {
  t->capturing = calloc(1, sizeof(Graph));
  return mode == 1 ? SUCCESS : INVALID_VALUE;
}
int cuStreamEndCapture(Stream *t, Graph **g) {
  *g = t->capturing;
  t->capturing = NULL;
  return SUCCESS;
}
int cuGraphInstantiateWithFlags(Graph **x, Graph *g, unsigned long long flags) {
  *x = malloc(sizeof **x);
  **x = *g;
  return flags ? INVALID_VALUE : SUCCESS;
}
int cuGraphInstantiate(Graph **x, Graph *g, unsigned long long flags) {
  return cuGraphInstantiateWithFlags(x, g, flags);
}
int cuGraphUpload(Graph *x, Stream *t) {
  (void)x;
  (void)t;
  return SUCCESS;
}
int cuGraphLaunch(Graph *x, Stream *t) {
  NEED_CONTEXT;
  (void)t;
  for (int i = 0; i < x->n; i++) run(&x->nodes[i]);
  return SUCCESS;
}
int cuGraphDebugDotPrint(Graph *g, const char *path, unsigned flags) {
  FILE *file = fopen(path, "w");
  fprintf(file, "digraph { /* %d nodes, flags %u */ }\n", g->n, flags);
  return fclose(file);
}
int cuGraphExecDestroy(Graph *x) {
  free(x);
  return SUCCESS;
}
int cuGraphDestroy(Graph *g) {
  free(g);
  return SUCCESS;
}

/* NVRTC looks for libcuda too, to ask it for undocumented tables; it takes no for an answer. */
int cuGetExportTable(const void **table, const void *id) {
  (void)table;
  (void)id;
  return NOT_FOUND;
}

/* cuda.bindings finds everything through this one. */
int cuGetProcAddress_v2(const char *name, void **p, int version, uint64_t flags, int *status) {
  (void)version;
  (void)flags;
  Dl_info self;
  dladdr((void *)cuInit, &self);
  void *library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  *p = strcmp(name, "cuGetProcAddress") ? dlsym(library, name) : (void *)cuGetProcAddress_v2;
  if (status) *status = *p ? 0 : 1;
  return *p ? SUCCESS : NOT_FOUND;
}
int cuGetProcAddress(const char *name, void **p, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, p, version, flags, NULL);
}
