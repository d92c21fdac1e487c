// The metadata of many tensors: one Job each. Where they fit they are an argument of the kernel,
// which needs no memory at all; else a table in device memory.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <vector>

#include "../core/layout.h"
#include "device.cuh"

namespace psap {

// Arguments of a kernel may take 4 KB, and 32,764 bytes since CUDA 12.1.
template <class Job>
constexpr int kFew = static_cast<int>(3600 / sizeof(Job));
template <class Job>
constexpr int kMany = static_cast<int>(32000 / sizeof(Job));

template <class J, int kSize>
struct ByValue {
  using Job = J;
  int32_t count;
  Job job[kSize];
  __device__ __forceinline__ const Job* jobs() const { return job; }
};

template <class J>
struct ByPointer {
  using Job = J;
  int32_t count;
  const Job* job;
  __device__ __forceinline__ const Job* jobs() const { return job; }
};

// The job that a block belongs to: the last one whose first_block is not beyond it. Jobs without
// blocks have the first_block of the next one, and are never found.
template <class Table>
__device__ __forceinline__ int find_job(const Table& table, int64_t block) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.jobs()[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Jobs without blocks are left out: then the search above is right.
template <class Job>
int64_t number_blocks(std::vector<Job>& jobs) {
  int64_t blocks = 0;
  std::vector<Job> kept;
  kept.reserve(jobs.size());
  for (Job& job : jobs) {
    if (job.blocks == 0) continue;
    job.first_block = blocks;
    blocks += job.blocks;
    kept.push_back(job);
  }
  jobs.swap(kept);
  if (blocks > INT32_MAX) throw std::runtime_error("too much work for one launch; split the call");
  return blocks;
}

// Fits the jobs into the smallest table and calls launch(table).
template <class Job, class Upload, class Launch>
void with_table(const std::vector<Job>& jobs, const Upload& upload, const Launch& launch) {
  const int32_t count = static_cast<int32_t>(jobs.size());
  if (count <= kFew<Job>) {
    ByValue<Job, kFew<Job>> table;
    table.count = count;
    std::copy(jobs.begin(), jobs.end(), table.job);
    launch(table);
  } else if (count <= kMany<Job>) {
    ByValue<Job, kMany<Job>> table;
    table.count = count;
    std::copy(jobs.begin(), jobs.end(), table.job);
    launch(table);
  } else {
    launch(
        ByPointer<Job>{count, static_cast<const Job*>(upload(jobs.data(), sizeof(Job) * count))});
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

// The dimensions of two tensors from dimension `skip` on, merged; throws where more than four stay.
inline bool describe_inner(const View& a, const View& b, int skip, Strided& out, int64_t& count) {
  const int from = std::min(skip, a.dims);
  const PairLayout layout(a.sizes + from, a.strides + from, b.strides + from, a.dims - from);
  count = layout.count();
  for (int d = 0; d < 4; d++) out.size[d] = 1, out.a[d] = out.b[d] = 0;
  if (!layout.dense() && count > INT32_MAX) {
    throw std::runtime_error("a tensor with gaps is too long; use .contiguous()");
  }
  if (layout.dims() > 4)
    throw std::runtime_error("a tensor has too many strides; use .contiguous()");
  for (int d = 0; d < layout.dims(); d++) {
    const Dim& dim = layout.dim(d);
    const int at = 4 - layout.dims() + d;
    out.size[at] = static_cast<int32_t>(std::min<int64_t>(dim.size, INT32_MAX));
    out.a[at] = dim.a;
    out.b[at] = dim.b;
  }
  return layout.dense();
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
