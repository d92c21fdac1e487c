// The metadata of a launch: a Job for everything that it works on, and the layouts of those that
// are not dense. Where they fit they are an argument of the kernel, which needs no memory at all;
// else a table in device memory.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <vector>

#include "../core/layout.h"
#include "device.cuh"

namespace psap {

// Arguments of a kernel may take 4 KB, and 32,764 bytes since CUDA 12.1; what is left is for
// others.
constexpr int kFewBytes = 3840;
constexpr int kManyBytes = 32256;

template <class J, int kBytes>
struct ByValue {
  using Job = J;
  static constexpr bool kInMemory = false;
  int32_t count;
  alignas(16) char bytes[kBytes];
  __device__ __forceinline__ const char* data() const { return bytes; }
};

template <class J>
struct ByPointer {
  using Job = J;
  static constexpr bool kInMemory = true;
  int32_t count;
  const char* bytes;
  __device__ __forceinline__ const char* data() const { return bytes; }
};

template <class Table>
__device__ __forceinline__ const typename Table::Job* jobs_of(const Table& table) {
  return reinterpret_cast<const typename Table::Job*>(table.data());
}

// Null for what is dense, whose number is -1.
template <class Table>
__device__ __forceinline__ const Strided* layout_of(const Table& table, int32_t number) {
  const size_t behind = table.count * sizeof(typename Table::Job);
  return number < 0 ? nullptr : reinterpret_cast<const Strided*>(table.data() + behind) + number;
}

// The job that a block belongs to: the last one whose first_block is not beyond it.
template <class Table>
__device__ __forceinline__ int find_job(const Table& table, int64_t block) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (jobs_of(table)[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// What a launch is to do. Jobs without blocks are left out: then the search above is right.
template <class Job>
struct Plan {
  static_assert(sizeof(Job) % 8 == 0, "layouts lie behind the jobs");
  std::vector<Job> jobs;
  std::vector<Strided> layouts;
  int64_t blocks = 0;

  void add(Job job, int64_t needed) {
    if (needed == 0) return;
    job.first_block = static_cast<int32_t>(blocks);
    blocks += needed;
    if (blocks > INT32_MAX)
      throw std::runtime_error("too much work for one launch; split the call");
    jobs.push_back(job);
  }

  int32_t add_layout(const Strided& layout) {
    layouts.push_back(layout);
    return static_cast<int32_t>(layouts.size() - 1);
  }

  std::vector<char> bytes() const {
    const size_t front = jobs.size() * sizeof(Job), back = layouts.size() * sizeof(Strided);
    std::vector<char> table(front + back);
    if (front) std::memcpy(table.data(), jobs.data(), front);
    if (back) std::memcpy(table.data() + front, layouts.data(), back);
    return table;
  }
};

template <class Table, class Launch>
void launch_by_value(int32_t count, const std::vector<char>& bytes, const Launch& launch) {
  Table table;
  table.count = count;
  std::copy(bytes.begin(), bytes.end(), table.bytes);
  launch(table);
}

// Fits a plan into the smallest table and calls launch(table). large: whether arguments may take
// more than 4 KB.
template <class Job, class Upload, class Launch>
void with_table(const Plan<Job>& plan, bool large, const Upload& upload, const Launch& launch) {
  const int32_t count = static_cast<int32_t>(plan.jobs.size());
  const std::vector<char> bytes = plan.bytes();
  if (bytes.size() <= kFewBytes) {
    launch_by_value<ByValue<Job, kFewBytes>>(count, bytes, launch);
  } else if (large && bytes.size() <= kManyBytes) {
    launch_by_value<ByValue<Job, kManyBytes>>(count, bytes, launch);
  } else {
    launch(ByPointer<Job>{count, static_cast<const char*>(upload(bytes))});
  }
}

// What the host knows of a tensor, without PyTorch.
struct View {
  const void* data;
  int32_t dtype;  // Dtype, or the size of an element where only bytes are moved
  int32_t dims;
  const int64_t* sizes;
  const int64_t* strides;  // in elements
};

// The dimensions of two tensors from dimension `skip` on, merged.
inline PairLayout merged(const View& a, const View& b, int skip) {
  const int from = std::min(skip, a.dims);
  return {a.sizes + from, a.strides + from, b.strides + from, a.dims - from};
}

// Whether kernels can read it in place.
inline bool readable(const PairLayout& layout, int most = 4) {
  return layout.dense() || (layout.dims() <= most && layout.count() <= INT32_MAX);
}

// As kernels read it, in the last of the four places.
inline Strided describe(const PairLayout& layout, int most = 4) {
  if (!readable(layout, most)) {
    throw std::runtime_error(
        "a tensor has too many strides, or gaps and 2^31 elements;"
        " use .contiguous()");
  }
  Strided out;
  for (int d = 0; d < 4; d++) out.size[d] = 1, out.a[d] = out.b[d] = 0;
  for (int d = 0; d < layout.dims(); d++) {
    const Dim& dim = layout.dim(d);
    const int at = 4 - layout.dims() + d;
    out.size[at] = static_cast<int32_t>(std::min<int64_t>(dim.size, INT32_MAX));
    out.a[at] = dim.a;
    out.b[at] = dim.b;
  }
  return out;
}

// The widest word of 1 to 16 bytes that all these addresses, strides and lengths are multiples of.
inline int32_t widest_word(std::initializer_list<int64_t> places) {
  int32_t word = 16;
  for (int64_t place : places) {
    while (place % word) word /= 2;
  }
  return word;
}

}  // namespace psap
