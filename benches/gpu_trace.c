// Timeline of a CUDA program through CUPTI. The driver loads this library where CUDA_INJECTION64_PATH
// names it; benches/gpu_trace.py builds and uses it.
//
// Writes one line for every kernel, copy and fill to the file that TRACE_OUT names:
// name,start,end with times in nanoseconds.
#include <cupti.h>
#include <stdio.h>
#include <stdlib.h>

enum { BUFFER = 8 << 20 };

static FILE *out;

static void CUPTIAPI request(uint8_t **buffer, size_t *size, size_t *records) {
  *size = BUFFER;
  *buffer = aligned_alloc(8, BUFFER);
  *records = 0;
}

static void line(const char *name, uint64_t start, uint64_t end) {
  fprintf(out, "%.80s,%llu,%llu\n", name, (unsigned long long)start, (unsigned long long)end);
}

static void CUPTIAPI complete(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size,
                              size_t valid) {
  (void)context, (void)stream, (void)size;
  CUpti_Activity *record = NULL;
  while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
      // The fields read here have kept their places since version 4 of the record.
      const CUpti_ActivityKernel4 *kernel = (const CUpti_ActivityKernel4 *)record;
      line(kernel->name ? kernel->name : "?", kernel->start, kernel->end);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      const CUpti_ActivityMemcpy *copy = (const CUpti_ActivityMemcpy *)record;
      line("copy", copy->start, copy->end);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
      const CUpti_ActivityMemset *fill = (const CUpti_ActivityMemset *)record;
      line("fill", fill->start, fill->end);
    }
  }
  free(buffer);
}

static void finish(void) {
  cuptiActivityFlushAll(1);
  fflush(out);
}

int InitializeInjection(void) {
  const char *path = getenv("TRACE_OUT");
  out = fopen(path ? path : "trace.csv", "w");
  if (!out) return 0;
  cuptiActivityRegisterCallbacks(request, complete);
  cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
  cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
  cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET);
  atexit(finish);
  return 1;
}
