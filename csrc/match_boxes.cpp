// match_boxes on the CPU, and the schemas of the operators: O(N + G) memory, no N x G buffer.

#include <limits>
#include <vector>

#include "box_columns.h"
#include "match_boxes.h"
#include "match_boxes_arguments.h"

namespace drcnn {
namespace {

constexpr int64_t kBlock = 128;     // boxes that stay in the first-level cache with their running best
constexpr int64_t kMinChunk = 512;  // boxes of a unit of work, at least
constexpr int64_t kMaxChunks = 64;  // units of work of an image, at most: bounds the memory of partial maxima
constexpr int64_t kSerialPairs = 8192;

// The valid ground truths of one image, in order.
template <typename A>
struct GroundTruths {
  std::vector<Box<A>> boxes;
  std::vector<A> areas;
  std::vector<int32_t> indices;

  template <typename T>
  void load(const T* gt_boxes, const bool* valid, int64_t count) {
    for (int64_t g = 0; g < count; ++g) {
      if (!valid[g]) continue;
      const T* box = gt_boxes + 4 * g;
      boxes.push_back(
          {static_cast<A>(box[0]), static_cast<A>(box[1]), static_cast<A>(box[2]), static_cast<A>(box[3])});
      areas.push_back(box_area(boxes.back()));
      indices.push_back(static_cast<int32_t>(g));
    }
  }
};

// The running best of a block of boxes.
template <typename A>
struct Best {
  alignas(64) A iou[kBlock];
  alignas(64) int32_t index[kBlock];
};

// The box around a block. Boxes with NaN, which overlap nothing, may fall out of it.
template <typename A>
inline __attribute__((always_inline)) Box<A> hull_of(const BoxColumns<A, kBlock>& block) {
  A x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) {
    x1[l] = y1[l] = std::numeric_limits<A>::infinity();
    x2[l] = y2[l] = -std::numeric_limits<A>::infinity();
  }
  for (int64_t i = 0; i < block.padded; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      x1[l] = lesser(block.x1[i + l], x1[l]);
      y1[l] = lesser(block.y1[i + l], y1[l]);
      x2[l] = greater(block.x2[i + l], x2[l]);
      y2[l] = greater(block.y2[i + l], y2[l]);
    }
  }
  for (int64_t l = 1; l < kLanes; ++l) {
    x1[0] = lesser(x1[l], x1[0]);
    y1[0] = lesser(y1[l], y1[0]);
    x2[0] = greater(x2[l], x2[0]);
    y2[0] = greater(y2[l], y2[0]);
  }
  return {x1[0], y1[0], x2[0], y2[0]};
}

// Matches a block of boxes; gt_max (or null) is raised to the largest IoU of each ground truth.
template <typename A>
inline __attribute__((always_inline)) void match_chunk(const BoxColumns<A, kBlock>& block, const Box<A>* gt,
                                                       const A* areas, const int32_t* indices, int64_t count,
                                                       Best<A>& best, A* gt_max) {
  const int64_t padded = block.padded;
  for (int64_t i = 0; i < padded; ++i) best.iou[i] = A(0);
  for (int64_t i = 0; i < padded; ++i) best.index[i] = 0;
  const Box<A> hull = hull_of(block);
  for (int64_t g = 0; g < count; ++g) {
    const Box<A> box = gt[g];
    // Anchors of a block are neighbours: most ground truths touch none of them and have IoU 0 with all.
    if (box.x2 <= hull.x1 || box.x1 >= hull.x2 || box.y2 <= hull.y1 || box.y1 >= hull.y2) continue;
    const A area = areas[g];
    const int32_t index = indices[g];
    alignas(64) A ious[kBlock];
    for (int64_t i = 0; i < padded; ++i) {
      const A iou = iou_of(Box<A>{block.x1[i], block.y1[i], block.x2[i], block.y2[i]}, block.area[i], box, area);
      const bool is_better = iou > best.iou[i];  // strictly: ties stay with the lowest index
      ious[i] = iou;
      best.iou[i] = is_better ? iou : best.iou[i];
      best.index[i] = is_better ? index : best.index[i];
    }
    if (gt_max == nullptr) continue;
    A lanes[kLanes] = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] = greater(ious[i + l], lanes[l]);
    }
    for (int64_t l = 0; l < kLanes; ++l) gt_max[g] = greater(lanes[l], gt_max[g]);
  }
}

template <typename A>
inline __attribute__((always_inline)) void mark_chunk(const BoxColumns<A, kBlock>& block, const Box<A>& gt, A area,
                                                      A target, int32_t* __restrict marks) {
  for (int64_t i = 0; i < block.padded; ++i) {
    const A iou = iou_of(Box<A>{block.x1[i], block.y1[i], block.x2[i], block.y2[i]}, block.area[i], gt, area);
    marks[i] = iou == target ? 1 : marks[i];
  }
}

#define DRCNN_MATCH_BOXES_CPU(A)                                                                             \
  DRCNN_CPU_CLONES void match_block(const BoxColumns<A, kBlock>& block, const Box<A>* gt, const A* areas,    \
                                    const int32_t* indices, int64_t count, Best<A>& best, A* gt_max) {       \
    match_chunk(block, gt, areas, indices, count, best, gt_max);                                             \
  }                                                                                                          \
  DRCNN_CPU_CLONES void mark_block(const BoxColumns<A, kBlock>& block, const Box<A>& gt, A area, A target,   \
                                   int32_t* __restrict marks) {                                              \
    mark_chunk(block, gt, area, target, marks);                                                              \
  }

DRCNN_MATCH_BOXES_CPU(float)
DRCNN_MATCH_BOXES_CPU(double)
#undef DRCNN_MATCH_BOXES_CPU

// Matches boxes that follow each other in one image. Not cloned: it converts dtypes and calls what is.
template <typename T, typename A>
void match_range(const T* boxes, int64_t count, const GroundTruths<A>& gt, T* max_iou, int64_t* gt_index,
                 A* gt_max) {
  BoxColumns<A, kBlock> block;
  Best<A> best;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    block.load(boxes + 4 * start, size);
    match_block(block, gt.boxes.data(), gt.areas.data(), gt.indices.data(),
                static_cast<int64_t>(gt.boxes.size()), best, gt_max);
    for (int64_t i = 0; i < size; ++i) max_iou[start + i] = static_cast<T>(best.iou[i]);
    for (int64_t i = 0; i < size; ++i) gt_index[start + i] = best.index[i];
  }
}

// Marks the boxes of a chunk that reach the largest IoU of one of the ground truths `hits`.
template <typename T, typename A>
void mark_range(const T* boxes, int64_t count, const GroundTruths<A>& gt, const std::vector<size_t>& hits,
                const A* targets, bool* is_best) {
  BoxColumns<A, kBlock> block;
  alignas(64) int32_t marks[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    std::fill_n(marks, kBlock, 0);
    if (!hits.empty()) block.load(boxes + 4 * start, size);
    for (const size_t g : hits) mark_block(block, gt.boxes[g], gt.areas[g], targets[g], marks);
    for (int64_t i = 0; i < size; ++i) is_best[start + i] = marks[i] != 0;
  }
}

// How the boxes are split; it depends on the shapes alone.
struct Split {
  int64_t chunk;
  int64_t chunks;
  int64_t tasks;
  int64_t grain;

  explicit Split(const MatchArguments& args) {
    const int64_t count = args.boxes.count;
    chunk = std::max(kMinChunk, (count + kMaxChunks - 1) / kMaxChunks);
    chunk = (chunk + kBlock - 1) / kBlock * kBlock;
    chunks = (count + chunk - 1) / chunk;
    tasks = args.boxes.batch * chunks;
    const bool is_small = args.boxes.batch * count * (args.gt.count + 1) < kSerialPairs;
    grain = is_small ? std::max<int64_t>(tasks, 1) : 1;
  }

  // Calls function(image, first box, number of boxes, task) for all chunks.
  template <typename Function>
  void run(int64_t count, const Function& function) const {
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % chunks * chunk;
        function(task / chunks, first, std::min(chunk, count - first), task);
      }
    });
  }
};

template <typename T>
std::vector<GroundTruths<accumulate_t<T>>> load_ground_truths(const MatchArguments& args) {
  std::vector<GroundTruths<accumulate_t<T>>> images(args.gt.batch);
  const bool* valid = args.gt_valid.template const_data_ptr<bool>();
  for (int64_t image = 0; image < args.gt.batch; ++image) {
    images[image].load(args.gt.data<T>() + image * args.gt.stride, valid + image * args.gt.count, args.gt.count);
  }
  return images;
}

// The largest IoU of each ground truth over the chunks of its image; a maximum does not depend on the order.
// Writes gt_max of the image, and targets: what a best box of a ground truth must reach, NaN where none is wanted.
template <typename T, typename A>
void combine(const GroundTruths<A>& gt, const A* partial, int64_t chunks, int64_t count, A low_quality, T* gt_max,
             A* targets) {
  std::fill_n(gt_max, count, static_cast<T>(A(0)));
  for (size_t g = 0; g < gt.boxes.size(); ++g) {
    A largest = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) largest = greater(partial[chunk * count + g], largest);
    gt_max[gt.indices[g]] = static_cast<T>(largest);
    targets[g] = wants_best(largest, low_quality) ? largest : std::numeric_limits<A>::quiet_NaN();
  }
}

MatchPair match_boxes_cpu(const Tensor& boxes_, const Tensor& gt_boxes, const Tensor& gt_valid) {
  const MatchArguments args(boxes_, gt_boxes, gt_valid);
  const int64_t count = args.boxes.count;
  Tensor max_iou = args.make(count, args.type());
  Tensor gt_index = args.make(count, ScalarType::Long);
  dispatch_floating(args.type(), "match_boxes", [&](auto type) {
    using T = decltype(type);
    const auto images = load_ground_truths<T>(args);
    const T* boxes = args.boxes.data<T>();
    T* iou = max_iou.mutable_data_ptr<T>();
    int64_t* index = gt_index.mutable_data_ptr<int64_t>();
    Split(args).run(count, [&](int64_t image, int64_t first, int64_t size, int64_t) {
      const int64_t row = image * count + first;
      match_range(boxes + image * args.boxes.stride + 4 * first, size, images[image], iou + row, index + row,
                  static_cast<accumulate_t<T>*>(nullptr));
    });
  });
  return {max_iou, gt_index};
}

MatchQuad match_boxes_best_cpu(const Tensor& boxes_, const Tensor& gt_boxes, const Tensor& gt_valid,
                               double low_quality) {
  const MatchArguments args(boxes_, gt_boxes, gt_valid);
  const int64_t count = args.boxes.count;
  const int64_t gts = args.gt.count;
  Tensor max_iou = args.make(count, args.type());
  Tensor gt_index = args.make(count, ScalarType::Long);
  Tensor gt_max_iou = args.make(gts, args.type());
  Tensor is_best = args.make(count, ScalarType::Bool);
  dispatch_floating(args.type(), "match_boxes", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const auto images = load_ground_truths<T>(args);
    const Split split(args);
    std::vector<A> partial(split.tasks * gts);
    const T* boxes = args.boxes.data<T>();
    T* iou = max_iou.mutable_data_ptr<T>();
    int64_t* index = gt_index.mutable_data_ptr<int64_t>();
    split.run(count, [&](int64_t image, int64_t first, int64_t size, int64_t task) {
      const int64_t row = image * count + first;
      match_range(boxes + image * args.boxes.stride + 4 * first, size, images[image], iou + row, index + row,
                  partial.data() + task * gts);
    });
    std::vector<A> targets(args.boxes.batch * gts);
    T* gt_max = gt_max_iou.mutable_data_ptr<T>();
    for (int64_t image = 0; image < args.boxes.batch; ++image) {
      combine<T, A>(images[image], partial.data() + image * split.chunks * gts, split.chunks, gts,
                    static_cast<A>(low_quality), gt_max + image * gts, targets.data() + image * gts);
    }
    bool* best = is_best.mutable_data_ptr<bool>();
    split.run(count, [&](int64_t image, int64_t first, int64_t size, int64_t task) {
      // A chunk whose own maximum falls short holds no best box: few overlaps are computed twice.
      const A* target = targets.data() + image * gts;
      std::vector<size_t> hits;
      for (size_t g = 0; g < images[image].boxes.size(); ++g) {
        if (partial[task * gts + g] == target[g]) hits.push_back(g);
      }
      mark_range<T, A>(boxes + image * args.boxes.stride + 4 * first, size, images[image], hits, target,
                       best + image * count + first);
    });
  });
  return {max_iou, gt_index, gt_max_iou, is_best};
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_FRAGMENT(drcnn, m) {
  m.def("match_boxes(Tensor boxes, Tensor gt_boxes, Tensor gt_valid) -> (Tensor, Tensor)");
  m.def(
      "match_boxes_best(Tensor boxes, Tensor gt_boxes, Tensor gt_valid, float low_quality) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(drcnn, CPU, m) {
  m.impl("match_boxes", TORCH_BOX(&drcnn::match_boxes_cpu));
  m.impl("match_boxes_best", TORCH_BOX(&drcnn::match_boxes_best_cpu));
}
