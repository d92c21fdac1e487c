// Checks of tensors that the CPU and the CUDA ops share.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace psap {

// Every element of a tensor that is written has memory of its own.
inline void require_own_memory(const torch::stable::Tensor& x, const char* op) {
  if (x.numel() == 0) return;
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  for (size_t d = 0; d < sizes.size(); d++) {
    STD_TORCH_CHECK(sizes[d] < 2 || strides[d] != 0, op, ": a tensor to write to is expanded");
  }
}

}  // namespace psap
