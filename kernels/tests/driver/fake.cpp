// A stand-in for CUDA's driver and cuBLASLt, for tests without a GPU: the same functions over host memory. What is enqueued runs
// as late as the driver would be allowed to run it, when somebody waits for it, so that a buffer that is used again too early
// shows. Recording refuses what the driver refuses. Everything is counted; any function can be made to fail.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
using u32 = unsigned;
using u64 = unsigned long long;

namespace {

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500,
       CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_UNMATCHED = 903 };
constexpr size_t MEMORY = size_t{1} << 30;

struct Stream;
struct Event {
  Stream* stream = nullptr;  // of the last record
  size_t position = 0;
  bool timed = false;
};
struct Graph {
  std::vector<std::function<void()>> work;
};
struct Stream {
  std::vector<std::function<void()>> work;
  size_t done = 0;
  Graph* recording = nullptr;
  bool broken = false;
  u32 mode = 0;
  std::thread::id thread;
};
struct Function {
  std::string name;
  bool loaded = false;
  int shared = 0;
};
struct Module {
  std::vector<Function*> functions;
};

std::recursive_mutex lock;
std::map<std::string, long> calls, live;
std::map<std::string, std::pair<u32, long>> failures;  // status, calls before it
u32 lost = 0;
int contexts = 0;
size_t taken = 0;
std::map<u64, size_t> memory;
std::set<void*> pinned;
Stream* recorder = nullptr;
int used = -1, asked_rows = 0, cuda_version = 13000;
thread_local void* current = nullptr;
int the_context;
int the_handle;

// Counts the call; what it fails with.
u32 enter(const char* name, bool in_context) {
  calls[name]++;
  if (lost) return lost;
  auto found = failures.find(name);
  if (found != failures.end() && found->second.second-- == 0) {
    u32 status = found->second.first;
    failures.erase(found);
    if (status >= 700) lost = status == 901 ? 0 : status;
    return status;
  }
  if (in_context && (current != &the_context || !contexts)) return INVALID_CONTEXT;
  return OK;
}
#define ENTER_AS(in_context)                         \
  std::lock_guard<std::recursive_mutex> guard(lock); \
  if (u32 status = enter(__func__, in_context)) return status
#define ENTER() ENTER_AS(true)
#define ENTER_ANYWHERE() ENTER_AS(false)

void run(Stream* stream, size_t until) {
  while (stream->done < until) stream->work[stream->done++]();
}
u32 enqueue(Stream* stream, std::function<void()> work) {
  (stream->recording ? stream->recording->work : stream->work).push_back(std::move(work));
  return OK;
}
bool inside(u64 at, size_t bytes) {
  auto after = memory.upper_bound(at);
  if (after == memory.begin()) return false;
  --after;
  return at + bytes <= after->first + after->second;
}
// What allocates or frees breaks a recording of the same thread, unless the thread has said that it knows.
u32 unsafe_call() {
  if (recorder && recorder->mode != 2 && recorder->thread == std::this_thread::get_id()) {
    recorder->broken = true;
    return CAPTURE_UNSUPPORTED;
  }
  return OK;
}

}  // namespace

// What tests ask and set.
API long fake_live(const char* what) { return live[what]; }
API long fake_calls(const char* function) { return calls[function]; }
API void fake_fail(const char* function, u32 status, long after) { failures[function] = {status, after}; }
API void fake_version(int version) { cuda_version = version; }
API int fake_algorithm() { return used; }
API int fake_asked_rows() { return asked_rows; }

// What a place in device memory holds by now.
API u32 fake_number(u64 at) { return *reinterpret_cast<u32*>(at); }

API u32 cuGetErrorName(u32 status, const char** text) {
  static const std::map<u32, const char*> names = {{1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"},
      {100, "CUDA_ERROR_NO_DEVICE"}, {101, "CUDA_ERROR_INVALID_DEVICE"}, {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
      {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"}};
  auto found = names.find(status);
  *text = found == names.end() ? nullptr : found->second;
  return found == names.end() ? INVALID_VALUE : OK;
}
API u32 cuGetErrorString(u32 status, const char** text) {
  *text = "as told by the driver";
  const char* name;
  return cuGetErrorName(status, &name);
}
API u32 cuInit(u32) { ENTER_ANYWHERE(); return OK; }
API u32 cuDriverGetVersion(int* version) {
  ENTER_ANYWHERE();
  *version = cuda_version;
  return OK;
}
API u32 cuDeviceGetCount(int* count) { ENTER_ANYWHERE(); *count = 1; return OK; }
API u32 cuDeviceGet(int* device, int ordinal) {
  ENTER_ANYWHERE();
  *device = 40;
  return ordinal == 0 ? OK : 101;
}
API u32 cuDeviceGetName(char* name, int room, int) { ENTER_ANYWHERE(); strncpy(name, "Fake H200", room); return OK; }
API u32 cuDeviceGetAttribute(int* value, u32 which, int device) {
  ENTER_ANYWHERE();
  if (device != 40) return 101;
  static const std::map<u32, int> values = {{75, 9}, {76, 0}, {16, 132}, {97, 232448}};
  *value = values.at(which);
  return OK;
}
API u32 cuDeviceTotalMem_v2(size_t* bytes, int) { ENTER_ANYWHERE(); *bytes = MEMORY; return OK; }
API u32 cuDevicePrimaryCtxRetain(void** context, int) {
  ENTER_ANYWHERE();
  contexts++;
  live["contexts"]++;
  *context = &the_context;
  return OK;
}
API u32 cuDevicePrimaryCtxRelease_v2(int) {
  ENTER_ANYWHERE();
  contexts--;
  live["contexts"]--;
  return OK;
}
API u32 cuCtxSetCurrent(void* context) { ENTER_ANYWHERE(); current = context; return OK; }

API u32 cuStreamCreate(Stream** stream, u32 flags) {
  ENTER();
  if (flags != 1) return INVALID_VALUE;
  *stream = new Stream;
  live["streams"]++;
  return OK;
}
API u32 cuStreamDestroy_v2(Stream* stream) { ENTER(); live["streams"]--; delete stream; return OK; }
API u32 cuStreamSynchronize(Stream* stream) {
  ENTER();
  if (stream->recording) {
    stream->broken = true;
    return CAPTURE_UNSUPPORTED;
  }
  run(stream, stream->work.size());
  return OK;
}
API u32 cuStreamWaitEvent(Stream* stream, Event* event, u32) {
  ENTER();
  if (stream->recording || (event->stream && event->stream->recording)) return 905;
  Stream* other = event->stream;
  size_t position = event->position;
  return enqueue(stream, [=] { if (other) run(other, position); });
}
API u32 cuStreamBeginCapture_v2(Stream* stream, u32 mode) {
  ENTER();
  if (stream->recording) return INVALID_VALUE;
  stream->recording = new Graph;
  stream->broken = false;
  stream->mode = mode;
  stream->thread = std::this_thread::get_id();
  recorder = stream;
  return OK;
}
API u32 cuStreamEndCapture(Stream* stream, Graph** graph) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  *graph = nullptr;
  if (!stream->recording) return CAPTURE_UNMATCHED;
  // However it goes, the recording is over.
  Graph* recorded = std::exchange(stream->recording, nullptr);
  recorder = nullptr;
  u32 status = enter(__func__, true);
  if (!status && stream->thread != std::this_thread::get_id()) status = 908;
  if (!status && stream->broken) status = CAPTURE_INVALIDATED;
  if (status) {
    delete recorded;
    return status;
  }
  *graph = recorded;
  live["graphs"]++;
  return OK;
}
API u32 cuThreadExchangeStreamCaptureMode(u32* mode) {
  ENTER();
  if (recorder) std::swap(*mode, recorder->mode);
  return OK;
}
API u32 cuGraphInstantiateWithFlags(Graph** ready, Graph* graph, u64) {
  ENTER();
  *ready = new Graph(*graph);
  live["ready graphs"]++;
  return OK;
}
API u32 cuGraphUpload(Graph*, Stream*) { ENTER(); return OK; }
API u32 cuGraphLaunch(Graph* graph, Stream* stream) {
  ENTER();
  if (stream->recording) return CAPTURE_UNSUPPORTED;
  for (auto& work : graph->work) stream->work.push_back(work);
  return OK;
}
API u32 cuGraphExecDestroy(Graph* graph) { ENTER(); live["ready graphs"]--; delete graph; return OK; }
API u32 cuGraphDestroy(Graph* graph) { ENTER(); live["graphs"]--; delete graph; return OK; }

API u32 cuEventCreate(Event** event, u32 flags) {
  ENTER();
  if (flags != 2 && flags != 0) return INVALID_VALUE;
  *event = new Event;
  (*event)->timed = flags == 0;
  live["events"]++;
  return OK;
}
API u32 cuEventRecord(Event* event, Stream* stream) {
  ENTER();
  event->stream = stream;
  event->position = stream->work.size();
  return OK;
}
API u32 cuEventSynchronize(Event* event) {
  ENTER();
  if (event->stream) run(event->stream, event->position);
  return OK;
}
// A millisecond for each piece of work between them.
API u32 cuEventElapsedTime(float* milliseconds, Event* from, Event* to) {
  ENTER();
  if (!from->timed || !to->timed || !from->stream || from->stream != to->stream) return INVALID_HANDLE;
  if (to->position > to->stream->done) return 600;
  *milliseconds = static_cast<float>(to->position) - static_cast<float>(from->position);
  return OK;
}
API u32 cuEventDestroy_v2(Event* event) { ENTER(); live["events"]--; delete event; return OK; }

API u32 cuMemGetInfo_v2(size_t* free, size_t* total) { ENTER(); *free = MEMORY - taken; *total = MEMORY; return OK; }
API u32 cuMemAlloc_v2(u64* address, size_t bytes) {
  ENTER();
  if (u32 status = unsafe_call()) return status;
  if (bytes == 0) return INVALID_VALUE;
  if (bytes > MEMORY - taken) return OUT_OF_MEMORY;
  *address = reinterpret_cast<u64>(aligned_alloc(256, (bytes + 255) / 256 * 256));
  memset(reinterpret_cast<void*>(*address), 0xff, bytes);
  memory[*address] = bytes;
  taken += bytes;
  live["memory"]++;
  return OK;
}
API u32 cuMemFree_v2(u64 address) {
  ENTER();
  if (u32 status = unsafe_call()) return status;
  auto found = memory.find(address);
  if (found == memory.end()) return INVALID_VALUE;
  taken -= found->second;
  memory.erase(found);
  free(reinterpret_cast<void*>(address));
  live["memory"]--;
  return OK;
}
API u32 cuMemHostAlloc(void** start, size_t bytes, u32) {
  ENTER();
  pinned.insert(*start = malloc(bytes));
  live["pinned"]++;
  return OK;
}
API u32 cuMemFreeHost(void* start) {
  ENTER();
  if (!pinned.erase(start)) return INVALID_VALUE;
  free(start);
  live["pinned"]--;
  return OK;
}
API u32 cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t bytes, Stream* stream) {
  ENTER();
  if (!inside(to, bytes)) return INVALID_VALUE;
  return enqueue(stream, [=] { memcpy(reinterpret_cast<void*>(to), from, bytes); });
}
API u32 cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t bytes, Stream* stream) {
  ENTER();
  if (!inside(from, bytes)) return INVALID_VALUE;
  return enqueue(stream, [=] { memcpy(to, reinterpret_cast<void*>(from), bytes); });
}
API u32 cuMemsetD8Async(u64 at, unsigned char value, size_t bytes, Stream* stream) {
  ENTER();
  if (!inside(at, bytes)) return INVALID_VALUE;
  return enqueue(stream, [=] { memset(reinterpret_cast<void*>(at), value, bytes); });
}

// Kernels are found by the names of their code sections; there is one way to run them all: Params { u64 out; u32 count, value; }
// fills `count` numbers with `value` more than they were.
API u32 cuModuleLoadData(Module** module, const char* image) {
  ENTER();
  if (memcmp(image, "\x7f" "ELF", 4)) return 200;
  u64 sections;
  memcpy(&sections, image + 40, 8);
  unsigned short size, count, names;
  memcpy(&size, image + 58, 2);
  memcpy(&count, image + 60, 2);
  memcpy(&names, image + 62, 2);
  auto field = [&](unsigned section, size_t offset, auto& value) {
    memcpy(&value, image + sections + size_t{section} * size + offset, sizeof(value));
  };
  u64 texts;
  field(names, 24, texts);
  *module = new Module;
  for (unsigned section = 0; section < count; section++) {
    u32 name;
    field(section, 0, name);
    const char* text = image + texts + name;
    if (!strncmp(text, ".text.", 6)) (*module)->functions.push_back(new Function{text + 6});
  }
  live["modules"]++;
  return OK;
}
API u32 cuModuleUnload(Module* module) { ENTER(); live["modules"]--; delete module; return OK; }
API u32 cuModuleGetFunctionCount(u32* count, Module* module) {
  ENTER();
  *count = module->functions.size();
  return OK;
}
API u32 cuModuleEnumerateFunctions(Function** functions, u32 count, Module* module) {
  ENTER();
  for (u32 i = 0; i < count; i++) functions[i] = module->functions.at(i);
  return OK;
}
API u32 cuFuncGetName(const char** name, Function* function) { ENTER(); *name = function->name.c_str(); return OK; }
API u32 cuFuncLoad(Function* function) { ENTER(); function->loaded = true; return OK; }
API u32 cuFuncGetParamInfo(Function* function, size_t index, size_t* offset, size_t* size) {
  ENTER();
  if (index > (function->name == "two_arguments" ? 1 : 0)) return INVALID_VALUE;
  *offset = 16 * index;
  *size = 16;
  return OK;
}
API u32 cuFuncGetAttribute(int* value, u32 which, Function*) {
  ENTER();
  *value = 1024;
  return which == 1 ? OK : INVALID_VALUE;
}
API u32 cuFuncSetAttribute(Function* function, u32 which, int value) {
  ENTER();
  function->shared = value;
  return which == 8 ? OK : INVALID_VALUE;
}
API u32 cuLaunchKernel(Function* function, u32 x, u32 y, u32 z, u32 tx, u32 ty, u32 tz, u32 shared, Stream* stream,
                       void** params, void** extra) {
  ENTER();
  if (!function->loaded || !x || !y || z != 1 || !tx || ty != 1 || tz != 1 || extra) return INVALID_VALUE;
  if (static_cast<int>(shared) > function->shared) return INVALID_VALUE;
  struct { u64 out; u32 count, value; } p;
  memcpy(&p, params[0], sizeof(p));
  if (!inside(p.out, p.count * 4)) return lost = 700;
  return enqueue(stream, [=] {
    for (u32 i = 0; i < p.count; i++) reinterpret_cast<u32*>(p.out)[i] += p.value;
  });
}

// cuBLASLt. Matrices are by columns, as documented.
struct Layout { u32 type; u64 rows, columns; long long stride; };
struct Product { bool transposed = false; };
struct Wanted { u32 reductions = 7; size_t workspace = 0; u32 alignment = 256; };
struct Answer { u64 algorithm[8]; size_t workspace; u32 state; float waves; int reserved[4]; };

// Best first: split in place; parts by the number of tiles; split in f32; too large a workspace; not every number of rows; plain.
enum { IN_PLACE, BY_TILES, SPLIT, LARGE, EVEN_ROWS, PLAIN, ALGORITHMS };

API size_t cublasLtGetVersion() { return 130100; }
API u32 cublasLtCreate(void** handle) { ENTER(); *handle = &the_handle; live["handles"]++; return OK; }
API u32 cublasLtDestroy(void*) { ENTER(); live["handles"]--; return OK; }
API u32 cublasLtMatmulDescCreate(Product** product, u32 compute, u32 scale) {
  ENTER_ANYWHERE();
  if (compute != 68 || scale != 0) return 7;
  *product = new Product;
  live["descriptors"]++;
  return OK;
}
API u32 cublasLtMatmulDescDestroy(Product* product) { live["descriptors"]--; delete product; return OK; }
API u32 cublasLtMatmulDescSetAttribute(Product* product, u32 which, const void* value, size_t bytes) {
  ENTER_ANYWHERE();
  if (which != 3 || bytes != 4) return 7;
  product->transposed = *static_cast<const int*>(value) == 1;
  return OK;
}
API u32 cublasLtMatrixLayoutCreate(Layout** layout, u32 type, u64 rows, u64 columns, long long stride) {
  ENTER_ANYWHERE();
  *layout = new Layout{type, rows, columns, stride};
  live["descriptors"]++;
  return OK;
}
API u32 cublasLtMatrixLayoutDestroy(Layout* layout) { live["descriptors"]--; delete layout; return OK; }
API u32 cublasLtMatmulPreferenceCreate(Wanted** wanted) { *wanted = new Wanted; live["descriptors"]++; return OK; }
API u32 cublasLtMatmulPreferenceDestroy(Wanted* wanted) { live["descriptors"]--; delete wanted; return OK; }
API u32 cublasLtMatmulPreferenceSetAttribute(Wanted* wanted, u32 which, const void* value, size_t bytes) {
  ENTER_ANYWHERE();
  if (bytes != (which == 1 ? 8 : 4)) return 7;
  if (which == 1) memcpy(&wanted->workspace, value, 8);
  if (which == 3) memcpy(&wanted->reductions, value, 4);
  if (which >= 5 && which <= 8) memcpy(&wanted->alignment, value, 4);
  return OK;
}
API u32 cublasLtMatmulAlgoGetHeuristic(void*, Product*, Layout*, Layout* x, Layout*, Layout*, Wanted* wanted, int room,
                                       Answer* answers, int* count) {
  ENTER();
  asked_rows = x->columns;
  if (wanted->workspace != 32 << 20 || wanted->alignment > 16) return 7;
  *count = 0;
  for (int i = 0; i < ALGORITHMS && *count < room; i++) {
    if (i == IN_PLACE && !(wanted->reductions & 1)) continue;
    if (i == SPLIT && !(wanted->reductions & 2)) continue;
    Answer& answer = answers[(*count)++];
    answer = {};
    answer.algorithm[0] = i;
  }
  return OK;
}
API u32 cublasLtMatmulAlgoCheck(void*, Product*, Layout*, Layout* x, Layout*, Layout*, const u64* algorithm,
                                Answer* answer) {
  ENTER();
  answer->workspace = *algorithm == LARGE ? (32 << 20) + 1 : 0;
  return *algorithm == EVEN_ROWS && x->columns % 2 ? 15 : OK;
}
API u32 cublasLtMatmulAlgoConfigGetAttribute(const u64* algorithm, u32 which, void* value, size_t bytes, size_t*) {
  ENTER_ANYWHERE();
  static const int parts[] = {4, -1, 4, 1, 1, 1}, reductions[] = {1, 0, 2, 0, 0, 0};
  if (bytes != 4 || (which != 2 && which != 3)) return 7;
  memcpy(value, &(which == 2 ? parts : reductions)[*algorithm], 4);
  return OK;
}
static float load(const void* from, u64 index, u32 type) {
  if (type == 0) return static_cast<const float*>(from)[index];
  u32 bits = u32{static_cast<const unsigned short*>(from)[index]} << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
API u32 cublasLtMatmul(void* handle, Product* product, const float* alpha, const void* a, Layout* la, const void* b,
                       Layout* lb, const float* beta, const void* c, Layout*, void* d, Layout* ld, const u64* algorithm,
                       void* workspace, size_t workspace_bytes, Stream* stream) {
  ENTER();
  if (handle != &the_handle || *alpha != 1 || *beta != 0 || c != d || ld->type != 0 || la->type != lb->type) return 7;
  if (!inside(reinterpret_cast<u64>(workspace), workspace_bytes)) return 7;
  // Loads its kernel when it is first used.
  if (unsafe_call()) return 13;
  Layout A = *la, B = *lb, D = *ld;
  bool transposed = product->transposed;
  u64 m = transposed ? A.columns : A.rows, k = transposed ? A.rows : A.columns;
  if (k != B.rows || m != D.rows || B.columns != D.columns) return 7;
  used = *algorithm;
  return enqueue(stream, [=] {
    for (u64 i = 0; i < m; i++) {
      for (u64 j = 0; j < B.columns; j++) {
        float sum = 0;
        for (u64 l = 0; l < k; l++) {
          sum += load(a, transposed ? l + i * A.stride : i + l * A.stride, A.type) * load(b, l + j * B.stride, B.type);
        }
        static_cast<float*>(d)[i + j * D.stride] = sum;
      }
    }
  });
}
