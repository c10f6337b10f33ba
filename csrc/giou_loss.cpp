// giou_loss on the CPU, and the schema of the operator.

#include <algorithm>
#include <vector>

#include "box_columns.h"
#include "giou_loss.h"
#include "giou_loss_arguments.h"

namespace drcnn {
namespace {

constexpr int64_t kBlock = 128;   // pairs that stay in the first-level cache as columns
constexpr int64_t kChunk = 8192;  // unit of work of a thread; partial sums do not depend on their number

template <typename T>
struct Pairs {
  const T* pred;
  const T* target;
  const accumulate_t<T>* weight;
};

// Pairs whose weight is not 0, as columns; the padding weighs 0.
template <typename T, typename A = accumulate_t<T>>
struct Block {
  BoxColumns<A, kBlock> pred, target;
  alignas(64) A weight[kBlock];
  int64_t pair[kBlock];
  int64_t count;

  // Gathers pairs from `next` on, which it moves, until the block is full or `end` is reached.
  inline __attribute__((always_inline)) void gather(const Pairs<T>& pairs, int64_t& next, int64_t end) {
    alignas(64) T pred_rows[4 * kBlock], target_rows[4 * kBlock];
    count = 0;
    for (; next < end && count < kBlock; ++next) {
      if (pairs.weight[next] == A(0)) continue;
      __builtin_memcpy(pred_rows + 4 * count, pairs.pred + 4 * next, 4 * sizeof(T));
      __builtin_memcpy(target_rows + 4 * count, pairs.target + 4 * next, 4 * sizeof(T));
      weight[count] = pairs.weight[next];
      pair[count++] = next;
    }
    pred.load(pred_rows, count);
    target.load(target_rows, count);
    for (int64_t i = count; i < pred.padded; ++i) weight[i] = A(0);
  }

  inline __attribute__((always_inline)) Box<A> pred_box(int64_t i) const {
    return {pred.x1[i], pred.y1[i], pred.x2[i], pred.y2[i]};
  }

  inline __attribute__((always_inline)) Box<A> target_box(int64_t i) const {
    return {target.x1[i], target.y1[i], target.x2[i], target.y2[i]};
  }
};

template <typename T, typename A = accumulate_t<T>>
inline __attribute__((always_inline)) double sum_chunk(const Pairs<T>& pairs, int64_t begin, int64_t end) {
  Block<T> block;
  alignas(64) A values[kBlock];
  double total = 0;
  for (int64_t next = begin; next < end;) {
    block.gather(pairs, next, end);
    for (int64_t i = 0; i < block.pred.padded; ++i) {
      values[i] = block.weight[i] * giou_loss_value(block.pred_box(i), block.target_box(i));
    }
    A lanes[kLanes] = {};
    for (int64_t i = 0; i < block.pred.padded; i += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += values[i + l];
    }
    for (int64_t l = 0; l < kLanes; ++l) total += lanes[l];
  }
  return total;
}

template <typename T, typename A = accumulate_t<T>>
inline __attribute__((always_inline)) void grad_chunk(A grad, const Pairs<T>& pairs, int64_t begin, int64_t end,
                                                      T* out) {
  Block<T> block;
  alignas(64) A slopes[4][kBlock];
  std::fill(out + 4 * begin, out + 4 * end, static_cast<T>(0.0f));
  for (int64_t next = begin; next < end;) {
    block.gather(pairs, next, end);
    for (int64_t i = 0; i < block.pred.padded; ++i) {
      const Box<A> slope = giou_loss_slope(block.pred_box(i), block.target_box(i));
      const A scale = grad * block.weight[i];
      slopes[0][i] = scale * slope.x1;
      slopes[1][i] = scale * slope.y1;
      slopes[2][i] = scale * slope.x2;
      slopes[3][i] = scale * slope.y2;
    }
    for (int64_t i = 0; i < block.count; ++i) {
      for (int64_t c = 0; c < 4; ++c) out[4 * block.pair[i] + c] = static_cast<T>(slopes[c][i]);
    }
  }
}

// target_clones wants plain functions, hence one pair for each type.
#define DRCNN_GIOU_LOSS_CPU(T)                                                                               \
  DRCNN_CPU_CLONES double sum_of(const Pairs<T>& pairs, int64_t begin, int64_t end) {                        \
    return sum_chunk(pairs, begin, end);                                                                     \
  }                                                                                                          \
  DRCNN_CPU_CLONES void grad_of(accumulate_t<T> grad, const Pairs<T>& pairs, int64_t begin, int64_t end,     \
                                T* out) {                                                                    \
    grad_chunk(grad, pairs, begin, end, out);                                                                \
  }

DRCNN_GIOU_LOSS_CPU(float)
DRCNN_GIOU_LOSS_CPU(double)
DRCNN_GIOU_LOSS_CPU(torch::headeronly::Half)
DRCNN_GIOU_LOSS_CPU(torch::headeronly::BFloat16)
#undef DRCNN_GIOU_LOSS_CPU

template <typename T>
Pairs<T> pairs_of(const GiouLossArguments& args) {
  return {args.pred.template const_data_ptr<T>(), args.target.template const_data_ptr<T>(),
          args.weight.template const_data_ptr<accumulate_t<T>>()};
}

Tensor giou_loss_fwd_cpu(const Tensor& pred_, const Tensor& target_, const Tensor& weight_) {
  const GiouLossArguments args(pred_, target_, weight_);
  Tensor out = torch::stable::empty({}, args.weight.scalar_type(), std::nullopt, args.pred.device());
  dispatch_floating(args.pred.scalar_type(), "giou_loss", [&](auto type) {
    using T = decltype(type);
    const Pairs<T> pairs = pairs_of<T>(args);
    const int64_t chunks = (args.pairs + kChunk - 1) / kChunk;
    std::vector<double> partial(chunks);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        partial[chunk] = sum_of(pairs, chunk * kChunk, std::min((chunk + 1) * kChunk, args.pairs));
      }
    });
    double total = 0;
    for (const double part : partial) total += part;
    *out.mutable_data_ptr<accumulate_t<T>>() = static_cast<accumulate_t<T>>(total);
  });
  return out;
}

Tensor giou_loss_bwd_cpu(const Tensor& grad, const Tensor& pred_, const Tensor& target_, const Tensor& weight_) {
  const GiouLossArguments args(pred_, target_, weight_);
  args.check_grad(grad);
  Tensor grad_pred = torch::stable::empty_like(args.pred);
  dispatch_floating(args.pred.scalar_type(), "giou_loss", [&](auto type) {
    using T = decltype(type);
    const Pairs<T> pairs = pairs_of<T>(args);
    const accumulate_t<T> grad_value = *grad.const_data_ptr<accumulate_t<T>>();
    T* out = grad_pred.template mutable_data_ptr<T>();
    torch::stable::parallel_for(0, args.pairs, kChunk, [&](int64_t begin, int64_t end) {
      grad_of(grad_value, pairs, begin, end, out);
    });
  });
  return grad_pred;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_FRAGMENT(drcnn, m) {
  m.def("giou_loss_fwd(Tensor pred, Tensor target, Tensor weight) -> Tensor");
  m.def("giou_loss_bwd(Tensor grad, Tensor pred, Tensor target, Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(drcnn, CPU, m) {
  m.impl("giou_loss_fwd", TORCH_BOX(&drcnn::giou_loss_fwd_cpu));
  m.impl("giou_loss_bwd", TORCH_BOX(&drcnn::giou_loss_bwd_cpu));
}
