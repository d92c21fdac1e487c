// zero_filters_ and restore_filters_ on a GPU: rows of dimension 0 are cleared, or written over.
// Fused: all tensors in one launch. zero_filters_ reads one byte a row and writes the bytes of the
// cleared rows; restore_filters_ reads the saved rows and their numbers, and writes the rows. Bits
// are moved 16 bytes at a time where rows lie so, else in the widest words that fit. A long row has
// one or several blocks, a short one (a vector's element) only as many threads as it needs.
#pragma once

#include "table.cuh"

namespace psap {

constexpr int kRowThreads = 128;
constexpr int64_t kRowPiece = 1 << 14;  // bytes of a row that one block writes

struct RowJob {
  char* to;
  const char* from;                             // saved rows; null: zeros
  const bool* keep;                             // null: rows
  const int64_t* rows;                          // int64 [count]
  int64_t count;                                // rows to look at
  int64_t size;                                 // rows of the tensor
  int64_t to_stride, from_stride, list_stride;  // the first two in bytes
  int64_t length;                               // words of a row
  uint32_t pieces;                              // blocks of a row
  int32_t team_bits;                            // 2^team_bits threads have a row
  int32_t first_block;
  int32_t word;    // bytes: 1, 2, 4, 8 or 16
  uint32_t part;   // words of an element where those of a row have gaps, else 0
  int32_t layout;  // of the elements of a row with gaps, in words; a: to, b: from
};

// Copies (or clears, where from is null) `count` words that lie together.
template <class W>
__device__ __forceinline__ void move_dense(W* to, const W* from, int64_t count, int me, int team) {
  constexpr int kSize = 16 / sizeof(W);
  int64_t done = 0;
  if (from == nullptr || misalignment(to) == misalignment(from)) {
    int64_t head = (16 - misalignment(to)) % 16 / sizeof(W);
    if (head > count) head = count;
    for (int64_t i = me; i < head; i += team) to[i] = from ? __ldg(from + i) : W{};
    const int64_t vectors = (count - head) / kSize;
    uint4* wide = reinterpret_cast<uint4*>(to + head);
    if (from) {
#pragma unroll 4
      for (int64_t v = me; v < vectors; v += team) {
        wide[v] = __ldg(reinterpret_cast<const uint4*>(from + head) + v);
      }
    } else {
      for (int64_t v = me; v < vectors; v += team) wide[v] = uint4{0, 0, 0, 0};
    }
    done = head + vectors * kSize;
  }
#pragma unroll 4
  for (int64_t i = done + me; i < count; i += team) to[i] = from ? __ldg(from + i) : W{};
}

template <class W>
__device__ __forceinline__ void move_row(const RowJob& job, const Strided* layout, uint32_t block) {
  const int team = 1 << job.team_bits, me = threadIdx.x & (team - 1);
  const uint32_t unit = block / job.pieces;
  const int64_t at = (static_cast<int64_t>(unit) * kRowThreads + threadIdx.x) >> job.team_bits;
  if (at >= job.count) return;
  int64_t row = at;
  if (job.keep) {
    if (job.keep[at * job.list_stride]) return;
  } else {
    row = __ldg(job.rows + at * job.list_stride);
    if (row < 0 || row >= job.size) __trap();  // as PyTorch's own indexing does
  }
  W* to = reinterpret_cast<W*>(job.to + row * job.to_stride);
  const W* from = job.from ? reinterpret_cast<const W*>(job.from + at * job.from_stride) : nullptr;
  constexpr int64_t kStep = kRowPiece / sizeof(W);
  const int64_t begin = (block - unit * job.pieces) * kStep;
  const int64_t end = begin + kStep < job.length ? begin + kStep : job.length;
  if (job.part == 0) {
    move_dense(to + begin, from ? from + begin : nullptr, end - begin, me, team);
    return;
  }
  for (int64_t i = begin + me; i < end; i += team) {
    const uint32_t word = static_cast<uint32_t>(i), element = word / job.part;
    int64_t a, b;
    layout->offsets(element, &a, &b);
    const uint32_t rest = word - element * job.part;
    to[a + rest] = from ? __ldg(from + b + rest) : W{};
  }
}

template <class Table>
__global__ void __launch_bounds__(kRowThreads) row_kernel(PSAP_GRID_CONSTANT const Table table) {
  // A copy: what lies in memory would be read anew after every store.
  const RowJob job = jobs_of(table)[find_job(table, blockIdx.x)];
  const Strided* layout = layout_of(table, job.layout);
  const uint32_t block = static_cast<uint32_t>(blockIdx.x - job.first_block);
  switch (job.word) {
    case 1:
      return move_row<uint8_t>(job, layout, block);
    case 2:
      return move_row<uint16_t>(job, layout, block);
    case 4:
      return move_row<uint32_t>(job, layout, block);
    case 8:
      return move_row<uint2>(job, layout, block);
    default:
      return move_row<uint4>(job, layout, block);
  }
}

// `saved` is null for zero_filters_; View::dtype is the size of an element here.
inline void plan_rows(Plan<RowJob>& plan, const View& x, const View* saved, const void* list,
                      int64_t list_stride, int64_t count) {
  RowJob job{};
  const int64_t element = x.dtype;
  job.to = static_cast<char*>(const_cast<void*>(x.data));
  job.from = saved ? static_cast<const char*>(saved->data) : nullptr;
  if (saved) {
    job.rows = static_cast<const int64_t*>(list);
  } else {
    job.keep = static_cast<const bool*>(list);
  }
  job.count = count;
  job.size = x.sizes[0];
  // A stride of a dimension of size 1 may be anything.
  job.to_stride = job.size > 1 ? x.strides[0] * element : 0;
  job.from_stride = saved && count > 1 ? saved->strides[0] * element : 0;
  job.list_stride = list_stride;
  const PairLayout inner = merged(x, saved ? *saved : x, 1);
  const bool dense = inner.dense();
  const int64_t bytes = inner.count() * element;
  if (bytes == 0) return;
  job.word = widest_word({reinterpret_cast<int64_t>(job.to), reinterpret_cast<int64_t>(job.from),
                          dense ? bytes : element, job.to_stride, job.from_stride});
  job.length = bytes / job.word;
  job.layout = -1;
  if (!dense) {
    job.part = static_cast<uint32_t>(element / job.word);
    if (job.length > INT32_MAX) throw std::runtime_error("rows with gaps are too long");
    Strided layout = describe(inner);
    for (int64_t& stride : layout.a) stride *= job.part;
    for (int64_t& stride : layout.b) stride *= job.part;
    job.layout = plan.add_layout(layout);
  }
  const int64_t each = dense ? 16 : job.word;  // bytes that a thread moves at a time
  while (1 << job.team_bits < kRowThreads && (each << job.team_bits) < bytes) job.team_bits++;
  job.pieces = static_cast<uint32_t>((bytes + kRowPiece - 1) / kRowPiece);
  const int64_t together = kRowThreads >> job.team_bits;
  plan.add(job, (count + together - 1) / together * job.pieces);
}

}  // namespace psap
