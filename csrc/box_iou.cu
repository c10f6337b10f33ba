// box_iou on CUDA: a thread computes four neighbouring overlaps and stores them at once.

#include "batched_boxes.h"
#include "box_launch.h"

namespace drcnn {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSmallBlock = 1024;  // overlaps of a block; more of them where there are enough blocks anyway
constexpr int64_t kLargeBlock = 8192;
constexpr int64_t kManyPairs = 4 << 20;

struct BoxIouShape {
  int64_t rows;  // B x N, the images one after the other
  uint32_t rows_per_block;
  uint32_t a_count;
  uint32_t b_count;
  int64_t a_stride;
  int64_t b_stride;
};

template <typename T, bool kAligned, bool kGiou>
__global__ void __launch_bounds__(kThreads)
    box_iou_kernel(const T* __restrict__ a, const T* __restrict__ b, BoxIouShape shape, T* __restrict__ out) {
  using A = accumulate_t<T>;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * shape.rows_per_block;
  const int64_t left = shape.rows - first_row;
  const uint32_t rows = left < shape.rows_per_block ? static_cast<uint32_t>(left) : shape.rows_per_block;
  const uint32_t pairs = rows * shape.b_count;
  // The rows of a block are a multiple of four, so that it starts where a vector may be stored.
  T* const block_out = out + first_row * shape.b_count;
  for (uint32_t q = threadIdx.x * 4; q < pairs; q += kThreads * 4) {
    uint32_t row = q / shape.b_count;
    uint32_t m = q % shape.b_count;
    uint32_t image = 0;
    Box<A> box{};
    A area = 0;
    bool is_new_row = true;
    Four<T> values;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (m == shape.b_count) {
        m = 0;
        ++row;
        is_new_row = true;
      }
      A value = 0;
      if (q + c < pairs) {
        if (is_new_row) {
          const uint32_t global_row = static_cast<uint32_t>(first_row) + row;
          image = global_row / shape.a_count;
          box = load_box<kAligned>(a + image * shape.a_stride, global_row % shape.a_count);
          area = box_area(box);
          is_new_row = false;
        }
        const Box<A> other = load_box<kAligned>(b + image * shape.b_stride, m);
        value = kGiou ? giou_of(box, area, other, box_area(other)) : iou_of(box, area, other, box_area(other));
      }
      values.values[c] = static_cast<T>(value);
      ++m;
    }
    if (q + 4 <= pairs) {
      store_four<kAligned>(block_out + q, values);
    } else {
      for (uint32_t c = 0; q + c < pairs; ++c) block_out[q + c] = values.values[c];
    }
  }
}

template <typename T, bool kAligned>
void launch(const BatchedBoxes& a, const BatchedBoxes& b, bool giou, const BoxIouShape& shape, Tensor& out,
            cudaStream_t stream) {
  const auto kernel = giou ? &box_iou_kernel<T, kAligned, true> : &box_iou_kernel<T, kAligned, false>;
  const dim3 grid = grid_of(shape.rows, shape.rows_per_block, 1, "box_iou");
  kernel<<<grid, kThreads, 0, stream>>>(a.data<T>(), b.data<T>(), shape, out.mutable_data_ptr<T>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor box_iou_cuda(const Tensor& a_, const Tensor& b_, bool giou) {
  const torch::stable::accelerator::DeviceGuard guard(a_.get_device_index());
  const BatchedBoxes a(a_, "box_iou", "a");
  const BatchedBoxes b(b_, "box_iou", "b");
  STD_TORCH_CHECK(a.batch == b.batch, "box_iou: a and b must have the same batch size");
  check_same_kind(b_, a_, "box_iou", "b");
  Tensor out = torch::stable::empty({a.batch, a.count, b.count}, a_.scalar_type(), std::nullopt, a_.device());
  if (out.numel() == 0) return out;
  const int64_t rows = a.batch * a.count;
  const int64_t pairs = rows > (int64_t{1} << 40) / b.count ? int64_t{1} << 40 : rows * b.count;
  const int64_t per_block = pairs < kManyPairs ? kSmallBlock : kLargeBlock;
  const int64_t rows_per_block = (per_block / b.count + 3) / 4 * 4 + (per_block < b.count ? 4 : 0);
  STD_TORCH_CHECK(rows <= 2147483647 && rows_per_block * b.count <= 2147483647, "box_iou: too many boxes, got ",
                  rows, " and ", b.count);
  const BoxIouShape shape{rows,
                          static_cast<uint32_t>(rows_per_block),
                          static_cast<uint32_t>(a.count),
                          static_cast<uint32_t>(b.count),
                          a.stride,
                          b.stride};
  const cudaStream_t stream = current_stream(a_.get_device_index());
  dispatch_floating(a_.scalar_type(), "box_iou", [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) <= 4) {
      if (a.is_aligned<T>() && b.is_aligned<T>()) return launch<T, true>(a, b, giou, shape, out, stream);
    }
    launch<T, false>(a, b, giou, shape, out, stream);
  });
  return out;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_IMPL(drcnn, CUDA, m) { m.impl("box_iou", TORCH_BOX(&drcnn::box_iou_cuda)); }
