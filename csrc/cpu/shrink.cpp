// shrink: out[t][o, i, ...] = tensors[t][keep_dim0[t][o], keep_dim1[t][i], ...].
// Fused: both dimensions and all tensors in one pass, without the half-shrunk tensor in between.
// Reads and writes the bytes of the output once, plus 8 bytes an index.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "rows.h"

namespace psap {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

// A checked list of indices; `all` where it is 0, 1, ... n - 1.
struct Keep {
  std::vector<int64_t> index;
  bool all;

  Keep(const Tensor& keep, int64_t size, int dim, size_t tensor) : all(keep.numel() == size) {
    STD_TORCH_CHECK(keep.is_cpu() && keep.dim() == 1, "shrink: keep_dim", dim,
                    " must hold CPU tensors of one dimension");
    const int64_t* data = keep.const_data_ptr<int64_t>();
    const int64_t step = keep.stride(0);
    index.resize(keep.numel());
    for (int64_t i = 0; i < keep.numel(); i++) {
      index[i] = data[i * step];
      all = all && index[i] == i;
      STD_TORCH_CHECK(0 <= index[i] && index[i] < size, "shrink: index ", index[i], " in keep_dim",
                      dim, " of tensor ", tensor, " is out of range [0, ", size, ")");
    }
  }
  Keep() : index{0}, all(true) {}  // what a 1-D tensor has for its missing dimension 1
};

// Is x laid out as [O, ..., I]? Where that is contiguous too (one channel, a 1x1 kernel), the last
// stride decides, as it does for PyTorch.
bool is_channels_last(const Tensor& x) {
  const int64_t dims = x.dim();
  if (dims != 4 && dims != 5) return false;
  if (x.is_contiguous() && (x.size(1) == 1 || x.stride(dims - 1) != x.size(1))) return false;
  int64_t expected = 1;
  const auto fits = [&](int64_t d) {
    const bool fit = x.size(d) == 1 || x.stride(d) == expected;
    expected *= x.size(d);
    return fit;
  };
  bool all = fits(1);
  for (int64_t d = dims - 1; d >= 2; d--) all = all && fits(d);
  return all && fits(0);
}

// One tensor to shrink. A row of the output is made of `groups` times the kept cells, of `cell`
// bytes: one group of whole kernels [kh, kw] where those are dense, or one group of single elements
// for each position of a channels_last kernel. Strides in bytes.
struct Job {
  const char* from;
  char* to;
  Keep keep0, keep1;
  int64_t from_row, from_group, from_cell;
  int64_t to_row, groups, cell;
  RowPair kernels;  // the kernels of one row, copied stride by stride where cell is 0

  void row(int64_t o) const {
    const char* source = from + keep0.index[o] * from_row;
    char* target = to + o * to_row;
    const int64_t kept = static_cast<int64_t>(keep1.index.size());
    if (cell == 0) {
      RowPair pair = kernels;
      pair.to = target;
      pair.from = source;
      for (int64_t i = 0; i < kept; i++) pair.copy(i, keep1.index[i]);
      return;
    }
    if (keep1.all && from_cell == cell && (groups == 1 || from_group == kept * cell)) {
      std::memcpy(target, source, to_row);
      return;
    }
    with_fixed_size(cell, [&](auto copy) {
      for (int64_t s = 0; s < groups; s++, source += from_group) {
        for (int64_t i : keep1.index) {
          copy(target, source + i * from_cell);
          target += cell;
        }
      }
    });
  }
};

Tensor empty_output(const Tensor& x, const std::vector<int64_t>& sizes, bool channels_last) {
  const MemoryFormat format = !channels_last ? MemoryFormat::Contiguous
                              : x.dim() == 4 ? MemoryFormat::ChannelsLast
                                             : MemoryFormat::ChannelsLast3d;
  return torch::stable::empty(sizes, x.scalar_type(), x.layout(), x.device(), false, format);
}

Job describe(const Tensor& x, Keep keep0, Keep keep1, std::vector<Tensor>& outputs) {
  const int64_t dims = x.dim();
  const int64_t element = static_cast<int64_t>(x.element_size());
  const int64_t kept = static_cast<int64_t>(keep1.index.size());
  const bool channels_last = is_channels_last(x);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[0] = static_cast<int64_t>(keep0.index.size());
  if (dims > 1) sizes[1] = kept;
  const Tensor out = empty_output(x, sizes, channels_last);
  outputs.push_back(out);

  const int64_t skip = std::min<int64_t>(2, dims);
  PairLayout kernel(sizes.data() + skip, out.strides().data() + skip, x.strides().data() + skip,
                    dims - skip);
  const int64_t to_stride = dims > 1 ? out.stride(1) : 1;
  const int64_t from_stride = dims > 1 ? x.stride(1) : 1;
  Job job{static_cast<const char*>(x.const_data_ptr()),
          static_cast<char*>(out.mutable_data_ptr()),
          std::move(keep0),
          std::move(keep1),
          x.stride(0) * element,
          0,
          from_stride * element,
          kept * kernel.count() * element,
          1,
          0,
          {nullptr, nullptr, to_stride, from_stride, element, kernel}};
  if (channels_last) {
    job.groups = kernel.count();
    job.cell = element;
    job.from_cell = element;
    job.from_group = x.size(1) * element;
  } else if (kernel.dense()) {
    job.cell = kernel.count() * element;
  }
  return job;
}

std::vector<Tensor> shrink(const std::vector<Tensor>& tensors, const std::vector<Tensor>& keep_dim0,
                           const std::vector<Tensor>& keep_dim1) {
  STD_TORCH_CHECK(tensors.size() == keep_dim0.size() && tensors.size() == keep_dim1.size(),
                  "shrink: one keep_dim0 and one keep_dim1 for each tensor are wanted");
  std::vector<Tensor> outputs;
  std::vector<Job> jobs;
  std::vector<int64_t> start{0};  // rows
  int64_t bytes = 0;
  for (size_t t = 0; t < tensors.size(); t++) {
    const Tensor& x = tensors[t];
    STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, "shrink: tensors must be on the CPU, [O, ...]");
    jobs.push_back(describe(x, Keep(keep_dim0[t], x.size(0), 0, t),
                            x.dim() > 1 ? Keep(keep_dim1[t], x.size(1), 1, t) : Keep(), outputs));
    const int64_t rows = jobs[t].to_row == 0 ? 0 : outputs[t].size(0);
    start.push_back(start[t] + rows);
    bytes += rows * jobs[t].to_row;
  }
  const int64_t rows = start.back();
  // A thread gets no less than about 128 KiB.
  const int64_t grain = std::max<int64_t>(1, (rows << 17) / std::max<int64_t>(1, bytes));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    int64_t t = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
    for (int64_t r = begin; r < end; r++) {
      while (r >= start[t + 1]) t++;
      jobs[t].row(r - start[t]);
    }
  });
  return outputs;
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CPU, m) { m.impl("shrink", TORCH_BOX(&psap::shrink)); }
