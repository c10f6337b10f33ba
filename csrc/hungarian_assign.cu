// hungarian_assign on CUDA: one block per image serves the ground truths, its threads share the predictions.
//
// A step of the search is one pass of each thread over its own columns and one barrier, which finds the nearest
// column of all. Costs are laid out ground truth by ground truth in double first. The prices stay in shared
// memory, where they fit. Nothing is read by the host, and no result depends on timing.

#include <algorithm>

#include "hungarian_assign.h"
#include "hungarian_assign_arguments.h"
#include "launch.h"
#include "valid_rows.h"

namespace drcnn {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kSharedBytes = 48 * 1024;  // of dynamic shared memory that every GPU grants without asking

// Pairs and prices of one image; a row is a valid ground truth, a column a prediction or the sink.
struct State {
  double* price;      // of columns
  double* distance;   // of columns, in the search of a row
  double* row_price;  // of rows
  int* path;          // of columns: the row that a column was reached from
  int* row_of;        // of columns; of the sink always -1
  int* closed;        // of columns: the row whose search has closed it last
  int* column_of;     // of rows
  int* rows;          // the valid ground truths

  static int64_t bytes(int64_t columns, int64_t gts) {
    return columns * (2 * sizeof(double) + 3 * sizeof(int)) + gts * (sizeof(double) + 2 * sizeof(int));
  }

  __device__ State(void* memory, int columns, int gts) {
    price = static_cast<double*>(memory);
    distance = price + columns;
    row_price = distance + columns;
    path = reinterpret_cast<int*>(row_price + gts);
    row_of = path + columns;
    closed = row_of + columns;
    column_of = closed + columns;
    rows = column_of + gts;
  }
};

// The open column at the least distance, of several the first.
struct Nearest {
  double distance;
  int column;
};

__device__ Nearest nearer(const Nearest& a, const Nearest& b) {
  const bool is_b = b.distance < a.distance || (b.distance == a.distance && b.column < a.column);
  return is_b ? b : a;
}

__device__ Nearest warp_nearest(Nearest nearest) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Nearest other{__shfl_xor_sync(0xffffffffu, nearest.distance, offset),
                        __shfl_xor_sync(0xffffffffu, nearest.column, offset)};
    nearest = nearer(nearest, other);
  }
  return nearest;
}

// The nearest of the block, in every thread. `warps` must not be that of the call before: a thread may still
// read it.
__device__ Nearest block_nearest(Nearest nearest, Nearest* warps) {
  nearest = warp_nearest(nearest);
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) warps[threadIdx.x / kWarp] = nearest;
  __syncthreads();
  return warp_nearest(warps[lane % kWarps]);
}

// Lays the costs of the valid ground truths out as rows of `columns` values, the last of which is the sink's.
template <typename T>
__device__ void load_costs(const T* cost, int count, int gts, const int* rows, int valid, double* costs) {
  __shared__ double low[kWarps];
  __shared__ double high[kWarps];
  const int columns = count + 1;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  double least = kHungarianFar, most = -kHungarianFar;
  for (int n = warp; n < count; n += kWarps) {
    for (int row = lane; row < valid; row += kWarp) {
      const double value = static_cast<double>(cost[static_cast<int64_t>(n) * gts + rows[row]]);
      if (hungarian_is_finite(value)) {
        least = value < least ? value : least;
        most = value > most ? value : most;
      }
      costs[static_cast<int64_t>(row) * columns + n] = value;
    }
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const double other_least = __shfl_xor_sync(0xffffffffu, least, offset);
    const double other_most = __shfl_xor_sync(0xffffffffu, most, offset);
    least = other_least < least ? other_least : least;
    most = other_most > most ? other_most : most;
  }
  if (lane == 0) {
    low[warp] = least;
    high[warp] = most;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    least = low[w] < least ? low[w] : least;
    most = high[w] > most ? high[w] : most;
  }
  const HungarianBounds bounds = hungarian_bounds(least, most, count, gts);
  for (int row = 0; row < valid; ++row) {
    double* own = costs + static_cast<int64_t>(row) * columns;
    for (int n = threadIdx.x; n < columns; n += kThreads) {
      own[n] = n < count ? hungarian_cost(own[n], bounds) : bounds.sink;
    }
  }
}

// Finds the shortest path from a row to a free column, and shifts the pairs along it.
__device__ void serve(int row, int columns, const double* costs, const State& state, Nearest (*warps)[kWarps]) {
  double length = 0;
  int through = row;
  int end;
  for (int step = 0;; ++step) {
    const double* cost = costs + static_cast<int64_t>(through) * columns;
    const double base = length - state.row_price[through];
    Nearest nearest{kHungarianFar, columns};
    for (int n = threadIdx.x; n < columns; n += kThreads) {
      if (step > 0 && state.closed[n] == row) continue;
      double distance = base + (cost[n] - state.price[n]);
      if (step == 0 || distance < state.distance[n]) {
        state.distance[n] = distance;
        state.path[n] = through;
      } else {
        distance = state.distance[n];
      }
      if (distance < nearest.distance) nearest = {distance, n};
    }
    nearest = block_nearest(nearest, warps[step % 2]);
    length = nearest.distance;
    end = nearest.column;
    through = state.row_of[end];
    if (through < 0) break;
    if (end % kThreads == threadIdx.x) state.closed[end] = row;
  }
  for (int n = threadIdx.x; n < columns; n += kThreads) {
    if (state.closed[n] != row) continue;
    const double gain = length - state.distance[n];
    state.price[n] -= gain;
    state.row_price[state.row_of[n]] += gain;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    state.row_price[row] = length;
    for (int column = end, from = -1; from != row;) {
      from = state.path[column];
      if (column != columns - 1) state.row_of[column] = from;
      const int freed = state.column_of[from];
      state.column_of[from] = column;
      column = freed;
    }
  }
  __syncthreads();
}

template <typename T, bool kShared>
__global__ void __launch_bounds__(kThreads, 2)
    hungarian_assign_kernel(const T* cost, const bool* gt_valid, int count, int gts, double* all_costs,
                            unsigned char* all_states, int64_t state_bytes, int64_t* gt_index) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Nearest warps[2][kWarps];
  __shared__ int valid;
  const int64_t image = blockIdx.x;
  const int columns = count + 1;
  const State state(kShared ? memory : all_states + image * state_bytes, columns, gts);
  double* costs = all_costs + image * gts * columns;
  if (threadIdx.x < kWarp) {
    const int found = valid_rows(gt_valid + image * gts, gts, state.rows);
    if (threadIdx.x == 0) valid = found;
  }
  for (int n = threadIdx.x; n < columns; n += kThreads) {
    state.price[n] = 0;
    state.row_of[n] = state.closed[n] = -1;
  }
  for (int row = threadIdx.x; row < gts; row += kThreads) {
    state.row_price[row] = 0;
    state.column_of[row] = -1;
  }
  __syncthreads();
  load_costs(cost + image * count * gts, count, gts, state.rows, valid, costs);
  __syncthreads();
  for (int row = 0; row < valid; ++row) serve(row, columns, costs, state, warps);
  for (int n = threadIdx.x; n < count; n += kThreads) {
    const int row = state.row_of[n];
    gt_index[image * count + n] = row < 0 ? -1 : state.rows[row];
  }
}

Tensor hungarian_assign_cuda(const Tensor& cost, const Tensor& gt_valid) {
  const torch::stable::accelerator::DeviceGuard guard(cost.get_device_index());
  const HungarianArguments args(cost, gt_valid);
  STD_TORCH_CHECK(std::max({args.images, args.count, args.gts}) < 2147483647,
                  "hungarian_assign: more than 2^31 - 2 images, predictions or ground truths");
  Tensor gt_index = args.new_output();
  if (gt_index.numel() == 0) return gt_index;
  const int64_t columns = args.count + 1;
  const int64_t state_bytes = (State::bytes(columns, args.gts) + 7) / 8 * 8;
  const bool is_shared = state_bytes <= kSharedBytes;
  const auto bytes_of = [&](int64_t bytes) {
    return torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, args.cost.device());
  };
  Tensor costs = bytes_of(args.images * args.gts * columns * static_cast<int64_t>(sizeof(double)));
  Tensor states = bytes_of(is_shared ? 0 : args.images * state_bytes);
  dispatch_floating(args.cost.scalar_type(), "hungarian_assign", [&](auto type) {
    using T = decltype(type);
    const auto kernel = is_shared ? &hungarian_assign_kernel<T, true> : &hungarian_assign_kernel<T, false>;
    kernel<<<static_cast<unsigned>(args.images), kThreads, is_shared ? state_bytes : 0,
             current_stream(args.cost.get_device_index())>>>(
        args.cost.template const_data_ptr<T>(), args.gt_valid.template const_data_ptr<bool>(),
        static_cast<int>(args.count), static_cast<int>(args.gts), static_cast<double*>(costs.mutable_data_ptr()),
        static_cast<unsigned char*>(states.mutable_data_ptr()), state_bytes, gt_index.mutable_data_ptr<int64_t>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return gt_index;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_IMPL(drcnn, CUDA, m) { m.impl("hungarian_assign", TORCH_BOX(&drcnn::hungarian_assign_cuda)); }
