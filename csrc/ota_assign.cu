// ota_assign on CUDA: one block per image, from the costs to the assignment.
//
// The costs are a row of predictions for each valid ground truth and one of zeros for the background. They stay
// in shared memory where they fit. An iteration is two passes: a thread for a prediction normalizes its shares,
// then a warp for a supplier adds up what it ships. Sums are made in a fixed order: no result depends on timing.

#include <algorithm>

#include "launch.h"
#include "ota_assign.h"
#include "ota_assign_arguments.h"
#include "valid_rows.h"

namespace drcnn {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kGrantedBytes = 48 * 1024;  // of dynamic shared memory that every GPU grants without asking

// Pointers of the arguments, as the kernel takes them.
struct OtaPointers {
  const float* logits;
  const float* boxes;
  const float* gt_boxes;
  const int64_t* gt_labels;
  const bool* gt_valid;
  const float* image_sizes;
  int64_t* gt_index;
  float* supply;
  int64_t* conflicts;
};

// Memory of one image. Suppliers are the valid ground truths, in order, and the background.
struct Scratch {
  float* cost;       // [suppliers][N]
  float* most;       // [N]: the largest score of a prediction
  float* unit;       // [N]: one over the sum of its exponentials
  float* potential;  // [suppliers]
  float* supply;     // [suppliers]
  int* rows;         // [suppliers - 1]: the valid ground truths

  static int64_t bytes(int64_t count, int64_t gts) {
    return static_cast<int64_t>(sizeof(float)) * ((gts + 1) * (count + 3) + 2 * count);
  }

  __device__ Scratch(void* memory, int count, int gts) {
    cost = static_cast<float*>(memory);
    most = cost + static_cast<int64_t>(gts + 1) * count;
    unit = most + count;
    potential = unit + count;
    supply = potential + gts + 1;
    rows = reinterpret_cast<int*>(supply + gts + 1);
  }

  // epsilon times the logarithm of a share, up to a constant of the prediction.
  __device__ float score(int supplier, int n, int count) const {
    return potential[supplier] - cost[static_cast<int64_t>(supplier) * count + n];
  }
};

__device__ float warp_sum(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__device__ float warp_min(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = lesser(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

__device__ Box<float> box_at(const float* boxes, int64_t index) {
  const float* box = boxes + 4 * index;
  return {box[0], box[1], box[2], box[3]};
}

// The sum of the `top` largest of `count` values, which are not negative, from the largest on. Called by one
// whole warp, of which each lane has its own values; those that are taken become -1.
__device__ float sum_of_largest(float* values, int count, int64_t top) {
  const int lane = threadIdx.x % kWarp;
  float sum = 0;
  for (int64_t round = 0; round < top && round < count; ++round) {
    float largest = -1;
    int place = lane;
    for (int n = lane; n < count; n += kWarp) {
      if (values[n] > largest) {
        largest = values[n];
        place = n;
      }
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, largest, offset);
      const int other_place = __shfl_xor_sync(0xffffffffu, place, offset);
      const bool is_other = other > largest || (other == largest && other_place < place);
      largest = is_other ? other : largest;
      place = is_other ? other_place : place;
    }
    if (place % kWarp == lane) values[place] = -1;
    sum += largest;
  }
  return sum;
}

// Costs and units of the ground truths, one warp for each.
__device__ void load_costs(const OtaPointers& in, const OtaRule& rule, int64_t image, int count, int64_t classes,
                           int gts, int valid, const Scratch& scratch) {
  const int lane = threadIdx.x % kWarp;
  const float* boxes = in.boxes + 4 * image * count;
  const float* logits = in.logits + image * count * classes;
  const float y_scale = 1.0f / in.image_sizes[2 * image];
  const float x_scale = 1.0f / in.image_sizes[2 * image + 1];
  for (int row = threadIdx.x / kWarp; row < valid; row += kWarps) {
    const int64_t g = image * gts + scratch.rows[row];
    const Box<float> gt = box_at(in.gt_boxes, g);
    const float area = box_area(gt);
    float* cost = scratch.cost + static_cast<int64_t>(row) * count;
    float sum = 0;
    if (!(rule.fixed_k > 0)) {
      for (int n = lane; n < count; n += kWarp) {
        const Box<float> box = box_at(boxes, n);
        cost[n] = iou_of(box, box_area(box), gt, area);
      }
      sum = sum_of_largest(cost, count, rule.top_q);
    }
    // A label that is no class reads nothing out of bounds.
    const int64_t label = min(max(in.gt_labels[g], int64_t{0}), classes - 1);
    float least = kOtaLargest;
    for (int n = lane; n < count; n += kWarp) {
      const Box<float> box = box_at(boxes, n);
      const float distance = ota_box_distance(box, gt, x_scale, y_scale);
      const float giou = giou_of(box, box_area(box), gt, area);
      cost[n] = ota_cost(logits[n * classes + label], distance, giou, rule);
      least = lesser(least, cost[n]);
    }
    least = warp_min(least);
    for (int n = lane; n < count; n += kWarp) cost[n] -= least;
    if (lane == 0) scratch.supply[row] = ota_units(sum, rule);
  }
}

// Scales the supplies, gives the background the rest, and starts the potentials.
__device__ void share_out(const OtaRule& rule, int count, int valid, const Scratch& scratch) {
  float total = 0;
  for (int row = 0; row < valid; ++row) total += scratch.supply[row];
  const float scale = ota_scale(total, count, rule);
  float shipped = 0;
  for (int row = 0; row < valid; ++row) {
    scratch.supply[row] = unfused_product(scratch.supply[row], scale);
    shipped += scratch.supply[row];
    scratch.potential[row] = 0;
  }
  scratch.supply[valid] = not_negative(static_cast<float>(count) - shipped);
  scratch.potential[valid] = 0;
}

__device__ void iterate(const OtaRule& rule, int count, int suppliers, const Scratch& scratch) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t step = 0; step < rule.iterations; ++step) {
    const float epsilon = ota_epsilon_at(step, rule);
    const float per_epsilon = 1.0f / epsilon;
    for (int n = threadIdx.x; n < count; n += kThreads) {
      float most = scratch.score(0, n, count);
      for (int s = 1; s < suppliers; ++s) most = greater(scratch.score(s, n, count), most);
      float sum = 0;
      for (int s = 0; s < suppliers; ++s) sum += exp_of_negative((scratch.score(s, n, count) - most) * per_epsilon);
      scratch.most[n] = most;
      scratch.unit[n] = 1.0f / sum;
    }
    __syncthreads();
    for (int s = threadIdx.x / kWarp; s < suppliers; s += kWarps) {
      const float* cost = scratch.cost + static_cast<int64_t>(s) * count;
      const float potential = scratch.potential[s];
      float shipped = 0;
      for (int n = lane; n < count; n += kWarp) {
        shipped += exp_of_negative((potential - cost[n] - scratch.most[n]) * per_epsilon) * scratch.unit[n];
      }
      shipped = warp_sum(shipped);
      if (lane == 0) {
        scratch.potential[s] = potential + ota_move(scratch.supply[s], shipped, epsilon, step + 1 == rule.iterations);
      }
    }
    __syncthreads();
  }
}

// Writes who takes each prediction, and returns in every thread how many are contested by another ground truth.
__device__ int64_t take(const OtaRule& rule, int count, int valid, const Scratch& scratch, int64_t* gt_index) {
  int64_t conflicts = 0;
  for (int first = 0; first < count; first += kThreads) {
    const int n = first + static_cast<int>(threadIdx.x);
    bool is_contested = false;
    if (n < count) {
      float most = scratch.score(0, n, count);
      for (int s = 1; s <= valid; ++s) most = greater(scratch.score(s, n, count), most);
      int taken_by = 0;
      while (scratch.score(taken_by, n, count) < most - kOtaTie * rule.epsilon) ++taken_by;
      for (int s = 0; s < valid; ++s) {
        is_contested |= s != taken_by && scratch.score(s, n, count) >= most - kOtaClaim * rule.epsilon;
      }
      gt_index[n] = taken_by < valid ? scratch.rows[taken_by] : -1;
    }
    conflicts += __syncthreads_count(is_contested);
  }
  return conflicts;
}

template <bool kShared>
__global__ void __launch_bounds__(kThreads, 1)
    ota_assign_kernel(OtaPointers in, OtaRule rule, int count, int64_t classes, int gts, unsigned char* workspace,
                      int64_t scratch_bytes) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int valid;
  const int64_t image = blockIdx.x;
  const Scratch scratch(kShared ? memory : workspace + image * scratch_bytes, count, gts);
  if (threadIdx.x < kWarp) {
    const int found = valid_rows(in.gt_valid + image * gts, gts, scratch.rows);
    if (threadIdx.x == 0) valid = found;
  }
  __syncthreads();
  const int suppliers = valid + 1;
  load_costs(in, rule, image, count, classes, gts, valid, scratch);
  float* background = scratch.cost + static_cast<int64_t>(valid) * count;
  for (int n = threadIdx.x; n < count; n += kThreads) background[n] = 0;
  for (int g = threadIdx.x; g < gts; g += kThreads) in.supply[image * gts + g] = 0;
  __syncthreads();
  if (threadIdx.x == 0) share_out(rule, count, valid, scratch);
  __syncthreads();
  for (int row = threadIdx.x; row < valid; row += kThreads) {
    in.supply[image * gts + scratch.rows[row]] = scratch.supply[row];
  }
  if (valid > 0) iterate(rule, count, suppliers, scratch);
  const int64_t conflicts = take(rule, count, valid, scratch, in.gt_index + image * count);
  if (threadIdx.x == 0) in.conflicts[image] = conflicts;
}

// The most dynamic shared memory that a block may have on the current device.
int64_t shared_limit() {
  int device = 0, bytes = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes - static_cast<int64_t>(sizeof(int)) - 1024;  // less what the kernel and the driver use themselves
}

OtaResult ota_assign_cuda(const Tensor& logits, const Tensor& boxes, const Tensor& gt_boxes, const Tensor& gt_labels,
                          const Tensor& gt_valid, const Tensor& image_sizes, double class_weight, double l1_weight,
                          double giou_weight, double alpha, double gamma, int64_t top_q, int64_t fixed_k,
                          double unit_offset, double max_share, double epsilon, int64_t iterations) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const OtaArguments args(logits, boxes, gt_boxes, gt_labels, gt_valid, image_sizes,
                          ota_rule(class_weight, l1_weight, giou_weight, alpha, gamma, top_q, fixed_k, unit_offset,
                                   max_share, epsilon, iterations));
  STD_TORCH_CHECK(std::max({args.images, args.count, args.gts}) < 2147483647 - kThreads,
                  "ota_assign: too many images, predictions or ground truths");
  Tensor gt_index = args.make({args.images, args.count}, ScalarType::Long);
  Tensor supply = args.make({args.images, args.gts}, ScalarType::Float);
  Tensor conflicts = args.make({args.images}, ScalarType::Long);
  if (args.images == 0) return {gt_index, supply, conflicts};
  const int64_t bytes = Scratch::bytes(args.count, args.gts);
  const bool is_shared = bytes <= shared_limit();
  Tensor workspace = args.make({is_shared ? 0 : args.images * bytes}, ScalarType::Byte);
  const auto kernel = is_shared ? &ota_assign_kernel<true> : &ota_assign_kernel<false>;
  if (is_shared && bytes > kGrantedBytes) {
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  }
  const OtaPointers pointers{args.logits.const_data_ptr<float>(),      args.boxes.const_data_ptr<float>(),
                             args.gt_boxes.const_data_ptr<float>(),    args.gt_labels.const_data_ptr<int64_t>(),
                             args.gt_valid.const_data_ptr<bool>(),     args.image_sizes.const_data_ptr<float>(),
                             gt_index.mutable_data_ptr<int64_t>(),     supply.mutable_data_ptr<float>(),
                             conflicts.mutable_data_ptr<int64_t>()};
  kernel<<<static_cast<unsigned>(args.images), kThreads, is_shared ? bytes : 0,
           current_stream(args.logits.get_device_index())>>>(
      pointers, args.rule, static_cast<int>(args.count), args.classes, static_cast<int>(args.gts),
      static_cast<unsigned char*>(workspace.mutable_data_ptr()), bytes);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {gt_index, supply, conflicts};
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_IMPL(drcnn, CUDA, m) { m.impl("ota_assign", TORCH_BOX(&drcnn::ota_assign_cuda)); }
