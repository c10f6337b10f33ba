// smooth_l1 on the CPU, and the schema of the operator.

#include <algorithm>
#include <vector>

#include "smooth_l1.h"
#include "smooth_l1_arguments.h"

namespace drcnn {
namespace {

constexpr int64_t kBlockBoxes = 64;    // differences of one block stay in the first-level cache
constexpr int64_t kChunkBoxes = 8192;  // unit of work of a thread; partial sums do not depend on their number
constexpr int64_t kLanes = 16;

// Writes pred - target of `boxes` boxes, 0 where the mask is false whatever the values are.
template <typename T, typename A>
inline __attribute__((always_inline)) void load_differences(const T* pred, const T* target, const bool* mask,
                                                            int64_t boxes, A* difference) {
  for (int64_t i = 0; i < 4 * boxes; ++i) {
    difference[i] = static_cast<A>(pred[i]) - static_cast<A>(target[i]);
  }
  if (mask == nullptr) return;
  for (int64_t box = 0; box < boxes; ++box) {
    for (int64_t c = 0; c < 4; ++c) difference[4 * box + c] = mask[box] ? difference[4 * box + c] : A(0);
  }
}

template <typename T, typename A>
inline __attribute__((always_inline)) double sum_chunk(const T* pred, const T* target, const bool* mask,
                                                       int64_t boxes, A beta) {
  alignas(64) A difference[4 * kBlockBoxes];
  double total = 0;
  for (int64_t start = 0; start < boxes; start += kBlockBoxes) {
    const int64_t count = std::min(kBlockBoxes, boxes - start);
    load_differences(pred + 4 * start, target + 4 * start, mask == nullptr ? nullptr : mask + start, count,
                     difference);
    const int64_t padded = (4 * count + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = 4 * count; i < padded; ++i) difference[i] = A(0);
    A lanes[kLanes] = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      // A padded slot counts 0: with beta 0 the linear part of a difference of 0 is 0 as well.
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += smooth_l1_value(difference[i + l], beta);
    }
    for (int64_t l = 0; l < kLanes; ++l) total += lanes[l];
  }
  return total;
}

template <typename T, typename A>
inline __attribute__((always_inline)) void grad_chunk(A grad, const T* pred, const T* target, const bool* mask,
                                                      int64_t boxes, A beta, T* grad_pred) {
  alignas(64) A difference[4 * kBlockBoxes];
  for (int64_t start = 0; start < boxes; start += kBlockBoxes) {
    const int64_t count = std::min(kBlockBoxes, boxes - start);
    const bool* block_mask = mask == nullptr ? nullptr : mask + start;
    load_differences(pred + 4 * start, target + 4 * start, block_mask, count, difference);
    for (int64_t i = 0; i < 4 * count; ++i) difference[i] = grad * smooth_l1_slope(difference[i], beta);
    if (block_mask != nullptr) {  // an infinite grad times a slope of 0 must not reach a masked box
      for (int64_t i = 0; i < 4 * count; ++i) difference[i] = block_mask[i / 4] ? difference[i] : A(0);
    }
    for (int64_t i = 0; i < 4 * count; ++i) grad_pred[4 * start + i] = static_cast<T>(difference[i]);
  }
}

// target_clones wants plain functions, hence one pair for each type.
#define DRCNN_SMOOTH_L1_CPU(T)                                                                               \
  DRCNN_CPU_CLONES double sum_of(const T* pred, const T* target, const bool* mask, int64_t boxes,            \
                                 accumulate_t<T> beta) {                                                     \
    return sum_chunk(pred, target, mask, boxes, beta);                                                       \
  }                                                                                                          \
  DRCNN_CPU_CLONES void grad_of(accumulate_t<T> grad, const T* pred, const T* target, const bool* mask,      \
                                int64_t boxes, accumulate_t<T> beta, T* grad_pred) {                         \
    grad_chunk(grad, pred, target, mask, boxes, beta, grad_pred);                                            \
  }

DRCNN_SMOOTH_L1_CPU(float)
DRCNN_SMOOTH_L1_CPU(double)
DRCNN_SMOOTH_L1_CPU(torch::headeronly::Half)
DRCNN_SMOOTH_L1_CPU(torch::headeronly::BFloat16)
#undef DRCNN_SMOOTH_L1_CPU

Tensor smooth_l1_fwd_cpu(const Tensor& pred_, const Tensor& target_, const Tensor& beta,
                         const std::optional<Tensor>& mask_) {
  const SmoothL1Arguments args(pred_, target_, beta, mask_);
  Tensor out = torch::stable::empty({}, accumulate_type(args.pred.scalar_type()), std::nullopt, args.pred.device());
  dispatch_floating(args.pred.scalar_type(), "smooth_l1", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const T* pred = args.pred.template const_data_ptr<T>();
    const T* target = args.target.template const_data_ptr<T>();
    const bool* mask = args.mask_pointer();
    const A beta_value = *beta.const_data_ptr<A>();
    const int64_t chunks = (args.boxes + kChunkBoxes - 1) / kChunkBoxes;
    std::vector<double> partial(chunks);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t start = chunk * kChunkBoxes;
        const int64_t count = std::min(kChunkBoxes, args.boxes - start);
        partial[chunk] = sum_of(pred + 4 * start, target + 4 * start, mask == nullptr ? nullptr : mask + start,
                                count, beta_value);
      }
    });
    double total = 0;
    for (const double part : partial) total += part;
    *out.mutable_data_ptr<A>() = static_cast<A>(total);
  });
  return out;
}

Tensor smooth_l1_bwd_cpu(const Tensor& grad, const Tensor& pred_, const Tensor& target_, const Tensor& beta,
                         const std::optional<Tensor>& mask_) {
  const SmoothL1Arguments args(pred_, target_, beta, mask_);
  args.check_grad(grad);
  Tensor grad_pred = torch::stable::empty_like(args.pred);
  dispatch_floating(args.pred.scalar_type(), "smooth_l1", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const T* pred = args.pred.template const_data_ptr<T>();
    const T* target = args.target.template const_data_ptr<T>();
    const bool* mask = args.mask_pointer();
    T* out = grad_pred.template mutable_data_ptr<T>();
    const A grad_value = *grad.const_data_ptr<A>();
    const A beta_value = *beta.const_data_ptr<A>();
    torch::stable::parallel_for(0, args.boxes, kChunkBoxes, [&](int64_t begin, int64_t end) {
      grad_of(grad_value, pred + 4 * begin, target + 4 * begin, mask == nullptr ? nullptr : mask + begin,
              end - begin, beta_value, out + 4 * begin);
    });
  });
  return grad_pred;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_FRAGMENT(drcnn, m) {
  m.def("smooth_l1_fwd(Tensor pred, Tensor target, Tensor beta, Tensor? mask) -> Tensor");
  m.def("smooth_l1_bwd(Tensor grad, Tensor pred, Tensor target, Tensor beta, Tensor? mask) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(drcnn, CPU, m) {
  m.impl("smooth_l1_fwd", TORCH_BOX(&drcnn::smooth_l1_fwd_cpu));
  m.impl("smooth_l1_bwd", TORCH_BOX(&drcnn::smooth_l1_bwd_cpu));
}
