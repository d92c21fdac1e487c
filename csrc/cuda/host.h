// The host side of every CUDA op: device, stream, scratch that stays, tables in device memory.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "../core/checks.h"
#include "table.cuh"

namespace psap {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_cuda(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, std::vector<int64_t>(sizes), dtype);
}

// Allocates and fills device memory at once, whatever the streams of PyTorch are doing: by a stream
// of its own, and in a mode in which a capture that is under way neither notices nor minds.
inline void* device_memory(const void* data, size_t bytes) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "memory");
  void* made = nullptr;
  cudaStream_t stream = nullptr;
  cudaError_t status = cudaMalloc(&made, bytes);
  if (status == cudaSuccess) status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (status == cudaSuccess) {
    status = data ? cudaMemcpyAsync(made, data, bytes, cudaMemcpyHostToDevice, stream)
                  : cudaMemsetAsync(made, 0, bytes, stream);
  }
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
  if (stream) cudaStreamDestroy(stream);
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "memory");
  check_cuda(status, "memory");
  return made;
}

// What a stream keeps between calls: counters that kernels leave at zero, and tables of metadata by
// content. A call that is captured shares nothing: the graph may run whenever it likes, and what it
// uses stays alive for good.
class StreamState {
 public:
  unsigned int* counters(int64_t count, bool captured) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (captured) {
      return static_cast<unsigned int*>(device_memory(nullptr, count * sizeof(unsigned int)));
    }
    if (count > capacity_) {
      capacity_ = std::max<int64_t>(count, 4096);
      // Work that is under way may still count in the old ones, so they are left alone.
      counters_ =
          static_cast<unsigned int*>(device_memory(nullptr, capacity_ * sizeof(unsigned int)));
    }
    return counters_;
  }

  // A copy of `bytes` in device memory; the same content is sent only once.
  const void* table(const void* data, size_t bytes, cudaStream_t stream, bool captured) {
    if (captured) return device_memory(data, bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Table& table : tables_) {
      if (table.host.size() == bytes && std::memcmp(table.host.data(), data, bytes) == 0) {
        return table.device;
      }
    }
    if (tables_.size() >= kKept) {
      check_cuda(cudaStreamSynchronize(stream), "table");  // it may be in use
      cudaFree(tables_.back().device);
      tables_.pop_back();
    }
    const char* content = static_cast<const char*>(data);
    tables_.push_front({{content, content + bytes}, device_memory(data, bytes)});
    return tables_.front().device;
  }

 private:
  struct Table {
    std::vector<char> host;
    void* device;
  };
  static constexpr size_t kKept = 8;
  std::mutex mutex_;
  std::list<Table> tables_;
  unsigned int* counters_ = nullptr;
  int64_t capacity_ = 0;
};

// The device of a call: makes it current, and knows its stream.
class Call {
 public:
  explicit Call(const Tensor& like)
      : device_(like.get_device()), guard_(device_), stream_(current_stream(device_)) {}

  cudaStream_t stream() const { return stream_; }

  unsigned int* counters(int64_t count) const { return state().counters(count, captured()); }

  bool captured() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(stream_, &status), "capture");
    return status != cudaStreamCaptureStatusNone;
  }

  StreamState& state() const {
    static std::mutex mutex;
    static std::map<std::pair<int32_t, cudaStream_t>, StreamState> states;
    const std::lock_guard<std::mutex> lock(mutex);
    return states[{device_, stream_}];
  }

  void require(const Tensor& x, const char* op) const {
    STD_TORCH_CHECK(x.is_cuda() && x.get_device() == device_, op,
                    ": all tensors must be on one CUDA device");
  }

  static void launched(const char* op) { check_cuda(cudaGetLastError(), op); }

  template <class Job, class Launch>
  void with(const std::vector<Job>& jobs, const Launch& launch) const {
    with_table(
        jobs,
        [&](const Job* data, size_t bytes) {
          return state().table(data, bytes, stream_, captured());
        },
        launch);
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline int32_t dtype_number(const Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": tensors must be float32, float64, bfloat16 or float16");
  }
}

// A tensor whose values count, and one whose bytes do.
inline View view(const Tensor& x, int32_t dtype) {
  return {x.const_data_ptr(), dtype, static_cast<int32_t>(x.dim()), x.sizes().data(),
          x.strides().data()};
}
inline View bytes_of(const Tensor& x) { return view(x, static_cast<int32_t>(x.element_size())); }

inline bool same_rows(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim() && a.dim() >= 1;
  for (int64_t d = 1; same && d < a.dim(); d++) same = a.size(d) == b.size(d);
  return same;
}

}  // namespace psap
