// nms on the CPU, and the schema of the operator.
//
// Each image is sorted by score and then, stably, by group. The (image, group) segments are independent of each
// other and shared out among the threads; each box is tested against the kept boxes of its segment, 16 at a
// time. All segments stop at the same rank now and then: once an image has filled its slots, no box of a later
// rank can reach the output.

#include <algorithm>
#include <atomic>
#include <tuple>
#include <utility>
#include <vector>

#include "nms_arguments.h"

namespace drcnn {
namespace {

constexpr int64_t kLanes = 16;       // kept boxes that are tested together
constexpr int64_t kMinRanks = 1024;  // ranks that are decided before slots are counted
constexpr int64_t kDigitBits = 11;
constexpr int64_t kPlanes = 5;  // x1, y1, x2, y2, area

// Below this a second thread costs more than it saves.
constexpr int64_t kSharedBoxes = 8192;     // to sort
constexpr int64_t kSharedPairs = 1 << 18;  // to test

struct Item {
  uint64_t key;
  uint32_t value;
};

// The boxes of one image and group, by rising rank.
struct Segment {
  int64_t next;  // in Image::ranks: the first box that is not decided
  int64_t begin;
  int64_t end;
  int64_t kept = 0;
  int64_t capacity = 0;  // of its planes; 0 for a segment so short that it needs none
  int64_t planes = 0;    // where they begin
};

struct Image {
  const float* boxes;
  std::vector<uint32_t> order;  // position of the box of each rank; rank 0 has the highest score
  std::vector<uint32_t> ranks;  // segment after segment
  std::vector<Segment> segments;
  std::vector<uint8_t> keep;  // by rank
  std::vector<float> planes;  // kept boxes of each segment, coordinate by coordinate
  int64_t decided = 0;        // ranks below are decided

  Corners corners(uint32_t rank) const {
    const float* box = boxes + 4 * static_cast<int64_t>(order[rank]);
    return {box[0], box[1], box[2], box[3]};
  }
};

// Stable, by rising key.
void radix_sort(std::vector<Item>& items, uint64_t max_key) {
  std::vector<Item> other(items.size());
  std::vector<uint32_t> starts(int64_t{1} << kDigitBits);
  const uint64_t digit_mask = starts.size() - 1;
  for (int64_t shift = 0; shift < 64 && (max_key >> shift) != 0; shift += kDigitBits) {
    std::fill(starts.begin(), starts.end(), 0);
    for (const Item& item : items) ++starts[(item.key >> shift) & digit_mask];
    uint32_t total = 0;
    for (uint32_t& start : starts) total += std::exchange(start, total);
    for (const Item& item : items) other[starts[(item.key >> shift) & digit_mask]++] = item;
    items.swap(other);
  }
}

void sort_by_score(Image& image, const float* scores, const bool* valid, int64_t count) {
  std::vector<Item> items;
  items.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    if (valid[i]) items.push_back({nms_sort_key(scores[i]), static_cast<uint32_t>(i)});
  }
  radix_sort(items, std::numeric_limits<uint32_t>::max());
  image.order.reserve(items.size());
  for (const Item& item : items) image.order.push_back(item.value);
  image.keep.assign(items.size(), 0);
}

// Splits the ranks by group; the segments come by rising group.
void split_by_group(Image& image, const int64_t* groups, int64_t slots) {
  const int64_t count = static_cast<int64_t>(image.order.size());
  if (count == 0) return;
  std::vector<Item> items(count);
  int64_t lowest = std::numeric_limits<int64_t>::max();
  for (const uint32_t position : image.order) lowest = std::min(lowest, groups[position]);
  uint64_t max_key = 0;
  for (int64_t rank = 0; rank < count; ++rank) {
    const uint64_t key = static_cast<uint64_t>(groups[image.order[rank]]) - static_cast<uint64_t>(lowest);
    items[rank] = {key, static_cast<uint32_t>(rank)};
    max_key = std::max(max_key, key);
  }
  radix_sort(items, max_key);
  image.ranks.reserve(count);
  for (const Item& item : items) image.ranks.push_back(item.value);
  int64_t size = 0;
  for (int64_t begin = 0, end; begin < count; begin = end) {
    for (end = begin + 1; end < count && items[end].key == items[begin].key;) ++end;
    Segment segment{begin, begin, end};
    if (end - begin > kLanes) {
      segment.capacity = (std::min(end - begin, slots) + kLanes - 1) / kLanes * kLanes;
      segment.planes = size;
      size += kPlanes * segment.capacity;
    }
    image.segments.push_back(segment);
  }
  // A lane without a box has the area NaN, which overlaps nothing.
  image.planes.assign(size, std::numeric_limits<float>::quiet_NaN());
}

// Whether a box overlaps one of the first `kept` of the planes.
DRCNN_CPU_CLONES bool overlaps_kept(const float* planes, int64_t capacity, int64_t kept, Corners box, float area,
                                    float threshold) {
  const float* x1 = planes;
  const float* y1 = x1 + capacity;
  const float* x2 = y1 + capacity;
  const float* y2 = x2 + capacity;
  const float* areas = y2 + capacity;
  float intersection[kLanes];
  float joined[kLanes];
  for (int64_t first = 0; first < kept; first += kLanes) {
    int32_t candidates = 0;
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t k = first + l;
      intersection[l] = nms_intersection({x1[k], y1[k], x2[k], y2[k]}, box);
      joined[l] = areas[k] + area - intersection[l];
      candidates |= nms_may_overlap(intersection[l], joined[l], threshold);
    }
    if (!candidates) continue;
    int32_t overlapping = 0;
    for (int64_t l = 0; l < kLanes; ++l) overlapping |= intersection[l] / joined[l] > threshold;
    if (overlapping) return true;
  }
  return false;
}

// The same for a segment of few boxes, which needs no planes.
bool overlaps_earlier(const Image& image, const Segment& segment, const Corners& box, float area,
                      float threshold) {
  for (int64_t i = segment.begin; i < segment.next; ++i) {
    const uint32_t rank = image.ranks[i];
    if (!image.keep[rank]) continue;
    const Corners other = image.corners(rank);
    if (nms_overlaps(other, nms_area(other), box, area, threshold)) return true;
  }
  return false;
}

// Decides the boxes of a segment whose rank is below `end_rank`.
void decide(Image& image, Segment& segment, int64_t end_rank, float threshold, int64_t slots) {
  float* planes = image.planes.data() + segment.planes;
  for (; segment.next < segment.end && segment.kept < slots; ++segment.next) {
    const uint32_t rank = image.ranks[segment.next];
    if (rank >= end_rank) return;
    const Corners box = image.corners(rank);
    const float area = nms_area(box);
    const bool overlaps =
        segment.capacity > 0 ? overlaps_kept(planes, segment.capacity, segment.kept, box, area, threshold)
                             : overlaps_earlier(image, segment, box, area, threshold);
    if (overlaps) continue;
    if (segment.capacity > 0) {
      float* lane = planes + segment.kept;
      for (const float value : {box.x1, box.y1, box.x2, box.y2, area}) {
        *lane = value;
        lane += segment.capacity;
      }
    }
    image.keep[rank] = 1;
    ++segment.kept;
  }
}

// Runs task(0), ..., task(count - 1), each on the first thread that is free, or all of them on this one.
template <typename Task>
void share_out(int64_t count, bool shared, const Task& task) {
  if (!shared) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

// Decides ranks until every image has filled its slots or has no box left.
void decide_all(std::vector<Image>& images, float threshold, int64_t slots) {
  std::vector<std::pair<Image*, Segment*>> tasks;
  for (int64_t ranks = std::max(kMinRanks, 2 * slots);; ranks *= 2) {
    tasks.clear();
    int64_t pairs = 0;
    for (Image& image : images) {
      int64_t kept = 0;
      for (const Segment& segment : image.segments) kept += segment.kept;
      if (image.decided == static_cast<int64_t>(image.order.size()) || kept >= slots) continue;
      image.decided = std::min(ranks, static_cast<int64_t>(image.order.size()));
      for (Segment& segment : image.segments) {
        tasks.emplace_back(&image, &segment);
        pairs += (segment.end - segment.next) * std::min(segment.end - segment.begin, slots);
      }
    }
    if (tasks.empty()) return;
    share_out(static_cast<int64_t>(tasks.size()), pairs > kSharedPairs, [&](int64_t i) {
      decide(*tasks[i].first, *tasks[i].second, tasks[i].first->decided, threshold, slots);
    });
  }
}

std::tuple<Tensor, Tensor> nms_cpu(const Tensor& boxes, const Tensor& scores, const Tensor& groups,
                                   const Tensor& valid, double iou_threshold, int64_t slots) {
  const NmsArguments args("nms", boxes, scores, groups, valid, iou_threshold, slots);
  Tensor index = args.new_output(ScalarType::Long);
  Tensor kept = args.new_output(ScalarType::Bool);
  std::vector<Image> images(args.images);
  const bool* all_valid = args.valid.const_data_ptr<bool>();
  const int64_t boxes_to_sort = std::count(all_valid, all_valid + args.images * args.count, true);
  share_out(args.images, boxes_to_sort > kSharedBoxes, [&](int64_t b) {
    const int64_t offset = b * args.count;
    images[b].boxes = args.boxes.const_data_ptr<float>() + 4 * offset;
    sort_by_score(images[b], args.scores.const_data_ptr<float>() + offset,
                  all_valid + offset, args.count);
    split_by_group(images[b], args.groups.const_data_ptr<int64_t>() + offset, slots);
  });
  decide_all(images, args.threshold, slots);
  int64_t* index_out = index.mutable_data_ptr<int64_t>();
  bool* kept_out = kept.mutable_data_ptr<bool>();
  for (const Image& image : images) {
    int64_t slot = 0;
    for (int64_t rank = 0; rank < image.decided && slot < slots; ++rank) {
      if (!image.keep[rank]) continue;
      index_out[slot] = image.order[rank];
      kept_out[slot++] = true;
    }
    std::fill(index_out + slot, index_out + slots, 0);
    std::fill(kept_out + slot, kept_out + slots, false);
    index_out += slots;
    kept_out += slots;
  }
  return {index, kept};
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_FRAGMENT(drcnn, m) {
  m.def(
      "nms(Tensor boxes, Tensor scores, Tensor groups, Tensor valid, float iou_threshold, SymInt slots) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(drcnn, CPU, m) { m.impl("nms", TORCH_BOX(&drcnn::nms_cpu)); }
