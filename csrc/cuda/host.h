// The host side of every CUDA op: device, stream, counters that stay, tables in device memory.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <list>
#include <map>
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

// Arguments of a kernel beyond 4 KB: drivers of CUDA 12.1 take them, older ones of CUDA 12 do not.
inline bool large_arguments() {
  static const bool supported = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12010;
  }();
  return supported;
}

// While this lives, what would break a capture that is under way in the process is let through: it
// has nothing to do with it.
class RelaxedCapture {
 public:
  RelaxedCapture() { check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_), "capture"); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Allocates and fills device memory at once, by a stream of its own. `data` is null: zeros.
inline void* device_memory(const void* data, size_t bytes) {
  const RelaxedCapture relaxed;
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
  if (status != cudaSuccess) cudaFree(made);
  check_cuda(status, "memory");
  return made;
}

// What a stream keeps between calls: counters that kernels leave at zero, and tables of metadata by
// content. A graph may run whenever it likes, beside anything: a call that is captured gets
// counters of its own, and all that it uses stays for good. Whoever calls this holds `mutex`, until
// what uses the result has been launched: then a table that is given up is in use by nothing but
// the stream.
class StreamState {
 public:
  std::mutex mutex;

  unsigned int* counters(int64_t count, bool captured) {
    if (captured) {
      return static_cast<unsigned int*>(device_memory(nullptr, count * sizeof(unsigned int)));
    }
    if (count > capacity_) {
      // Work that is under way may still count in the old ones, so they are left alone.
      const int64_t wanted = std::max<int64_t>({count, 2 * capacity_, 4096});
      counters_ = static_cast<unsigned int*>(device_memory(nullptr, wanted * sizeof(unsigned int)));
      capacity_ = wanted;
    }
    return counters_;
  }

  // A copy of `bytes` in device memory; the same content is sent only once.
  const void* table(const std::vector<char>& bytes, cudaStream_t stream, bool captured) {
    std::list<Table>& tables = captured ? of_graphs_ : tables_;
    auto found = std::find_if(tables.begin(), tables.end(),
                              [&](const Table& table) { return table.host == bytes; });
    if (found == tables.end() && !captured && tables.size() >= kKept) {
      found = rewrite_oldest(bytes, stream);
    }
    if (found == tables.end()) {
      void* made = device_memory(bytes.data(), bytes.size());
      tables.push_front({bytes, bytes.size(), made});
    } else {
      tables.splice(tables.begin(), tables, found);
    }
    return tables.front().device;
  }

 private:
  struct Table {
    std::vector<char> host;  // empty: unknown
    size_t room;
    void* device;
  };
  static constexpr size_t kKept = 8;

  // In the order of the stream, on which all is that reads the former content. Without room in it
  // the table is given up, and there is no result.
  std::list<Table>::iterator rewrite_oldest(const std::vector<char>& bytes, cudaStream_t stream) {
    const RelaxedCapture relaxed;
    Table& oldest = tables_.back();
    oldest.host.clear();
    if (oldest.room < bytes.size()) {
      check_cuda(cudaStreamSynchronize(stream), "table");  // it may be in use
      check_cuda(cudaFree(oldest.device), "table");
      tables_.pop_back();
      return tables_.end();
    }
    // From pageable memory: it has been read when this returns.
    check_cuda(
        cudaMemcpyAsync(oldest.device, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream),
        "table");
    oldest.host = bytes;
    return std::prev(tables_.end());
  }

  std::list<Table> tables_, of_graphs_;
  unsigned int* counters_ = nullptr;
  int64_t capacity_ = 0;
};

// The device of a call, which it makes current, and its stream.
class Call {
 public:
  Call(const Tensor& like, const char* op)
      : device_(device_of(like, op)), guard_(device_), stream_(current_stream(device_)) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(stream_, &status), op);
    captured_ = status != cudaStreamCaptureStatusNone;
  }

  cudaStream_t stream() const { return stream_; }

  void require(const Tensor& x, const char* op) const {
    STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == device_, op,
                    ": all tensors must be on one CUDA device");
  }

  // Calls launch(table, counters): `count` counters, zero now and afterwards.
  template <class Job, class Launch>
  void launch(const char* op, const Plan<Job>& plan, int64_t count, const Launch& launch) const {
    StreamState& kept = state();
    const std::lock_guard<std::mutex> lock(kept.mutex);
    unsigned int* counters = count ? kept.counters(count, captured_) : nullptr;
    with_table(
        plan, large_arguments(),
        [&](const std::vector<char>& bytes) { return kept.table(bytes, stream_, captured_); },
        [&](const auto& table) { launch(table, counters); });
    check_cuda(cudaGetLastError(), op);
  }

 private:
  static int32_t device_of(const Tensor& x, const char* op) {
    STD_TORCH_CHECK(x.is_cuda(), op, ": all tensors must be on one CUDA device");
    return x.get_device_index();
  }

  StreamState& state() const {
    static std::mutex mutex;
    static std::map<std::pair<int32_t, cudaStream_t>, StreamState> states;
    const std::lock_guard<std::mutex> lock(mutex);
    return states[{device_, stream_}];
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  bool captured_ = false;
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

// The same to write to: memory that it shares with a lazy copy becomes its own.
inline View written_bytes_of(const Tensor& x) {
  View bytes = bytes_of(x);
  bytes.data = x.mutable_data_ptr();
  return bytes;
}

inline bool same_rows(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim() && a.dim() >= 1;
  for (int64_t d = 1; same && d < a.dim(); d++) same = a.size(d) == b.size(d);
  return same;
}

// Contiguous copies of two tensors that kernels cannot read together as they are, from dimension
// `skip` on: they have too many strides, or gaps and 2^31 elements.
inline void make_readable(Tensor& a, Tensor& b, int skip, int most = 4) {
  if (readable(merged(view(a, 0), view(b, 0), skip), most)) return;
  a = torch::stable::contiguous(a);
  b = torch::stable::contiguous(b);
}

}  // namespace psap
