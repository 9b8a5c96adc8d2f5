// The gradients of z = conv(p(x), weight) from that of the batch norm that follows it.

#include "../../box.h"
#include "conv_plan.h"
#include "conv_run.h"
#include "operands.h"

namespace fr {
namespace {

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The arguments of one call, checked.
struct Operands {
  ConvShape shape;
  Tensor g, z, a, b, c, x, x_scale, x_shift, x_mean, weight, add;
  Activation activation;

  ScalarType vectors() const { return accumulator(x.scalar_type()); }

  TrainingBackward args() const {
    TrainingBackward f{};
    f.shape = shape;
    f.g = g.const_data_ptr();
    f.z = data_or_null(z);
    f.a = a.const_data_ptr();
    f.b = data_or_null(b);
    f.c = data_or_null(c);
    f.x = x.const_data_ptr();
    f.x_scale = data_or_null(x_scale);
    f.x_shift = data_or_null(x_shift);
    f.x_mean = data_or_null(x_mean);
    f.add = data_or_null(add);
    return f;
  }
};

// dz = a * g + b * z + c, as a map.
Tensor gradient_map(const Operands& o) {
  const Tensor dz = empty_map(o.g.sizes(), o.g.options());
  const BnGradient args{o.g.size(1),          o.g.const_data_ptr(), data_or_null(o.z),
                        data_or_null(o.a),    data_or_null(o.b),    data_or_null(o.c),
                        dz.mutable_data_ptr()};
  const auto kernel = training_kernels_of(o.g).bn_gradient;
  for_rows(o.g, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return dz;
}

// The operands for kernels whose prologues and epilogues lack the activation: p(x) is a map of its
// own, and its gradient is finished like PyTorch's.
Operands without_activation(const Operands& o, bool need_weight) {
  Operands plain = o;
  if (need_weight) plain.x = normalized(o.x, o.x_scale, o.x_shift, o.activation);
  plain.x_scale = plain.x_shift = plain.x_mean = Tensor();
  return plain;
}

// Applied after a data gradient that lacks them: the mask and its sums, or the shortcut's gradient,
// in place.
void finish_data_gradient(const Operands& o, const Tensor& g_x, double* sums) {
  if (o.add.defined()) {
    const auto add = kernels().of[dtype_of(g_x.scalar_type())].add_relu;
    const AddForward sum{g_x.const_data_ptr(), o.add.const_data_ptr(), g_x.mutable_data_ptr(),
                         Activation::kNone};
    parallel_for(0, g_x.numel(), 32 * 1024,
                 [&](int64_t begin, int64_t end) { add(sum, begin, end); });
  }
  if (!o.x_scale.defined()) return;
  const MaskedSums args{o.shape.c,
                        o.activation,
                        g_x.mutable_data_ptr(),
                        o.x.const_data_ptr(),
                        o.x_scale.const_data_ptr(),
                        o.x_shift.const_data_ptr(),
                        data_or_null(o.x_mean),
                        sums};
  const auto kernel = training_kernels_of(g_x).masked_sums;
  for_row_blocks(g_x, kGradientRows, [&](int64_t begin, int64_t end, int64_t block, void* near) {
    kernel(args, begin, end, block, near);
  });
}

// An uninitialised gradient with the weight's strides, in memory that is kept from step to step:
// that of a 3x3 of 512 channels is 2300 pages, which cost half as long as its computation.
Tensor empty_gradient(const Tensor& w) {
  if (!w.is_non_overlapping_and_dense()) return empty_like(w);
  return empty_map(w.sizes(), w.strides(), w.options());
}

// dw in the weight's own type, which may be wider than the maps', and strides. A single part is
// written directly to the result.
template <class Kernel>
Tensor run_weight_gradient(const Operands& o, const Kernel& kernel, TrainingBackward args) {
  const Tensor& w = o.weight;
  const Tensor dw = empty_gradient(w);
  const bool direct = w.scalar_type() == o.vectors() && dw.is_contiguous(kChannelsLast);
  const Tensor sum = direct ? dw : empty_map(w.sizes(), w.options().dtype(o.vectors()));
  const int64_t parts = kernel.parts(o.shape), numel = w.numel();
  if (parts == 1) {
    args.dw = sum.mutable_data_ptr();
    run_kernel(kernel, args);
  } else {
    const int64_t bytes = parts * numel * static_cast<int64_t>(sum.element_size());
    const ResultMemory memory(std::max<int64_t>(bytes, 1));
    args.dw = memory.get();
    run_kernel(kernel, args);
    const auto add_parts = training_kernels_of(o.x).add_parts;
    parallel_for(0, numel, 16 * 1024, [&](int64_t begin, int64_t end) {
      add_parts(args.dw, parts, numel, begin, end, sum.mutable_data_ptr());
    });
  }
  if (!direct) put_gradient(sum, dw, o.x.scalar_type());
  return dw;
}

struct Result {
  Tensor g_x, dw;
};

// The gradients that no kernel computes, by PyTorch's convolution.
Result run_library(const Operands& o, bool need_input, bool need_weight) {
  const Tensor dz = gradient_map(o);
  const Tensor input = need_weight && o.x_scale.defined()
                           ? normalized(o.x, o.x_scale, o.x_shift, o.activation)
                           : o.x;
  const ConvShape& s = o.shape;
  const auto [g_x, dw] = convolution_backward(
      dz, input, as_type(o.weight, dz.scalar_type()), {s.stride_h, s.stride_w}, {s.pad_h, s.pad_w},
      {s.dilation_h, s.dilation_w}, s.groups, need_input, need_weight);
  Result result;
  if (need_input) result.g_x = g_x.contiguous(kChannelsLast);
  if (need_weight) {
    result.dw = empty_like(o.weight);
    const bool as_it_is =
        dw.scalar_type() == result.dw.scalar_type() && dw.strides().equals(result.dw.strides());
    if (as_it_is) {
      result.dw = dw;
    } else {
      put_gradient(dw.contiguous(kChannelsLast), result.dw, dz.scalar_type());
    }
  }
  return result;
}

// `library`: both gradients are PyTorch's, whatever the model of cost says.
FourTensors run_conv_backward(bool library, const Tensor& g, const OptionalTensor& z,
                              const Tensor& a, const OptionalTensor& b, const OptionalTensor& c,
                              const Tensor& x, const OptionalTensor& x_scale,
                              const OptionalTensor& x_shift, const OptionalTensor& x_mean,
                              const Tensor& weight, const OptionalTensor& add, IntArrayRef stride,
                              IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                              bool need_input, bool need_weight, bool sums, bool winograd,
                              Activation activation) {
  const char* op = "conv_backward";
  Operands o;
  o.activation = activation;
  o.x = map_operand(op, "x", x);
  o.shape = training_shape(op, o.x, weight, stride, padding, dilation, groups);
  const ConvShape& s = o.shape;
  o.weight = weight;
  const std::array<int64_t, 4> result{s.n, s.k, s.out_h(), s.out_w()};
  o.g = map_operand(op, "g", g, result, o.x);
  o.a = vector_operand(op, "a", a, s.k, o.x);
  check_together(op, "z", z, "b", b);
  check_together(op, "z", z, "c", c);
  if (z) {
    o.z = map_operand(op, "z", *z, result, o.x);
    o.b = vector_operand(op, "b", *b, s.k, o.x);
    o.c = vector_operand(op, "c", *c, s.k, o.x);
  }
  check_together(op, "x_scale", x_scale, "x_shift", x_shift);
  if (x_scale) {
    o.x_scale = vector_operand(op, "x_scale", *x_scale, s.c, o.x);
    o.x_shift = vector_operand(op, "x_shift", *x_shift, s.c, o.x);
  }
  if (x_mean) o.x_mean = vector_operand(op, "x_mean", *x_mean, s.c, o.x);
  FR_CHECK_VALUE(!sums || (x_scale && x_mean), op,
                 ": x_scale, x_mean: expected tensors with sums=True, got None");
  FR_CHECK_VALUE(!add || !x_scale, op, ": add: expected None with x_scale, got a tensor");
  if (add) o.add = map_operand(op, "add", *add, o.x.sizes(), o.x);
  sums = sums && need_input;

  BackwardPlan plan{};
  if (!library) {
    plan = plan_backward(dtype_of(o.x.scalar_type()), s, need_input, need_weight, winograd);
  }
  const RowBlocks rows(rows_of(o.x), s.c);
  const bool apart = x_scale && activation != Activation::kReLU;  // all that the kernels have
  Operands plain;
  if (apart) plain = without_activation(o, need_weight);
  const Operands& k = apart ? plain : o;
  const bool finished = plan.data && !apart;
  const int64_t blocks = !finished       ? rows.count()
                         : plan.one_pass ? plan.data->both_gradients.blocks(s)
                                         : plan.data->data_gradient.blocks(s);
  PartialSums partial(sums ? blocks : 0, kGradientRows, s.c);

  Tensor g_x = empty({0}, o.x.options()), dw = empty({0}, weight.options());
  if (plan.data) {
    const PackedWeight packed(s, weight, o.x.scalar_type(), plan.data->packed_bytes,
                              plan.data->pack_units, plan.data->pack_backward);
    g_x = empty_map(o.x.sizes(), o.x.options());
    TrainingBackward args = k.args();
    args.weight = packed.data();
    args.filter = packed.source();
    args.g_x = g_x.mutable_data_ptr();
    args.sums = sums && finished ? partial.data() : nullptr;
    if (plan.one_pass) {
      dw = run_weight_gradient(k, plan.data->both_gradients, args);
    } else {
      run_kernel(plan.data->data_gradient, args);
    }
  }
  if (plan.weight && !plan.one_pass) {
    dw = run_weight_gradient(k, plan.weight->weight_gradient, k.args());
  }
  const bool library_input = need_input && !plan.data, library_weight = need_weight && !plan.weight;
  if (library_input || library_weight) {
    const Result rest = run_library(k, library_input, library_weight);
    if (library_weight) dw = rest.dw;
    if (library_input) g_x = rest.g_x;
  }
  if (need_input && !finished) finish_data_gradient(o, g_x, sums ? partial.data() : nullptr);
  // An operator must not return one tensor twice, not even an empty one.
  return {g_x, dw, sums ? partial.total(kSumG, o.vectors()) : empty({0}, o.vectors()),
          sums ? partial.total(kSumGXc, o.vectors()) : empty({0}, o.vectors())};
}

template <bool kLibrary>
FourTensors conv_backward_cpu(const Tensor& g, const OptionalTensor& z, const Tensor& a,
                              const OptionalTensor& b, const OptionalTensor& c, const Tensor& x,
                              const OptionalTensor& x_scale, const OptionalTensor& x_shift,
                              const OptionalTensor& x_mean, const Tensor& weight,
                              const OptionalTensor& add, IntArrayRef stride, IntArrayRef padding,
                              IntArrayRef dilation, int64_t groups, bool need_input,
                              bool need_weight, bool sums, bool winograd, Activation activation) {
  return run_conv_backward(kLibrary, g, z, a, b, c, x, x_scale, x_shift, x_mean, weight, add,
                           stride, padding, dilation, groups, need_input, need_weight, sums,
                           winograd, activation);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("conv_backward", FR_BOX(conv_backward_cpu<false>));
  m.impl("conv_backward_library", FR_BOX(conv_backward_cpu<true>));
}

}  // namespace fr
