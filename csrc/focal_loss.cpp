// focal_loss on the CPU, and the schema of the operator.

#include <algorithm>
#include <vector>

#include "focal_loss.h"
#include "focal_loss_arguments.h"

namespace drcnn {
namespace {

constexpr int64_t kBlock = 1024;   // logits of one block stay in the first-level cache
constexpr int64_t kChunk = 65536;  // logits that are the unit of work of a thread, whatever the number of threads
constexpr int64_t kLanes = 16;

template <typename T>
struct Rows {
  const T* logits;
  const int64_t* labels;
  const bool* mask;
  int64_t classes;
};

// Rows that the mask keeps, as many as fit into a block, with all of their columns; or some columns of one row.
template <typename T, typename A = accumulate_t<T>>
struct Tile {
  const Rows<T>& rows;
  int64_t next_row;
  int64_t end_row;
  int64_t kept[kBlock];  // numbers of the rows
  int64_t count = 0;
  int64_t column = 0;
  int64_t columns;
  alignas(64) A z[kBlock];

  inline __attribute__((always_inline)) Tile(const Rows<T>& rows_, int64_t begin, int64_t end)
      : rows(rows_), next_row(begin), end_row(end), columns(rows_.classes) {}

  // Goes on to the next rows or columns; false behind the last.
  inline __attribute__((always_inline)) bool advance() {
    column += columns;
    if (count == 0 || column >= rows.classes) {
      const int64_t most = std::max<int64_t>(kBlock / rows.classes, 1);
      column = count = 0;
      for (; next_row < end_row && count < most; ++next_row) {
        if (rows.mask == nullptr || rows.mask[next_row]) kept[count++] = next_row;
      }
    }
    columns = std::min(kBlock, rows.classes - column);
    return count > 0;
  }

  // Number of the first logit of a kept row among all logits.
  inline __attribute__((always_inline)) int64_t start(int64_t i) const {
    return kept[i] * rows.classes + column;
  }

  // Where in z the class of a kept row is; -1 for the background and for a class in other columns.
  inline __attribute__((always_inline)) int64_t class_place(int64_t i) const {
    const int64_t place = rows.labels[kept[i]] - column;
    return place >= 0 && place < columns ? i * columns + place : -1;
  }

  // The first row behind the i-th that does not follow its predecessor in memory.
  inline __attribute__((always_inline)) int64_t run_end(int64_t i) const {
    for (++i; i < count && kept[i] == kept[i - 1] + 1;) ++i;
    return i;
  }

  inline __attribute__((always_inline)) int64_t padded() const {
    return (count * columns + kLanes - 1) / kLanes * kLanes;
  }

  // Fills z with the logits, negated for the class of a row.
  inline __attribute__((always_inline)) void load() {
    for (int64_t i = 0, end; i < count; i = end) {
      end = run_end(i);
      const T* source = rows.logits + start(i);
      for (int64_t c = 0; c < (end - i) * columns; ++c) z[i * columns + c] = static_cast<A>(source[c]);
    }
    for (int64_t i = count * columns; i < padded(); ++i) z[i] = A(0);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = class_place(i);
      if (place >= 0) z[place] = -z[place];
    }
  }
};

template <bool kSquare, typename T, typename A = accumulate_t<T>>
inline __attribute__((always_inline)) double sum_chunk(const Rows<T>& rows, int64_t begin, int64_t end,
                                                       const FocalWeights<A>& weights) {
  Tile<T> tile(rows, begin, end);
  const A gamma = weights.gamma;
  double there = 0, absent = 0;
  while (tile.advance()) {
    tile.load();
    const int64_t padded = tile.padded();
    for (int64_t i = 0; i < padded; ++i) tile.z[i] = focal_value<kSquare>(tile.z[i], gamma);
    for (int64_t i = tile.count * tile.columns; i < padded; ++i) tile.z[i] = A(0);
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t place = tile.class_place(i);
      if (place < 0) continue;
      there += tile.z[place];
      tile.z[place] = A(0);
    }
    A lanes[kLanes] = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += tile.z[i + l];
    }
    for (int64_t l = 0; l < kLanes; ++l) absent += lanes[l];
  }
  return weights.there * there + weights.absent * absent;
}

template <bool kSquare, typename T, typename A = accumulate_t<T>>
inline __attribute__((always_inline)) void grad_chunk(A grad, const Rows<T>& rows, int64_t begin, int64_t end,
                                                      const FocalWeights<A>& weights, T* out) {
  Tile<T> tile(rows, begin, end);
  const A gamma = weights.gamma, there = -(grad * weights.there), absent = grad * weights.absent;
  for (int64_t row = begin; rows.mask != nullptr && row < end; ++row) {
    if (!rows.mask[row]) std::fill_n(out + row * rows.classes, rows.classes, static_cast<T>(0.0f));
  }
  while (tile.advance()) {
    tile.load();
    for (int64_t i = 0; i < tile.padded(); ++i) tile.z[i] = focal_slope<kSquare>(tile.z[i], gamma);
    for (int64_t i = 0, end; i < tile.count; i = end) {
      end = tile.run_end(i);
      const A* slopes = tile.z + i * tile.columns;
      T* target = out + tile.start(i);
      for (int64_t c = 0; c < (end - i) * tile.columns; ++c) target[c] = static_cast<T>(absent * slopes[c]);
    }
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t place = tile.class_place(i);
      if (place >= 0) out[tile.start(i) + place - i * tile.columns] = static_cast<T>(there * tile.z[place]);
    }
  }
}

// target_clones wants plain functions, hence one pair for each type.
#define DRCNN_FOCAL_LOSS_CPU(T)                                                                              \
  DRCNN_CPU_CLONES double sum_of(const Rows<T>& rows, int64_t begin, int64_t end,                            \
                                 const FocalWeights<accumulate_t<T>>& weights) {                             \
    return weights.gamma == 2 ? sum_chunk<true>(rows, begin, end, weights)                                   \
                              : sum_chunk<false>(rows, begin, end, weights);                                 \
  }                                                                                                          \
  DRCNN_CPU_CLONES void grad_of(accumulate_t<T> grad, const Rows<T>& rows, int64_t begin, int64_t end,       \
                                const FocalWeights<accumulate_t<T>>& weights, T* out) {                      \
    return weights.gamma == 2 ? grad_chunk<true>(grad, rows, begin, end, weights, out)                       \
                              : grad_chunk<false>(grad, rows, begin, end, weights, out);                     \
  }

DRCNN_FOCAL_LOSS_CPU(float)
DRCNN_FOCAL_LOSS_CPU(double)
DRCNN_FOCAL_LOSS_CPU(torch::headeronly::Half)
DRCNN_FOCAL_LOSS_CPU(torch::headeronly::BFloat16)
#undef DRCNN_FOCAL_LOSS_CPU

template <typename T>
Rows<T> rows_of(const FocalLossArguments& args) {
  return {args.logits.template const_data_ptr<T>(), args.labels.const_data_ptr<int64_t>(), args.mask_pointer(),
          args.classes};
}

// Calls run(chunk, begin, end) for chunks of rows, from any thread.
template <typename Run>
void for_each_chunk(int64_t rows, int64_t rows_per_chunk, const Run& run) {
  const int64_t chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      run(chunk, chunk * rows_per_chunk, std::min((chunk + 1) * rows_per_chunk, rows));
    }
  });
}

int64_t rows_per_chunk(int64_t classes) { return std::max<int64_t>(kChunk / classes, 1); }

Tensor focal_loss_fwd_cpu(const Tensor& logits_, const Tensor& labels_, const std::optional<Tensor>& mask_,
                          double alpha, double gamma) {
  const FocalLossArguments args(logits_, labels_, mask_);
  Tensor out =
      torch::stable::empty({}, accumulate_type(args.logits.scalar_type()), std::nullopt, args.logits.device());
  dispatch_floating(args.logits.scalar_type(), "focal_loss", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    double total = 0;
    if (args.logits.numel() > 0) {
      const Rows<T> rows = rows_of<T>(args);
      const FocalWeights<A> weights(alpha, gamma);
      const int64_t length = rows_per_chunk(args.classes);
      std::vector<double> partial((args.rows + length - 1) / length);
      for_each_chunk(args.rows, length, [&](int64_t chunk, int64_t begin, int64_t end) {
        partial[chunk] = sum_of(rows, begin, end, weights);
      });
      for (const double part : partial) total += part;
    }
    *out.mutable_data_ptr<A>() = static_cast<A>(total);
  });
  return out;
}

Tensor focal_loss_bwd_cpu(const Tensor& grad, const Tensor& logits_, const Tensor& labels_,
                          const std::optional<Tensor>& mask_, double alpha, double gamma) {
  const FocalLossArguments args(logits_, labels_, mask_);
  args.check_grad(grad);
  Tensor grad_logits = torch::stable::empty_like(args.logits);
  if (args.logits.numel() == 0) return grad_logits;
  dispatch_floating(args.logits.scalar_type(), "focal_loss", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Rows<T> rows = rows_of<T>(args);
    const FocalWeights<A> weights(alpha, gamma);
    const A grad_value = *grad.const_data_ptr<A>();
    T* out = grad_logits.template mutable_data_ptr<T>();
    for_each_chunk(args.rows, rows_per_chunk(args.classes), [&](int64_t, int64_t begin, int64_t end) {
      grad_of(grad_value, rows, begin, end, weights, out);
    });
  });
  return grad_logits;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_FRAGMENT(drcnn, m) {
  m.def("focal_loss_fwd(Tensor logits, Tensor labels, Tensor? mask, float alpha, float gamma) -> Tensor");
  m.def(
      "focal_loss_bwd(Tensor grad, Tensor logits, Tensor labels, Tensor? mask, float alpha, float gamma) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(drcnn, CPU, m) {
  m.impl("focal_loss_fwd", TORCH_BOX(&drcnn::focal_loss_fwd_cpu));
  m.impl("focal_loss_bwd", TORCH_BOX(&drcnn::focal_loss_bwd_cpu));
}
