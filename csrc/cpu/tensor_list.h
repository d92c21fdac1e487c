// A list of tensors as the dispatcher hands it over.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace psap {

// Owns the tensors, which nobody else need do: where an argument is a lazy negation or conjugate,
// the dispatcher makes a tensor for this call alone. A handle that is taken out of the list is
// freed by whoever took it, one that is left in it by no one: so all of them are taken at once, and
// a call that is refused frees them too.
class TensorList {
 public:
  explicit TensorList(StableIValue boxed)
      : tensors_(torch::stable::detail::to<std::vector<torch::stable::Tensor>>(boxed)) {}

  size_t size() const { return tensors_.size(); }

  const torch::stable::Tensor& operator[](size_t i) const { return tensors_[i]; }

 private:
  std::vector<torch::stable::Tensor> tensors_;
};

}  // namespace psap
