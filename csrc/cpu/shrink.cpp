// shrink: out[t][o, i, ...] = tensors[t][keep_dim0[t][o], keep_dim1[t][i], ...].
// Fused: both dimensions and all tensors in one pass, without the half-shrunk tensor in between.
// Reads and writes the bytes of the output once, plus 8 bytes an index.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <list>
#include <vector>

#include "../core/memory_format.h"
#include "rows.h"
#include "tensor_list.h"

namespace psap {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A cell is fetched so many cells before its use, if it has so many bytes: which ones are kept, no
// hardware can foresee.
constexpr int64_t kAhead = 16, kPrefetched = 16;

// A checked list of indices; `all` where it is 0, 1, ... n - 1.
struct Keep {
  const int64_t* index;
  int64_t count;
  bool all;
};

constexpr int64_t kZero = 0;
constexpr Keep kOne{&kZero, 1, true};  // what a 1-D tensor has for its missing dimension 1

// Lists by where they lie: a weight, its gradient and its momentum share theirs.
class Keeps {
 public:
  Keep get(const Tensor& keep, int64_t size, int dim, size_t tensor) {
    STD_TORCH_CHECK(keep.is_cpu() && keep.dim() == 1 && keep.scalar_type() == ScalarType::Long,
                    "shrink: keep_dim", dim, " must hold int64 CPU tensors of one dimension");
    const int64_t* data = keep.const_data_ptr<int64_t>();
    const int64_t count = keep.size(0);
    const int64_t step = keep.stride(0);
    const Known key{data, count, step, size, {}};
    for (size_t i = known_.size(); i-- > 0 && i + 8 > known_.size();) {  // recent ones
      const Known& k = known_[i];
      if (k.data == data && k.count == count && k.step == step && k.size == size) return k.keep;
    }
    if (step != 1) {
      copies_.emplace_back(count);
      for (int64_t i = 0; i < count; i++) copies_.back()[i] = data[i * step];
      data = copies_.back().data();
    }
    bool inside = true, all = count == size;
    for (int64_t i = 0; i < count; i++) {
      inside &= static_cast<uint64_t>(data[i]) < static_cast<uint64_t>(size);
      all &= data[i] == i;
    }
    STD_TORCH_CHECK(inside, "shrink: an index in keep_dim", dim, " of tensor ", tensor,
                    " is out of range [0, ", size, ")");
    known_.push_back(key);
    known_.back().keep = {data, count, all};
    return known_.back().keep;
  }

 private:
  struct Known {
    const int64_t* data;
    int64_t count, step, size;
    Keep keep;
  };
  std::vector<Known> known_;
  std::list<std::vector<int64_t>> copies_;  // a list: what it holds must not move
};

// One tensor to shrink. A row of the output is made of `groups` times the kept cells, of `cell`
// bytes: one group of whole kernels [kh, kw] where those are dense, or one group of single elements
// for each position of a channels_last kernel. Strides in bytes, but for those of `kernel`.
struct Job {
  const char* from;
  char* to;
  Keep keep0, keep1;
  int64_t from_row, from_group, from_cell;
  int64_t to_row, groups, cell;
  int64_t element;
  PairLayout kernel;  // of the output and the input; for kernels that are not dense: cell is 0

  bool whole_rows() const {
    return cell != 0 && keep1.all && from_cell == cell &&
           (groups == 1 || from_group == keep1.count * cell);
  }

  // Makes row o at `target`; row `after` is made next.
  void row(int64_t o, int64_t after, char* target) const {
    const char* source = from + keep0.index[o] * from_row;
    if (cell == 0) {
      const int64_t to_cell = to_row / keep1.count;
      for (int64_t i = 0; i < keep1.count; i++) {
        copy_row(kernel, element, target + i * to_cell, source + keep1.index[i] * from_cell);
      }
      return;
    }
    const char* next = from + keep0.index[after] * from_row;
    with_fixed_size(cell, [&](auto copy) {
      for (int64_t s = 0; s < groups; s++, source += from_group) {
        int64_t i = 0;
        const auto copy_next = [&] {
          copy(target, source + keep1.index[i++] * from_cell);
          target += cell;
        };
        if (cell >= kPrefetched) {
          for (const int64_t* far = keep1.index + kAhead; i < keep1.count - kAhead;) {
            __builtin_prefetch(source + far[i] * from_cell);
            copy_next();
          }
          for (const int64_t* far = keep1.index; i < keep1.count; far++) {
            __builtin_prefetch(next + *far * from_cell);
            copy_next();
          }
        }
        while (i < keep1.count) copy_next();
      }
    });
  }

  // Rows begin to end - 1. Neighbours that are kept whole are one block.
  void rows(int64_t begin, int64_t end) const {
    char* target = to + begin * to_row;
    if (whole_rows()) {
      for (int64_t o = begin; o < end; o++) {
        const int64_t first = o;
        while (from_row == to_row && o + 1 < end && keep0.index[o + 1] == keep0.index[o] + 1) o++;
        const int64_t bytes = (o + 1 - first) * to_row;
        std::memcpy(target, from + keep0.index[first] * from_row, bytes);
        target += bytes;
      }
    } else {
      for (int64_t o = begin; o < end; o++, target += to_row) {
        row(o, std::min(o + 1, end - 1), target);
      }
    }
  }
};

Job describe(const Tensor& x, const Keep& keep0, const Keep& keep1, std::vector<Tensor>& outputs) {
  const int64_t dims = x.dim();
  const int64_t element = static_cast<int64_t>(x.element_size());
  const OutputShape shape(x, keep0.count, keep1.count);
  const bool channels_last = shape.channels_last;
  outputs.push_back(shape.empty(x, 0));

  const int64_t skip = std::min<int64_t>(2, dims);
  const auto strides = x.strides();
  const PairLayout kernel(shape.sizes + skip, shape.strides + skip, strides.data() + skip,
                          dims - skip);
  Job job{static_cast<const char*>(x.const_data_ptr()),
          static_cast<char*>(outputs.back().mutable_data_ptr()),
          keep0,
          keep1,
          strides[0] * element,
          0,
          (dims > 1 ? strides[1] : 1) * element,
          keep1.count * kernel.count() * element,
          1,
          0,
          element,
          kernel};
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

std::vector<Tensor> shrink(const TensorList& tensors, const TensorList& keep_dim0,
                           const TensorList& keep_dim1) {
  STD_TORCH_CHECK(tensors.size() == keep_dim0.size() && tensors.size() == keep_dim1.size(),
                  "shrink: one keep_dim0 and one keep_dim1 for each tensor are wanted");
  std::vector<Tensor> outputs;
  outputs.reserve(tensors.size());
  RowRange<Job> jobs(tensors.size());
  Keeps keeps0, keeps1;
  for (size_t t = 0; t < tensors.size(); t++) {
    const Tensor x = tensors[t];
    STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, "shrink: tensors must be on the CPU, [O, ...]");
    const Keep keep0 = keeps0.get(keep_dim0[t], x.size(0), 0, t);
    const Keep keep1 = x.dim() > 1 ? keeps1.get(keep_dim1[t], x.size(1), 1, t) : kOne;
    const Job job = describe(x, keep0, keep1, outputs);
    jobs.add(job, keep0.count, job.to_row);
  }
  jobs.for_each([](const Job& job, int64_t begin, int64_t end) { job.rows(begin, end); });
  return outputs;
}

void boxed(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(
      shrink(TensorList(stack[0]), TensorList(stack[1]), TensorList(stack[2])));
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CPU, m) { m.impl("shrink", &psap::boxed); }
