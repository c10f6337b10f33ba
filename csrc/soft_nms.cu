// soft_nms on CUDA: a radix sort by bucket of groups, one kernel that takes the boxes, a radix sort of what was
// taken, and one kernel that writes the fixed-size output.
//
// The boxes of each image are split by group into kBuckets buckets. A bucket mostly holds one group; where it
// holds more, boxes are tested for their group. One block takes the boxes of a bucket, round by round: one pass
// lowers the scores for the box that was taken last and finds the next. The output is the best of all buckets.
// Memory is O(N), nothing is read by the host, and no result depends on timing.

#include <algorithm>
#include <bit>
#include <tuple>

#include "launch.h"
#include "nms_buckets.h"
#include "nms_workspace.h"
#include "soft_nms_arguments.h"

namespace drcnn {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kKeyThreads = 256;
constexpr uint32_t kNotTaken = 0xffffffffu;  // above every key of a score

// Memory of one call; B * N entries each.
struct Workspace {
  uint64_t* keys;
  uint64_t* sorted_keys;  // image and bucket; image and falling score
  uint64_t* taken_keys;   // by image and position: image and falling score
  uint32_t* values;
  uint32_t* order;   // positions, bucket after bucket
  uint32_t* sorted;  // positions by falling score
  float4* boxes;     // these three bucket after bucket
  int64_t* groups;
  float* scores;

  static constexpr int64_t kBytes = sizeof(float4) + 4 * sizeof(uint64_t) + 4 * sizeof(uint32_t);

  void place(void* memory, int64_t total) {
    boxes = static_cast<float4*>(memory);
    keys = reinterpret_cast<uint64_t*>(boxes + total);
    sorted_keys = keys + total;
    taken_keys = sorted_keys + total;
    groups = reinterpret_cast<int64_t*>(taken_keys + total);
    values = reinterpret_cast<uint32_t*>(groups + total);
    order = values + total;
    sorted = order + total;
    scores = reinterpret_cast<float*>(sorted + total);
  }
};

__global__ void __launch_bounds__(kKeyThreads)
    soft_nms_keys_kernel(const int64_t* groups, const bool* valid, int64_t total, int64_t count, Workspace work) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kKeyThreads + threadIdx.x;
  if (i >= total) return;
  const int64_t image = i / count;
  const uint64_t bucket = valid[i] ? bucket_of(groups[i]) : kBuckets;
  work.keys[i] = static_cast<uint64_t>(image) << (kBucketBits + 1) | bucket;
  work.taken_keys[i] = static_cast<uint64_t>(image) << 32 | kNotTaken;
  work.values[i] = static_cast<uint32_t>(i - image * count);
}

// Rises with the score, and falls with the place among those of one score; negative if the box is gone.
__device__ int64_t round_key(float score, int64_t place) {
  const uint64_t low = 0xffffffffu - static_cast<uint32_t>(place);
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(float_bits(score))) << 32 | low);
}

__device__ int64_t warp_max(int64_t value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int64_t other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// The greatest value of the block, in every thread. `warps` must not be that of the call before: a thread may
// still read it.
__device__ int64_t block_max(int64_t value, int64_t* warps) {
  value = warp_max(value);
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_max(warps[lane % kWarps]);
}

// Takes the boxes of bucket blockIdx.x % kBuckets of image blockIdx.x / kBuckets, at most `slots`: no later one
// of the bucket can reach the output. Each thread keeps its own boxes from round to round.
template <SoftNmsMethod kMethod, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    soft_nms_take_kernel(const float* boxes, const float* scores, const int64_t* groups, int64_t count,
                         SoftNmsRule rule, int64_t slots, Workspace work) {
  __shared__ int64_t warps[2][kWarps];
  __shared__ int64_t bounds[2];
  const int64_t image = blockIdx.x / kBuckets;
  const int64_t image_begin = image * count;
  if (threadIdx.x < 2) {
    const uint64_t key = static_cast<uint64_t>(image) << (kBucketBits + 1) | blockIdx.x % kBuckets;
    bounds[threadIdx.x] = lower_bound(work.sorted_keys, image_begin, image_begin + count, key + threadIdx.x);
  }
  __syncthreads();
  const int64_t begin = bounds[0];
  const int64_t end = bounds[1];
  int64_t best = -1;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int64_t position = image_begin + work.order[i];
    const Four<float> box = load_four<kAligned>(boxes + 4 * position);
    const float score = soft_nms_first_score(scores[position], rule.min_score);
    work.boxes[i] = {box.values[0], box.values[1], box.values[2], box.values[3]};
    work.groups[i] = groups[position];
    work.scores[i] = score;
    best = max(best, round_key(score, i - begin));
  }
  for (int64_t round = 0; round < slots; ++round) {
    const int64_t taken = block_max(best, warps[round % 2]);
    if (taken < 0) return;
    const int64_t place = begin + (0xffffffffu - static_cast<uint32_t>(taken));
    const uint32_t score_bits = static_cast<uint32_t>(taken >> 32);
    if (threadIdx.x == 0) {
      work.taken_keys[image_begin + work.order[place]] =
          static_cast<uint64_t>(image) << 32 | (0x7fffffffu - score_bits);
    }
    const Corners box = corners_of(work.boxes[place]);
    const float area = nms_area(box);
    const int64_t group = work.groups[place];
    best = -1;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      float score = work.scores[i];
      if (score < 0) continue;
      if (i == place) {
        work.scores[i] = kSoftNmsGone;
        continue;
      }
      if (work.groups[i] == group) {
        const Corners other = corners_of(work.boxes[i]);
        score = soft_nms_decayed<kMethod>(score, soft_nms_overlap(box, area, other, nms_area(other)), rule);
        work.scores[i] = score;
      }
      best = max(best, round_key(score, i - begin));
    }
  }
}

// Writes the first `slots` of the sorted boxes of each image, and 0 and false behind the last that was taken.
__global__ void __launch_bounds__(kKeyThreads)
    soft_nms_output_kernel(int64_t images, int64_t count, int64_t slots, Workspace work, int64_t* index,
                           float* scores, bool* valid) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kKeyThreads + threadIdx.x;
  if (i >= images * slots) return;
  const int64_t image = i / slots;
  const int64_t slot = i - image * slots;
  const uint32_t key = slot < count ? static_cast<uint32_t>(work.sorted_keys[image * count + slot]) : kNotTaken;
  const bool found = key != kNotTaken;
  index[i] = found ? work.sorted[image * count + slot] : 0;
  scores[i] = found ? __uint_as_float(0x7fffffffu - key) : 0.0f;
  valid[i] = found;
}

template <SoftNmsMethod kMethod>
void launch_take(const SoftNmsArguments& args, cudaStream_t stream, const Workspace& work) {
  const float* boxes = args.boxes.const_data_ptr<float>();
  const auto kernel =
      is_aligned_for_four<float>(boxes) ? &soft_nms_take_kernel<kMethod, true> : &soft_nms_take_kernel<kMethod, false>;
  kernel<<<static_cast<unsigned>(args.images * kBuckets), kThreads, 0, stream>>>(
      boxes, args.scores.const_data_ptr<float>(), args.groups.const_data_ptr<int64_t>(), args.count, args.rule,
      args.slots, work);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void take(const SoftNmsArguments& args, cudaStream_t stream, WorkspaceMemory<Workspace>& memory) {
  const Workspace& work = memory.work;
  const int image_bits = std::bit_width(static_cast<uint64_t>(args.images - 1));
  const unsigned key_blocks = static_cast<unsigned>((memory.total + kKeyThreads - 1) / kKeyThreads);
  soft_nms_keys_kernel<<<key_blocks, kKeyThreads, 0, stream>>>(
      args.groups.const_data_ptr<int64_t>(), args.valid.const_data_ptr<bool>(), memory.total, args.count, work);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  memory.sort(work.keys, work.order, kBucketBits + 1 + image_bits, stream);
  switch (args.method) {
    case SoftNmsMethod::kHard:
      launch_take<SoftNmsMethod::kHard>(args, stream, work);
      break;
    case SoftNmsMethod::kLinear:
      launch_take<SoftNmsMethod::kLinear>(args, stream, work);
      break;
    case SoftNmsMethod::kGaussian:
      launch_take<SoftNmsMethod::kGaussian>(args, stream, work);
      break;
  }
  memory.sort(work.taken_keys, work.sorted, 32 + image_bits, stream);
}

std::tuple<Tensor, Tensor, Tensor> soft_nms_cuda(const Tensor& boxes, const Tensor& scores, const Tensor& groups,
                                                 const Tensor& valid, int64_t method, double iou_threshold,
                                                 double sigma, double min_score, int64_t slots) {
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const SoftNmsArguments args(boxes, scores, groups, valid, method, iou_threshold, sigma, min_score, slots);
  STD_TORCH_CHECK(args.images * std::max({args.count, args.slots, int64_t{kBuckets}}) <=
                      std::numeric_limits<int32_t>::max(),
                  "soft_nms: more than 2^31 - 1 boxes, or 2^23 - 1 images");
  Tensor index = args.new_output(ScalarType::Long);
  Tensor taken = args.new_output(ScalarType::Float);
  Tensor found = args.new_output(ScalarType::Bool);
  if (index.numel() == 0) return {index, taken, found};
  const cudaStream_t stream = current_stream(args.boxes.get_device_index());
  WorkspaceMemory<Workspace> memory(args.images * args.count, args.boxes);
  if (memory.total > 0) take(args, stream, memory);
  const unsigned blocks = static_cast<unsigned>((index.numel() + kKeyThreads - 1) / kKeyThreads);
  soft_nms_output_kernel<<<blocks, kKeyThreads, 0, stream>>>(
      args.images, args.count, args.slots, memory.work, index.mutable_data_ptr<int64_t>(),
      taken.mutable_data_ptr<float>(), found.mutable_data_ptr<bool>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {index, taken, found};
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_IMPL(drcnn, CUDA, m) { m.impl("soft_nms", TORCH_BOX(&drcnn::soft_nms_cuda)); }
