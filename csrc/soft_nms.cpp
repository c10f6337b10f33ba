// soft_nms on the CPU, and the schema of the operator.
//
// The boxes of an image are laid out group after group. A heap holds the best box of each group; the best of
// all is taken, its group's scores are lowered, and the group's next best goes into the heap. A group of which
// nothing is taken costs one pass, so that the work is that of the groups that reach the output.

#include <algorithm>
#include <tuple>
#include <vector>

#include "soft_nms_arguments.h"

namespace drcnn {
namespace {

constexpr int64_t kPlanes = 6;             // x1, y1, x2, y2, area, score
constexpr int64_t kSharedPairs = 1 << 20;  // below this a second thread costs more than it saves

// The boxes of one image and group.
struct Segment {
  int64_t begin;
  int64_t end;
};

// The best box that a segment has left.
struct Head {
  float score;
  uint32_t position;  // of the box in the image
  int64_t place;      // of the box in the planes
  Segment segment;

  // By rising score, ties by falling position, as a heap that gives the greatest wants it.
  bool operator<(const Head& other) const {
    return score != other.score ? score < other.score : position > other.position;
  }
};

// The boxes of one image that can be taken, by group and position.
struct Image {
  std::vector<uint32_t> positions;
  std::vector<float> planes;
  std::vector<Segment> segments;
  std::vector<Head> heads;  // a heap

  int64_t count() const { return static_cast<int64_t>(positions.size()); }
  float* plane(int64_t number) { return planes.data() + number * count(); }
};

Image lay_out(const SoftNmsArguments& args, int64_t image_begin) {
  const float min_score = args.rule.min_score;
  const float* boxes = args.boxes.const_data_ptr<float>() + 4 * image_begin;
  const float* scores = args.scores.const_data_ptr<float>() + image_begin;
  const int64_t* groups = args.groups.const_data_ptr<int64_t>() + image_begin;
  const bool* valid = args.valid.const_data_ptr<bool>() + image_begin;
  Image image;
  for (int64_t i = 0; i < args.count; ++i) {
    if (valid[i] && scores[i] >= min_score) image.positions.push_back(static_cast<uint32_t>(i));
  }
  std::stable_sort(image.positions.begin(), image.positions.end(),
                   [&](uint32_t a, uint32_t b) { return groups[a] < groups[b]; });
  const int64_t count = image.count();
  image.planes.resize(kPlanes * count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = image.positions[i];
    const float* box = boxes + 4 * position;
    for (int64_t c = 0; c < 4; ++c) image.plane(c)[i] = box[c];
    image.plane(4)[i] = nms_area({box[0], box[1], box[2], box[3]});
    image.plane(5)[i] = soft_nms_first_score(scores[position], min_score);
  }
  for (int64_t begin = 0, end; begin < count; begin = end) {
    const int64_t group = groups[image.positions[begin]];
    for (end = begin + 1; end < count && groups[image.positions[end]] == group;) ++end;
    image.segments.push_back({begin, end});
  }
  return image;
}

// Lowers the scores of `size` boxes after the box at `place` among them was taken, which is gone then.
template <SoftNmsMethod kMethod>
DRCNN_HOST_DEVICE void lower(const float* x1, const float* y1, const float* x2, const float* y2,
                             const float* areas, float* scores, int64_t size, int64_t place,
                             const SoftNmsRule& rule) {
  const Corners box{x1[place], y1[place], x2[place], y2[place]};
  const float area = areas[place];
  scores[place] = kSoftNmsGone;
  for (int64_t i = 0; i < size; ++i) {
    const float overlap = soft_nms_overlap(box, area, {x1[i], y1[i], x2[i], y2[i]}, areas[i]);
    scores[i] = soft_nms_decayed<kMethod>(scores[i], overlap, rule);
  }
}

DRCNN_CPU_CLONES void lower(SoftNmsMethod method, const float* x1, const float* y1, const float* x2,
                            const float* y2, const float* areas, float* scores, int64_t size, int64_t place,
                            const SoftNmsRule& rule) {
  switch (method) {
    case SoftNmsMethod::kHard:
      return lower<SoftNmsMethod::kHard>(x1, y1, x2, y2, areas, scores, size, place, rule);
    case SoftNmsMethod::kLinear:
      return lower<SoftNmsMethod::kLinear>(x1, y1, x2, y2, areas, scores, size, place, rule);
    case SoftNmsMethod::kGaussian:
      return lower<SoftNmsMethod::kGaussian>(x1, y1, x2, y2, areas, scores, size, place, rule);
  }
}

// The bits of the highest of `size` scores; negative if all are gone.
DRCNN_CPU_CLONES int32_t highest(const float* scores, int64_t size) {
  int32_t best = -1;
  for (int64_t i = 0; i < size; ++i) best = std::max(best, float_bits(scores[i]));
  return best;
}

// Puts the best box of a segment into the heap, if it has one left.
void push_head(Image& image, Segment segment) {
  const float* scores = image.plane(5);
  const int32_t best = highest(scores + segment.begin, segment.end - segment.begin);
  if (best < 0) return;
  const float score = float_of_bits(best);
  const int64_t place = std::find(scores + segment.begin, scores + segment.end, score) - scores;
  image.heads.push_back({score, image.positions[place], place, segment});
  std::push_heap(image.heads.begin(), image.heads.end());
}

// Fills the slots of one image.
void take_best(Image& image, const SoftNmsArguments& args, int64_t* index, float* scores, bool* valid) {
  for (const Segment& segment : image.segments) push_head(image, segment);
  int64_t slot = 0;
  for (; slot < args.slots && !image.heads.empty(); ++slot) {
    std::pop_heap(image.heads.begin(), image.heads.end());
    const Head head = image.heads.back();
    image.heads.pop_back();
    index[slot] = head.position;
    scores[slot] = head.score;
    valid[slot] = true;
    const auto [begin, end] = head.segment;
    float* plane[kPlanes];
    for (int64_t p = 0; p < kPlanes; ++p) plane[p] = image.plane(p) + begin;
    lower(args.method, plane[0], plane[1], plane[2], plane[3], plane[4], plane[5], end - begin,
          head.place - begin, args.rule);
    push_head(image, head.segment);
  }
  std::fill(index + slot, index + args.slots, 0);
  std::fill(scores + slot, scores + args.slots, 0.0f);
  std::fill(valid + slot, valid + args.slots, false);
}

std::tuple<Tensor, Tensor, Tensor> soft_nms_cpu(const Tensor& boxes, const Tensor& scores, const Tensor& groups,
                                                const Tensor& valid, int64_t method, double iou_threshold,
                                                double sigma, double min_score, int64_t slots) {
  const SoftNmsArguments args(boxes, scores, groups, valid, method, iou_threshold, sigma, min_score, slots);
  Tensor index = args.new_output(ScalarType::Long);
  Tensor taken = args.new_output(ScalarType::Float);
  Tensor found = args.new_output(ScalarType::Bool);
  int64_t* index_out = index.mutable_data_ptr<int64_t>();
  float* taken_out = taken.mutable_data_ptr<float>();
  bool* found_out = found.mutable_data_ptr<bool>();
  const bool* all_valid = args.valid.const_data_ptr<bool>();
  const bool shared = std::count(all_valid, all_valid + args.images * args.count, true) * slots > kSharedPairs;
  torch::stable::parallel_for(0, args.images, shared ? 1 : args.images, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      Image image = lay_out(args, b * args.count);
      take_best(image, args, index_out + b * slots, taken_out + b * slots, found_out + b * slots);
    }
  });
  return {index, taken, found};
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_FRAGMENT(drcnn, m) {
  m.def(
      "soft_nms(Tensor boxes, Tensor scores, Tensor groups, Tensor valid, int method, float iou_threshold, "
      "float sigma, float min_score, SymInt slots) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(drcnn, CPU, m) { m.impl("soft_nms", TORCH_BOX(&drcnn::soft_nms_cpu)); }
