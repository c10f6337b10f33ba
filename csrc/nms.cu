// nms on CUDA: two radix sorts, one kernel that decides the boxes and one that writes the fixed-size output.
//
// The boxes of each image are ranked by score, and the ranks split by group into kBuckets buckets. A bucket
// mostly holds one group; where it holds more, pairs are tested for their group. One block decides a bucket, in
// rank order, kChunk boxes at a time: all of them against the kept boxes of the bucket, then among themselves.
// Memory is O(N), nothing is read by the host, and no result depends on timing.

#include <algorithm>
#include <bit>
#include <tuple>

#include <cub/block/block_scan.cuh>

#include "launch.h"
#include "nms_arguments.h"
#include "nms_buckets.h"
#include "nms_workspace.h"

namespace drcnn {
namespace {

constexpr int kThreads = 512;
constexpr int kChunk = 64;                  // boxes that are decided together; their bits fill one word
constexpr int kParts = kThreads / kChunk;   // threads that share the test of one box against the kept ones
constexpr int kWarps = kThreads / kWarp;
constexpr int kAhead = 4;                   // kept boxes that a thread loads before it looks at the result
constexpr int kKeyThreads = 256;
constexpr int kOutputThreads = 1024;
constexpr int kOutputItems = 4;

// Memory of one call; B * N entries each.
struct Workspace {
  uint64_t* keys;
  uint64_t* sorted_keys;  // sorts: image and score, then image and bucket
  uint32_t* values;
  uint32_t* order;  // position of the box of each rank
  uint32_t* ranks;  // bucket after bucket, each by rising rank
  bool* keep;       // by rank
  float4* kept_boxes;
  int64_t* kept_groups;  // kept boxes of a bucket, from the bucket's begin

  static constexpr int64_t kBytes = sizeof(float4) + 3 * sizeof(uint64_t) + 3 * sizeof(uint32_t) + sizeof(bool);

  void place(void* memory, int64_t total) {
    kept_boxes = static_cast<float4*>(memory);
    keys = reinterpret_cast<uint64_t*>(kept_boxes + total);
    sorted_keys = keys + total;
    kept_groups = reinterpret_cast<int64_t*>(sorted_keys + total);
    values = reinterpret_cast<uint32_t*>(kept_groups + total);
    order = values + total;
    ranks = order + total;
    keep = reinterpret_cast<bool*>(ranks + total);
  }
};

__global__ void __launch_bounds__(kKeyThreads)
    nms_score_keys_kernel(const float* scores, int64_t total, int64_t count, Workspace work) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kKeyThreads + threadIdx.x;
  if (i >= total) return;
  const int64_t image = i / count;
  work.keys[i] = static_cast<uint64_t>(image) << 32 | nms_sort_key(scores[i]);
  work.values[i] = static_cast<uint32_t>(i - image * count);
}

__global__ void __launch_bounds__(kKeyThreads)
    nms_bucket_keys_kernel(const int64_t* groups, const bool* valid, int64_t total, int64_t count,
                           Workspace work) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kKeyThreads + threadIdx.x;
  if (i >= total) return;
  const int64_t image = i / count;
  const int64_t box = image * count + work.order[i];
  const uint64_t bucket = valid[box] ? bucket_of(groups[box]) : kBuckets;
  work.keys[i] = static_cast<uint64_t>(image) << (kBucketBits + 1) | bucket;
  work.values[i] = static_cast<uint32_t>(i - image * count);
  work.keep[i] = false;
}

// The boxes that are being decided.
struct Chunk {
  float4 boxes[kChunk];
  float areas[kChunk];
  int64_t groups[kChunk];
  uint32_t ranks[kChunk];
  uint64_t earlier[kChunk];  // bits of the chunk's earlier boxes that a box overlaps
  uint32_t dropped[kWarps];  // bits of boxes that a kept box drops, as each warp found them
  uint64_t kept;             // bits of the boxes that are kept
};

// Whether box i of the chunk overlaps one of its share of the bucket's kept boxes.
__device__ bool overlaps_kept(const Chunk& chunk, int i, int part, const Workspace& work, int64_t begin,
                              int64_t kept, float threshold) {
  const Corners box = corners_of(chunk.boxes[i]);
  const float area = chunk.areas[i];
  const int64_t group = chunk.groups[i];
  for (int64_t first = part; first < kept; first += kParts * kAhead) {
    bool overlaps = false;
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int64_t k = first + ahead * kParts;
      if (k < kept) {
        const Corners other = corners_of(work.kept_boxes[begin + k]);
        overlaps |= nms_overlaps(other, nms_area(other), box, area, threshold) &&
                    work.kept_groups[begin + k] == group;
      }
    }
    if (overlaps) return true;
  }
  return false;
}

// Fills chunk.earlier; one warp for one box, one lane for two earlier ones.
__device__ void test_within(Chunk& chunk, int size, float threshold) {
  const int lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x / kWarp; i < size; i += kWarps) {
    uint64_t bits = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = lane + half * kWarp;
      const bool overlaps = j < i && chunk.groups[i] == chunk.groups[j] &&
                            nms_overlaps(corners_of(chunk.boxes[j]), chunk.areas[j], corners_of(chunk.boxes[i]),
                                         chunk.areas[i], threshold);
      bits |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, overlaps)) << (half * kWarp);
    }
    if (lane == 0) chunk.earlier[i] = bits;
  }
}

// One warp decides the chunk. A box without undecided or kept earlier ones is kept, one with a kept earlier one
// is dropped. Each round decides at least the first undecided box, and mostly many.
__device__ void decide_chunk(Chunk& chunk, int size) {
  const int lane = threadIdx.x % kWarp;
  uint64_t undecided = size == kChunk ? ~uint64_t{0} : (uint64_t{1} << size) - 1;
  for (int warp = 0; warp < kWarps; ++warp) {
    undecided &= ~(static_cast<uint64_t>(chunk.dropped[warp]) << (warp % 2 * kWarp));
  }
  uint64_t kept = 0;
  while (undecided != 0) {
    uint64_t keeps = 0;
    uint64_t drops = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = lane + half * kWarp;
      const bool waits = undecided >> i & 1;
      const uint64_t earlier = waits ? chunk.earlier[i] : 0;
      const bool drop = (earlier & kept) != 0;
      const bool keep = waits && (earlier & (kept | undecided)) == 0;
      keeps |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, keep)) << (half * kWarp);
      drops |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, drop)) << (half * kWarp);
    }
    kept |= keeps;
    undecided &= ~(keeps | drops);
  }
  if (lane == 0) chunk.kept = kept;
}

template <bool kAligned>
__device__ void load_chunk(Chunk& chunk, const float* boxes, const int64_t* groups, int64_t image_begin,
                           int64_t first, int size, const Workspace& work) {
  const int i = threadIdx.x;
  if (i >= size) return;
  const uint32_t rank = work.ranks[first + i];
  const int64_t position = image_begin + work.order[image_begin + rank];
  const Four<float> box = load_four<kAligned>(boxes + 4 * position);
  chunk.boxes[i] = {box.values[0], box.values[1], box.values[2], box.values[3]};
  chunk.areas[i] = nms_area(corners_of(chunk.boxes[i]));
  chunk.groups[i] = groups[position];
  chunk.ranks[i] = rank;
}

// Decides the boxes of bucket blockIdx.x % kBuckets of image blockIdx.x / kBuckets. Once it has kept `slots`
// boxes, no later box of the bucket can reach the output.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    nms_decide_kernel(const float* boxes, const int64_t* groups, int64_t count, float threshold, int64_t slots,
                      Workspace work) {
  __shared__ Chunk chunk;
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
  int64_t kept = 0;
  for (int64_t first = begin; first < end && kept < slots; first += kChunk) {
    const int size = static_cast<int>(end - first < kChunk ? end - first : kChunk);
    load_chunk<kAligned>(chunk, boxes, groups, image_begin, first, size, work);
    __syncthreads();
    const int i = threadIdx.x % kChunk;
    const bool drop = i < size && overlaps_kept(chunk, i, threadIdx.x / kChunk, work, begin, kept, threshold);
    const uint32_t dropped = __ballot_sync(0xffffffffu, drop);
    if (threadIdx.x % kWarp == 0) chunk.dropped[threadIdx.x / kWarp] = dropped;
    test_within(chunk, size, threshold);
    __syncthreads();
    if (threadIdx.x < kWarp) decide_chunk(chunk, size);
    __syncthreads();
    const uint64_t bits = chunk.kept;
    if (threadIdx.x < kChunk && (bits >> threadIdx.x & 1)) {
      const int64_t place = begin + kept + __popcll(bits & ((uint64_t{1} << threadIdx.x) - 1));
      work.kept_boxes[place] = chunk.boxes[threadIdx.x];
      work.kept_groups[place] = chunk.groups[threadIdx.x];
      work.keep[image_begin + chunk.ranks[threadIdx.x]] = true;
    }
    kept += __popcll(bits);
    __syncthreads();
  }
}

// Writes the first `slots` kept boxes of image blockIdx.x by rank, and 0 and false behind them.
__global__ void __launch_bounds__(kOutputThreads)
    nms_output_kernel(int64_t count, int64_t slots, Workspace work, int64_t* index, bool* valid) {
  using Scan = cub::BlockScan<int, kOutputThreads>;
  __shared__ typename Scan::TempStorage storage;
  const int64_t image_begin = blockIdx.x * count;
  index += blockIdx.x * slots;
  valid += blockIdx.x * slots;
  int64_t filled = 0;
  for (int64_t tile = 0; tile < count && filled < slots; tile += kOutputThreads * kOutputItems) {
    const int64_t first = tile + threadIdx.x * kOutputItems;
    bool keep[kOutputItems];
    int kept = 0;
#pragma unroll
    for (int item = 0; item < kOutputItems; ++item) {
      keep[item] = first + item < count && work.keep[image_begin + first + item];
      kept += keep[item];
    }
    int before, all;
    Scan(storage).ExclusiveSum(kept, before, all);
    int64_t slot = filled + before;
#pragma unroll
    for (int item = 0; item < kOutputItems; ++item) {
      if (!keep[item] || slot >= slots) continue;
      index[slot] = work.order[image_begin + first + item];
      valid[slot++] = true;
    }
    filled += all;
    __syncthreads();
  }
  for (int64_t slot = filled + threadIdx.x; slot < slots; slot += kOutputThreads) {
    index[slot] = 0;
    valid[slot] = false;
  }
}

void decide(const NmsArguments& args, cudaStream_t stream, WorkspaceMemory<Workspace>& memory) {
  const Workspace& work = memory.work;
  const int image_bits = std::bit_width(static_cast<uint64_t>(args.images - 1));
  const unsigned key_blocks = static_cast<unsigned>((memory.total + kKeyThreads - 1) / kKeyThreads);
  const int64_t* groups = args.groups.const_data_ptr<int64_t>();
  nms_score_keys_kernel<<<key_blocks, kKeyThreads, 0, stream>>>(args.scores.const_data_ptr<float>(), memory.total,
                                                                args.count, work);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  memory.sort(work.keys, work.order, 32 + image_bits, stream);
  nms_bucket_keys_kernel<<<key_blocks, kKeyThreads, 0, stream>>>(groups, args.valid.const_data_ptr<bool>(),
                                                                 memory.total, args.count, work);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  memory.sort(work.keys, work.ranks, kBucketBits + 1 + image_bits, stream);
  const float* boxes = args.boxes.const_data_ptr<float>();
  const auto kernel = is_aligned_for_four<float>(boxes) ? &nms_decide_kernel<true> : &nms_decide_kernel<false>;
  kernel<<<static_cast<unsigned>(args.images * kBuckets), kThreads, 0, stream>>>(boxes, groups, args.count,
                                                                                 args.threshold, args.slots, work);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> nms_cuda(const Tensor& boxes, const Tensor& scores, const Tensor& groups,
                                    const Tensor& valid, double iou_threshold, int64_t slots) {
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const NmsArguments args("nms", boxes, scores, groups, valid, iou_threshold, slots);
  STD_TORCH_CHECK(args.images * std::max(args.count, int64_t{kBuckets}) <= std::numeric_limits<int32_t>::max(),
                  "nms: more than 2^31 - 1 boxes, or 2^23 - 1 images");
  Tensor index = args.new_output(ScalarType::Long);
  Tensor kept = args.new_output(ScalarType::Bool);
  if (index.numel() == 0) return {index, kept};
  const cudaStream_t stream = current_stream(args.boxes.get_device_index());
  WorkspaceMemory<Workspace> memory(args.images * args.count, args.boxes);
  if (memory.total > 0) decide(args, stream, memory);
  nms_output_kernel<<<static_cast<unsigned>(args.images), kOutputThreads, 0, stream>>>(
      args.count, args.slots, memory.work, index.mutable_data_ptr<int64_t>(), kept.mutable_data_ptr<bool>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {index, kept};
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_IMPL(drcnn, CUDA, m) { m.impl("nms", TORCH_BOX(&drcnn::nms_cuda)); }
