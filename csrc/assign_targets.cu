// assign_targets on CUDA: a thread reads a box, its match and its ground truth, and writes a label and deltas.

#include "assign_targets_arguments.h"
#include "box_launch.h"

namespace drcnn {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct AssignInput {
  const T* max_iou;
  const int64_t* gt_index;
  const T* boxes;
  const T* gt;
  const int64_t* gt_labels;
  int64_t boxes_stride;
  int64_t gt_stride;
  int64_t count;
  int64_t gts;
};

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    assign_targets_kernel(AssignInput<T> input, const accumulate_t<T>* threshold, Deltas<accumulate_t<T>> weights,
                          int64_t background, int64_t* labels, T* deltas) {
  using A = accumulate_t<T>;
  const int64_t image = blockIdx.y;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= input.count) return;
  const int64_t row = image * input.count + n;
  const int64_t g = input.gt_index[row];
  int64_t label = background;
  Deltas<A> out{};
  if (g >= 0 && g < input.gts) {  // without ground truths there is nothing to read
    const Box<A> box = load_box<kAligned>(input.boxes + image * input.boxes_stride, n);
    const Box<A> gt = load_box<kAligned>(input.gt + image * input.gt_stride, g);
    if (is_positive(static_cast<A>(input.max_iou[row]), *threshold)) label = input.gt_labels[image * input.gts + g];
    out = deltas_of(box, gt, weights);
  }
  labels[row] = label;
  Four<T> four;
  four.values[0] = static_cast<T>(out.dx);
  four.values[1] = static_cast<T>(out.dy);
  four.values[2] = static_cast<T>(out.dw);
  four.values[3] = static_cast<T>(out.dh);
  store_four<kAligned>(deltas + 4 * row, four);
}

template <typename T, bool kAligned>
void launch(const AssignArguments& args, const Tensor& threshold, const Deltas<accumulate_t<T>>& weights,
            int64_t background, cudaStream_t stream) {
  const AssignInput<T> input{args.max_iou.const_data_ptr<T>(),
                             args.gt_index.const_data_ptr<int64_t>(),
                             args.boxes.data<T>(),
                             args.gt.data<T>(),
                             args.gt_labels.const_data_ptr<int64_t>(),
                             args.boxes.stride,
                             args.gt.stride,
                             args.boxes.count,
                             args.gt.count};
  const dim3 grid = grid_of(args.boxes.count, kThreads, args.boxes.batch, "assign_targets");
  assign_targets_kernel<T, kAligned><<<grid, kThreads, 0, stream>>>(
      input, threshold.const_data_ptr<accumulate_t<T>>(), weights, background,
      args.labels.mutable_data_ptr<int64_t>(), args.deltas.mutable_data_ptr<T>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> assign_targets_cuda(const Tensor& max_iou, const Tensor& gt_index, const Tensor& boxes,
                                               const Tensor& gt_boxes, const Tensor& gt_labels,
                                               const Tensor& threshold, double wx, double wy, double ww, double wh,
                                               int64_t background) {
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const AssignArguments args(max_iou, gt_index, boxes, gt_boxes, gt_labels, threshold);
  if (args.boxes.count == 0 || args.boxes.batch == 0) return {args.labels, args.deltas};
  const cudaStream_t stream = current_stream(boxes.get_device_index());
  dispatch_floating(args.type(), "assign_targets", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Deltas<A> weights{static_cast<A>(wx), static_cast<A>(wy), static_cast<A>(ww), static_cast<A>(wh)};
    if constexpr (sizeof(T) <= 4) {
      if (args.boxes.is_aligned<T>() && args.gt.is_aligned<T>()) {
        return launch<T, true>(args, threshold, weights, background, stream);
      }
    }
    launch<T, false>(args, threshold, weights, background, stream);
  });
  return {args.labels, args.deltas};
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_IMPL(drcnn, CUDA, m) { m.impl("assign_targets", TORCH_BOX(&drcnn::assign_targets_cuda)); }
