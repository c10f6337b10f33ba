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

// Some kept rows, all of their columns, or some columns of one row.
struct Tile {
  const int64_t* rows;
  int64_t count;
  int64_t column;
  int64_t columns;

  int64_t size() const { return count * columns; }
  bool is_one_piece(int64_t classes) const {
    return columns == classes && rows[count - 1] - rows[0] == count - 1;
  }
};

// Calls visit(tile) until all rows of begin..end that the mask keeps have been in one.
template <typename T, typename Visit>
inline __attribute__((always_inline)) void for_each_tile(const Rows<T>& rows, int64_t begin, int64_t end,
                                                         const Visit& visit) {
  int64_t kept[kBlock];
  const int64_t most = std::max<int64_t>(kBlock / rows.classes, 1);
  for (int64_t row = begin; row < end;) {
    int64_t count = 0;
    for (; row < end && count < most; ++row) {
      if (rows.mask == nullptr || rows.mask[row]) kept[count++] = row;
    }
    if (count == 0) return;
    for (int64_t column = 0; column < rows.classes; column += kBlock) {
      visit(Tile{kept, count, column, std::min(kBlock, rows.classes - column)});
    }
  }
}

// Calls visit(row, index) for each row of a tile whose class is among its columns; index counts within the tile.
template <typename T, typename Visit>
inline __attribute__((always_inline)) void for_each_class(const Rows<T>& rows, const Tile& tile,
                                                          const Visit& visit) {
  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t place = rows.labels[tile.rows[i]] - tile.column;
    if (place >= 0 && place < tile.columns) visit(tile.rows[i], i * tile.columns + place);
  }
}

template <typename T, typename A>
inline __attribute__((always_inline)) void load_tile(const Rows<T>& rows, const Tile& tile, A* z) {
  const bool one_piece = tile.is_one_piece(rows.classes);
  const int64_t pieces = one_piece ? 1 : tile.count, length = tile.size() / pieces;
  for (int64_t i = 0; i < pieces; ++i) {
    const T* source = rows.logits + tile.rows[i] * rows.classes + tile.column;
    for (int64_t c = 0; c < length; ++c) z[i * length + c] = static_cast<A>(source[c]);
  }
  for_each_class(rows, tile, [&](int64_t, int64_t index) { z[index] = -z[index]; });
}

template <bool kSquare, typename T, typename A>
inline __attribute__((always_inline)) double sum_chunk(const Rows<T>& rows, int64_t begin, int64_t end,
                                                       const FocalWeights<A>& weights) {
  alignas(64) A values[kBlock];
  double total = 0;
  for_each_tile(rows, begin, end, [&](const Tile& tile) {
    load_tile(rows, tile, values);
    const int64_t size = tile.size(), padded = (size + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = size; i < padded; ++i) values[i] = A(0);
    for (int64_t i = 0; i < padded; ++i) values[i] = focal_value<kSquare>(values[i], weights.gamma);
    for (int64_t i = size; i < padded; ++i) values[i] = A(0);
    double there = 0;
    for_each_class(rows, tile, [&](int64_t, int64_t index) {
      there += values[index];
      values[index] = A(0);
    });
    A lanes[kLanes] = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += values[i + l];
    }
    double absent = 0;
    for (int64_t l = 0; l < kLanes; ++l) absent += lanes[l];
    total += weights.there * there + weights.absent * absent;
  });
  return total;
}

template <bool kSquare, typename T, typename A>
inline __attribute__((always_inline)) void grad_chunk(A grad, const Rows<T>& rows, int64_t begin, int64_t end,
                                                      const FocalWeights<A>& weights, T* out) {
  alignas(64) A slopes[kBlock];
  const A there = -(grad * weights.there), absent = grad * weights.absent;
  for (int64_t row = begin; rows.mask != nullptr && row < end; ++row) {
    if (!rows.mask[row]) std::fill_n(out + row * rows.classes, rows.classes, static_cast<T>(0.0f));
  }
  for_each_tile(rows, begin, end, [&](const Tile& tile) {
    load_tile(rows, tile, slopes);
    const int64_t padded = (tile.size() + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = tile.size(); i < padded; ++i) slopes[i] = A(0);
    for (int64_t i = 0; i < padded; ++i) slopes[i] = focal_slope<kSquare>(slopes[i], weights.gamma);
    const bool one_piece = tile.is_one_piece(rows.classes);
    const int64_t pieces = one_piece ? 1 : tile.count, length = tile.size() / pieces;
    for (int64_t i = 0; i < pieces; ++i) {
      T* target = out + tile.rows[i] * rows.classes + tile.column;
      for (int64_t c = 0; c < length; ++c) target[c] = static_cast<T>(absent * slopes[i * length + c]);
    }
    for_each_class(rows, tile, [&](int64_t row, int64_t index) {
      out[row * rows.classes + rows.labels[row]] = static_cast<T>(there * slopes[index]);
    });
  });
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
