// The shape that shrink gives its outputs: channels_last where the input is, contiguous otherwise.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

namespace psap {

// Is x laid out as [O, ..., I]? Where that is contiguous too (one channel, a 1x1 kernel), the last
// stride decides, as it does for PyTorch.
inline bool is_channels_last(const torch::stable::Tensor& x) {
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

// The output's shape and strides: channels_last where the input is, contiguous otherwise.
struct OutputShape {
  static constexpr int64_t kMaxDims = 8;
  int64_t sizes[kMaxDims], strides[kMaxDims];
  int64_t dims;
  bool channels_last;

  OutputShape(const torch::stable::Tensor& x, int64_t kept0, int64_t kept1)
      : dims(x.dim()), channels_last(is_channels_last(x)) {
    STD_TORCH_CHECK(dims <= kMaxDims, "shrink: tensors have at most ", kMaxDims,
                    " dimensions: merge some with .flatten()");
    const auto from = x.sizes();
    std::copy(from.begin(), from.end(), sizes);
    sizes[0] = kept0;
    if (dims > 1) sizes[1] = kept1;
    int64_t next = 1;
    const auto place = [&](int64_t d) {
      strides[d] = next;
      next *= channels_last ? sizes[d] : std::max<int64_t>(1, sizes[d]);  // as PyTorch has it
    };
    if (channels_last) place(1);
    for (int64_t d = dims - 1; d >= (channels_last ? 2 : 1); d--) place(d);
    place(0);
  }

  // The plain call: through the dispatcher, empty tensors cost more than a small layer's copy.
  torch::stable::Tensor empty(const torch::stable::Tensor& like, int32_t device) const {
    int32_t dtype = 0, type = 0;
    AtenTensorHandle made = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, sizes, strides, dtype, type, device, &made));
    return torch::stable::Tensor(made);
  }
};

}  // namespace psap
