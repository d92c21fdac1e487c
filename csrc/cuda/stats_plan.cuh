// How layer_stats splits its work; the emulator plans as the launcher does. The split of a layer
// depends on its own shape alone, hence so do the bits of its results.
#pragma once

#include "table.cuh"

namespace psap {

constexpr int kStatsThreads = 256;
// Filters up to here get a warp each or less; longer ones a block for every kStatsPiece elements,
// so that a lane never adds more than 130 terms before its sums go to double.
constexpr int64_t kWarpLength = 2048;
constexpr int64_t kStatsPiece = 32768;

// One layer; or, behind all of those, the input channels of one, whose layout has the channels in
// its first place. 64 bytes: 60 layers are an argument of 4 KB.
struct StatsJob {
  const void* w;
  const void* g;
  int64_t w_stride, g_stride;  // of filters
  int64_t first_output;        // place of the first filter (input channel) in the outputs
  int32_t filters, length;     // length: elements of a filter (of a kernel [kh, kw])
  int32_t first_block;
  int32_t pieces;  // blocks of a filter; 1 for all but very long ones
  union {
    int32_t first_split;  // with pieces > 1: number of such filters in the layers before
    int32_t inputs;       // channels
  };
  uint32_t dtype : 2, log_threads : 4;  // 2^log_threads threads have a filter
  int32_t layout : 26;                  // -1: one dense run
};
static_assert(sizeof(StatsJob) == 64, "see above");

struct StatsPlan {
  Plan<StatsJob> plan;
  int64_t filters = 0, inputs = 0;  // of all layers
  int64_t split = 0;                // filters of several pieces
  int32_t layers = 0;
  int32_t blocks = 0;  // of layers: those of input channels come behind

  // `g` may be null.
  void add(const View& w, const View* g) {
    const View& other = g ? *g : w;
    const PairLayout inner = merged(w, other, 1);
    const int64_t length = inner.count(), count = w.sizes[0];
    StatsJob job = job_of(w, g, length, filters);
    job.log_threads = log_threads(length);
    job.layout = inner.dense() ? -1 : plan.add_layout(describe(inner));
    const int64_t pieces = std::max<int64_t>(1, (length + kStatsPiece - 1) / kStatsPiece);
    job.pieces = static_cast<int32_t>(pieces);
    job.first_split = static_cast<int32_t>(split);
    const int64_t together = kStatsThreads >> job.log_threads;
    // At least one: a layer without filters has totals, too.
    plan.add(job, std::max<int64_t>(1, (count * pieces + together - 1) / together));
    if (pieces > 1) split += count;
    filters += count;
    layers++;
    blocks = static_cast<int32_t>(plan.blocks);
  }

  // After all layers; of two or more dimensions.
  void add_inputs(const View& w, const View& g) {
    const PairLayout kernel = merged(w, g, 2);
    Strided layout = describe(kernel, 3);
    const int64_t count = w.sizes[1];
    if (count > INT32_MAX) throw std::runtime_error("2^31 input channels are too many");
    layout.size[0] = static_cast<int32_t>(count);
    layout.a[0] = w.strides[1];
    layout.b[0] = g.strides[1];
    StatsJob job = job_of(w, &g, kernel.count(), inputs);
    job.inputs = layout.size[0];
    job.layout = plan.add_layout(layout);
    plan.add(job, (count + kWarp - 1) / kWarp);
    inputs += count;
  }

  int64_t partials() const { return blocks + split; }
  int64_t tickets() const { return layers + split; }

 private:
  static StatsJob job_of(const View& w, const View* g, int64_t length, int64_t first_output) {
    if (w.sizes[0] > INT32_MAX || length > INT32_MAX) {
      throw std::runtime_error("2^31 filters of a layer, or elements of a filter, are too many");
    }
    StatsJob job{};
    job.w = w.data;
    job.g = g ? g->data : nullptr;
    job.w_stride = w.strides[0];
    job.g_stride = g ? g->strides[0] : 0;
    job.first_output = first_output;
    job.filters = static_cast<int32_t>(w.sizes[0]);
    job.length = static_cast<int32_t>(length);
    job.dtype = static_cast<uint32_t>(w.dtype);
    return job;
  }

  // A lane for every 4 elements, up to a warp.
  static uint32_t log_threads(int64_t length) {
    if (length > kWarpLength) return 8;
    uint32_t log = 0;
    while (log < 5 && (int64_t{4} << log) < length) log++;
    return log;
  }
};

}  // namespace psap
