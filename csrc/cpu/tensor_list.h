// A list of tensors as the dispatcher hands it over.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace psap {

// Owns the list, and hands out its tensors one at a time. std::vector<Tensor>, which TORCH_BOX
// would make, keeps two small blocks of memory for every tensor until the end: for hundreds of
// small layers that costs more than their work. Sizes, strides and data live as long as the list.
class TensorList {
 public:
  explicit TensorList(StableIValue boxed)
      : list_(torch::stable::detail::to<StableListHandle>(boxed)) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list_, &size_));
  }
  ~TensorList() { torch_delete_list(list_); }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  size_t size() const { return size_; }

  torch::stable::Tensor operator[](size_t i) const {
    StableIValue item;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list_, i, &item));
    return torch::stable::detail::to<torch::stable::Tensor>(item);
  }

 private:
  StableListHandle list_;
  size_t size_ = 0;
};

}  // namespace psap
