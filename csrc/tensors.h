// Checks and type dispatch on tensors of LibTorch's stable ABI (TORCH_TARGET_VERSION in CMakeLists.txt).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <optional>

#include "portable.h"

namespace drcnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls function(T{}) with the C++ type of a floating-point tensor.
template <typename Function>
void dispatch_floating(ScalarType type, const char* op, const Function& function) {
  switch (type) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Half:
      return function(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return function(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": expected float16, bfloat16, float32 or float64, got ",
                      torch::headeronly::toString(type));
  }
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

}  // namespace drcnn
