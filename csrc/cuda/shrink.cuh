// shrink on a GPU: out[t][o, i, ...] = tensors[t][keep_dim0[t][o], keep_dim1[t][i], ...].
// Fused: both dimensions and all tensors (weights, gradients, momentum) in one launch, no tensor in
// between. Reads and writes the bytes of the output once, plus 8 bytes an index and row. A thread
// collects 16 bytes of the output, from as many cells as lie in them, and stores them at once. A
// block writes kShrinkPiece bytes: a part of a long row, or several short ones (vectors, depthwise
// filters).
#pragma once

#include "table.cuh"

namespace psap {

constexpr int kShrinkThreads = 128;
constexpr int64_t kShrinkPiece = 1 << 13;  // bytes of the output that one block writes
constexpr int64_t kShrinkRow = 1 << 30;    // words of a row; longer ones become several jobs

// A row of the output is `groups` times the kept cells; a cell is `words` words that lie together
// in the output. Strides in bytes.
struct ShrinkJob {
  const char* from;
  char* to;
  const int64_t* keep0;
  const int64_t* keep1;  // null: there is no dimension 1
  int64_t keep0_stride, keep1_stride;
  int64_t rows, size0, size1;
  int64_t from_row, from_group, from_cell, to_row;
  uint32_t words, kept1, groups;  // of a cell; cells of a group; groups of a row
  uint32_t group_words, row_words;
  uint32_t pieces, together;  // blocks of a row, or rows of a block; the other one is 1
  uint32_t part;              // words of an element where those of a cell have gaps, else 0
  int32_t word;               // bytes: 1, 2, 4, 8 or 16
  int32_t layout;             // b: where the elements of a cell with gaps lie, in words
  int32_t first_block;
};

__device__ __forceinline__ const char* source_row(const ShrinkJob& job, int64_t row, bool* bad) {
  const int64_t source = __ldg(job.keep0 + row * job.keep0_stride);
  *bad |= static_cast<uint64_t>(source) >= static_cast<uint64_t>(job.size0);
  return job.from + source * job.from_row;
}

// The place of one word of the output; the next one is found without a division. kShort: a block
// has several rows.
template <bool kShort>
struct Cursor {
  uint32_t row = 0, group = 0, cell, within;

  __device__ __forceinline__ Cursor(const ShrinkJob& job, uint32_t index) {
    if (kShort) {
      row = index / job.row_words;
      index -= row * job.row_words;
    }
    if (job.groups > 1) {
      group = index / job.group_words;
      index -= group * job.group_words;
    }
    cell = index / job.words;
    within = index - cell * job.words;
  }

  __device__ __forceinline__ void advance(const ShrinkJob& job) {
    if (++within == job.words) within = 0, cell++;
    if (cell == job.kept1) cell = 0, group++;
    if (kShort && group == job.groups) group = 0, row++;
  }

  // Where the word comes from; sets `bad` where an index is out of range.
  template <class W>
  __device__ __forceinline__ const W* source(const ShrinkJob& job, const char* from, int64_t first,
                                             bool* bad) const {
    if (kShort) from = source_row(job, first + row, bad);
    int64_t input = cell;
    if (job.keep1) {
      input = __ldg(job.keep1 + input * job.keep1_stride);
      *bad |= static_cast<uint64_t>(input) >= static_cast<uint64_t>(job.size1);
    }
    return reinterpret_cast<const W*>(from + input * job.from_cell + group * job.from_group) +
           within;
  }
};

// As below, where the elements of a cell have gaps: a word at a time. Divides a lot; rare.
template <class W>
__device__ __forceinline__ void shrink_gaps(const ShrinkJob& job, const Strided& layout,
                                            int64_t first, uint32_t begin, uint32_t count) {
  W* out = reinterpret_cast<W*>(job.to + first * job.to_row) + begin;
  for (uint32_t i = threadIdx.x; i < count; i += kShrinkThreads) {
    bool bad = false;
    const Cursor<true> cursor(job, begin + i);
    const W* cell = cursor.template source<W>(job, nullptr, first, &bad) - cursor.within;
    if (bad) __trap();
    const uint32_t element = cursor.within / job.part;
    int64_t unused, at;
    layout.offsets(element, &unused, &at);
    out[i] = __ldg(cell + at + (cursor.within - element * job.part));
  }
}

// Words begin ... begin + count - 1 of row `first`, or of all the rows from there.
template <class W, bool kShort>
__device__ __forceinline__ void shrink_words(const ShrinkJob& job, int64_t first, uint32_t begin,
                                             uint32_t count) {
  constexpr uint32_t kSize = 16 / sizeof(W);
  constexpr uint32_t kBatch = kSize < 4 ? kSize : 4;  // loads under way; more take registers
  bool bad = false;
  const char* from = kShort ? nullptr : source_row(job, first, &bad);
  W* out = reinterpret_cast<W*>(job.to + first * job.to_row) + begin;
  const auto one = [&](uint32_t i) {
    const W* source = Cursor<kShort>(job, begin + i).template source<W>(job, from, first, &bad);
    if (bad) __trap();  // as PyTorch's own indexing does, before anything is read from there
    out[i] = __ldg(source);
  };
  uint32_t head = (16 - misalignment(out)) % 16 / static_cast<uint32_t>(sizeof(W));
  if (head > count) head = count;
  for (uint32_t i = threadIdx.x; i < head; i += kShrinkThreads) one(i);
  const uint32_t vectors = (count - head) / kSize;
  for (uint32_t v = threadIdx.x; v < vectors; v += kShrinkThreads) {
    const uint32_t at = head + v * kSize;
    Cursor<kShort> cursor(job, begin + at);
    W words[kSize];
#pragma unroll
    for (uint32_t w = 0; w < kSize; w += kBatch) {
      const W* source[kBatch];
#pragma unroll
      for (uint32_t i = 0; i < kBatch; i++) {
        source[i] = cursor.template source<W>(job, from, first, &bad);
        cursor.advance(job);
      }
      if (bad) __trap();
#pragma unroll
      for (uint32_t i = 0; i < kBatch; i++) words[w + i] = __ldg(source[i]);
    }
    uint4 bits;
    memcpy(&bits, words, sizeof bits);
    *reinterpret_cast<uint4*>(out + at) = bits;
  }
  for (uint32_t i = head + vectors * kSize + threadIdx.x; i < count; i += kShrinkThreads) one(i);
}

template <class W>
__device__ __forceinline__ void shrink_block(const ShrinkJob& job, const Strided* layout,
                                             uint32_t block) {
  constexpr uint32_t kStep = kShrinkPiece / sizeof(W);
  const uint32_t unit = block / job.pieces;
  const int64_t first = static_cast<int64_t>(unit) * job.together, rows = job.rows - first;
  const uint32_t begin = (block - unit * job.pieces) * kStep;
  uint32_t count = job.row_words - begin;
  if (count > kStep) count = kStep;
  if (job.together > 1) {
    count = job.row_words * (rows < job.together ? static_cast<uint32_t>(rows) : job.together);
  }
  if (job.part) return shrink_gaps<W>(job, *layout, first, begin, count);
  if (job.together > 1) return shrink_words<W, true>(job, first, 0, count);
  shrink_words<W, false>(job, first, begin, count);
}

template <class Table>
__global__ void __launch_bounds__(kShrinkThreads)
    shrink_kernel(PSAP_GRID_CONSTANT const Table table) {
  // A copy: what lies in memory would be read anew after every store.
  const ShrinkJob job = jobs_of(table)[find_job(table, blockIdx.x)];
  const Strided* layout = layout_of(table, job.layout);
  const uint32_t block = static_cast<uint32_t>(blockIdx.x - job.first_block);
  switch (job.word) {
    case 1:
      return shrink_block<uint8_t>(job, layout, block);
    case 2:
      return shrink_block<uint16_t>(job, layout, block);
    case 4:
      return shrink_block<uint32_t>(job, layout, block);
    case 8:
      return shrink_block<uint2>(job, layout, block);
    default:
      return shrink_block<uint4>(job, layout, block);
  }
}

// One index list on the device.
struct KeepList {
  const int64_t* index;
  int64_t count, stride;
};

// The part of a row that begins at cell `begin` and has `count` of them.
inline ShrinkJob cells_of(ShrinkJob job, int64_t begin, int64_t count) {
  const int64_t cell = static_cast<int64_t>(job.words) * job.word;
  if (job.keep1) job.keep1 += begin * job.keep1_stride;
  job.to += begin * cell;
  job.kept1 = static_cast<uint32_t>(count);
  return job;
}

inline void add_shrink(Plan<ShrinkJob>& plan, ShrinkJob job) {
  job.group_words = job.kept1 * job.words;
  job.row_words = job.groups * job.group_words;
  const uint32_t step = static_cast<uint32_t>(kShrinkPiece / job.word);
  const bool whole = job.to_row == static_cast<int64_t>(job.row_words) * job.word;
  job.together = whole && job.row_words ? std::max(1u, step / job.row_words) : 1;
  job.pieces = (job.row_words + step - 1) / step;
  plan.add(job, (job.rows + job.together - 1) / job.together * job.pieces);
}

// x and out share the dimensions from 2 on; keep1 is null where there are none from 1 on; out is
// contiguous, or channels_last where x is. Adds one job, and more where a row has more than `limit`
// words: indices within a row have 32 bits.
inline void plan_shrink(Plan<ShrinkJob>& plan, const View& x, const View& out,
                        const KeepList& keep0, const KeepList* keep1, int64_t limit = kShrinkRow) {
  ShrinkJob job{};
  const int64_t element = x.dtype;
  const bool wide = x.dims > 1;
  job.from = static_cast<const char*>(x.data);
  job.to = static_cast<char*>(const_cast<void*>(out.data));
  job.keep0 = keep0.index;
  job.keep0_stride = keep0.stride;
  job.keep1 = keep1 ? keep1->index : nullptr;
  job.keep1_stride = keep1 ? keep1->stride : 0;
  job.rows = out.sizes[0];
  job.size0 = x.sizes[0];
  job.size1 = wide ? x.sizes[1] : 1;
  const int64_t kept = wide ? out.sizes[1] : 1;
  const PairLayout kernel = merged(out, x, 2);
  const int64_t length = kernel.count();
  if (job.rows == 0 || kept == 0 || length == 0) return;
  // A stride of a dimension of size 1 may be anything.
  job.from_row = job.size0 > 1 ? x.strides[0] * element : 0;
  job.from_cell = job.size1 > 1 ? x.strides[1] * element : 0;
  job.to_row = kept * length * element;
  // channels_last: the cells of one place of the kernel follow each other, then come those of the
  // next place. All places make one dimension, the last one.
  const bool channels_last = wide && out.strides[1] == 1 && length > 1;
  int64_t cell = element, run = element;
  if (channels_last) {
    job.from_group = kernel.dim(kernel.dims() - 1).b * element;
  } else {
    cell = length * element;
    run = kernel.dense() ? cell : element;
  }
  job.groups = static_cast<uint32_t>(channels_last ? length : 1);
  job.word = widest_word({reinterpret_cast<int64_t>(x.data), reinterpret_cast<int64_t>(out.data),
                          run, job.from_row, job.from_group, job.from_cell, job.to_row});
  job.layout = -1;
  if (run != cell) {
    job.part = static_cast<uint32_t>(element / job.word);
    Strided layout = describe(kernel);
    for (int64_t& stride : layout.b) stride *= job.part;
    job.layout = plan.add_layout(layout);
  }
  const int64_t words = cell / job.word, row_words = job.to_row / job.word;
  if (words > limit || (channels_last && row_words > limit)) {
    throw std::runtime_error("shrink: a kernel is too long");
  }
  job.words = static_cast<uint32_t>(words);
  const int64_t most = channels_last ? kept : limit / words;
  for (int64_t begin = 0; begin < kept; begin += most) {
    add_shrink(plan, cells_of(job, begin, std::min(most, kept - begin)));
  }
}

}  // namespace psap
