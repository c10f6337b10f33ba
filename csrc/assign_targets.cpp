// assign_targets on the CPU, and the schema of the operator.

#include <atomic>

#include "assign_targets_arguments.h"
#include "box_columns.h"

namespace drcnn {
namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kGrain = 1024;

// One image's pointers.
template <typename T>
struct Rows {
  const T* max_iou;
  const int64_t* gt_index;
  const T* boxes;
  const T* gt_boxes;
  const int64_t* gt_labels;
  int64_t gt_count;
  int64_t* labels;
  T* deltas;
};

// Labels of `size` boxes from `start` on, and their ground truths; false if an index is out of range.
template <typename T, typename A>
inline __attribute__((always_inline)) bool gather(const Rows<T>& rows, int64_t start, int64_t size, A threshold,
                                                  int64_t background, T* __restrict matched) {
  bool in_range = true;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t g = rows.gt_index[start + i];
    const bool is_there = static_cast<uint64_t>(g) < static_cast<uint64_t>(rows.gt_count);
    in_range &= is_there;
    const int64_t slot = is_there ? g : 0;
    __builtin_memcpy(matched + 4 * i, rows.gt_boxes + 4 * slot, 4 * sizeof(T));
    const bool positive = is_positive(static_cast<A>(rows.max_iou[start + i]), threshold);
    rows.labels[start + i] = positive ? rows.gt_labels[slot] : background;
  }
  return in_range;
}

// Assigns boxes begin..end; returns whether all indices were in range.
template <typename T, typename A>
inline __attribute__((always_inline)) bool assign_chunk(const Rows<T>& rows, int64_t begin, int64_t end, A threshold,
                                                        const Deltas<A>& weights, int64_t background) {
  BoxColumns<A, kBlock> boxes, gt;
  alignas(64) A dx[kBlock], dy[kBlock], dw[kBlock], dh[kBlock];
  alignas(64) T matched[4 * kBlock];
  bool in_range = true;
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t size = std::min(kBlock, end - start);
    in_range &= gather(rows, start, size, threshold, background, matched);
    boxes.load(rows.boxes + 4 * start, size);
    gt.load(matched, size);
    for (int64_t i = 0; i < boxes.padded; ++i) {
      const Deltas<A> deltas = deltas_of(Box<A>{boxes.x1[i], boxes.y1[i], boxes.x2[i], boxes.y2[i]},
                                         Box<A>{gt.x1[i], gt.y1[i], gt.x2[i], gt.y2[i]}, weights);
      dx[i] = deltas.dx;
      dy[i] = deltas.dy;
      dw[i] = deltas.dw;
      dh[i] = deltas.dh;
    }
    T* __restrict out = rows.deltas + 4 * start;
    for (int64_t i = 0; i < size; ++i) {
      out[4 * i] = static_cast<T>(dx[i]);
      out[4 * i + 1] = static_cast<T>(dy[i]);
      out[4 * i + 2] = static_cast<T>(dw[i]);
      out[4 * i + 3] = static_cast<T>(dh[i]);
    }
  }
  return in_range;
}

// target_clones wants plain functions, hence one for each type.
#define DRCNN_ASSIGN_TARGETS_CPU(T)                                                                          \
  DRCNN_CPU_CLONES bool assign_range(const Rows<T>& rows, int64_t begin, int64_t end,                        \
                                     accumulate_t<T> threshold, const Deltas<accumulate_t<T>>& weights,      \
                                     int64_t background) {                                                   \
    return assign_chunk(rows, begin, end, threshold, weights, background);                                   \
  }

DRCNN_ASSIGN_TARGETS_CPU(float)
DRCNN_ASSIGN_TARGETS_CPU(double)
DRCNN_ASSIGN_TARGETS_CPU(torch::headeronly::Half)
DRCNN_ASSIGN_TARGETS_CPU(torch::headeronly::BFloat16)
#undef DRCNN_ASSIGN_TARGETS_CPU

std::tuple<Tensor, Tensor> assign_targets_cpu(const Tensor& max_iou, const Tensor& gt_index, const Tensor& boxes,
                                              const Tensor& gt_boxes, const Tensor& gt_labels,
                                              const Tensor& threshold, double wx, double wy, double ww, double wh,
                                              int64_t background) {
  AssignArguments args(max_iou, gt_index, boxes, gt_boxes, gt_labels, threshold);
  const int64_t count = args.boxes.count;
  if (count == 0 || args.boxes.batch == 0) return {args.labels, args.deltas};
  if (args.gt.count == 0) {
    torch::stable::fill_(args.labels, static_cast<double>(background));
    torch::stable::zero_(args.deltas);
    return {args.labels, args.deltas};
  }
  std::atomic<bool> in_range = true;
  dispatch_floating(args.type(), "assign_targets", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Deltas<A> weights{static_cast<A>(wx), static_cast<A>(wy), static_cast<A>(ww), static_cast<A>(wh)};
    const A limit = *threshold.const_data_ptr<A>();
    const int64_t chunks = (count + kGrain - 1) / kGrain;
    int64_t* labels = args.labels.mutable_data_ptr<int64_t>();
    T* deltas = args.deltas.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, args.boxes.batch * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / chunks;
        const int64_t first = task % chunks * kGrain;
        const Rows<T> rows{args.max_iou.template const_data_ptr<T>() + image * count,
                           args.gt_index.template const_data_ptr<int64_t>() + image * count,
                           args.boxes.data<T>() + image * args.boxes.stride,
                           args.gt.data<T>() + image * args.gt.stride,
                           args.gt_labels.template const_data_ptr<int64_t>() + image * args.gt.count,
                           args.gt.count,
                           labels + image * count,
                           deltas + 4 * image * count};
        if (!assign_range(rows, first, std::min(first + kGrain, count), limit, weights, background)) {
          in_range = false;
        }
      }
    });
  });
  STD_TORCH_CHECK(in_range, "assign_targets: gt_index is out of bounds, gt_boxes has ", args.gt.count, " slots");
  return {args.labels, args.deltas};
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_FRAGMENT(drcnn, m) {
  m.def(
      "assign_targets(Tensor max_iou, Tensor gt_index, Tensor boxes, Tensor gt_boxes, Tensor gt_labels, "
      "Tensor threshold, float wx, float wy, float ww, float wh, int background) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(drcnn, CPU, m) { m.impl("assign_targets", TORCH_BOX(&drcnn::assign_targets_cpu)); }
