// The stem: one kernel where its tiles fit (see plan_stem), else the convolution's kernel followed
// by torch's pooling.
#include "../conv_bn_relu_maxpool.h"

#include <cstdint>

#include "../../tensor.h"
#include "conv_call.h"

namespace fr {
namespace {

PoolWindow pool_window(const char* op, const ConvShape& s, IntArrayRef kernel, IntArrayRef stride,
                       IntArrayRef padding) {
  check_pool(op, {s.n, s.k, s.out_h(), s.out_w()}, kernel, stride, padding);
  const auto as_int = [](int64_t v) { return static_cast<int>(v); };
  return {as_int(kernel[0]), as_int(kernel[1]),  as_int(stride[0]),
          as_int(stride[1]), as_int(padding[0]), as_int(padding[1])};
}

struct Pool {
  IntArrayRef kernel, stride, padding;
};

// One call of the stem's kernel.
class StemCall {
 public:
  StemCall(const char* op, const Tensor& x, IntArrayRef weight_shape, const ConvGeometry& g,
           const Pool& pool)
      : op_(op),
        x_(x),
        scope_(x),
        shape_(conv_shape(op, x, weight_shape, g.stride, g.padding, g.dilation, g.groups)) {
    const PoolWindow window = pool_window(op, shape_, pool.kernel, pool.stride, pool.padding);
    precision_ = conv_precision(op, x);
    fits_ = plan_stem(shape_, window, precision_, &params_);
  }

  bool fits() const { return fits_; }
  const ConvShape& shape() const { return shape_; }

  const float* vector(const char* name, const OptionalTensor& v) {
    check_vector(op_, name, v, shape_.k, x_);
    return operands_.floats(v);
  }

  // The layout of `weight` is [k][kh][kw][c].
  Tensor run(const Tensor& weight, const ConvAffine& affine, Activation activation) {
    const Tensor y = device_empty({shape_.n, shape_.k, params_.out_h, params_.out_w}, x_.options(),
                                  kChannelsLast);
    params_.image.x = operands_.keep(x_.contiguous(kChannelsLast)).const_data_ptr();
    params_.chunks = params_.chunks && reinterpret_cast<uintptr_t>(params_.image.x) % 16 == 0;
    params_.weight = operands_.keep(weight).const_data_ptr();
    params_.affine = affine;
    params_.activation = activation;
    params_.y = y.mutable_data_ptr();
    params_.vector = shape_.k * x_.element_size() % 16 == 0 &&
                     reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 == 0;
    check_launch(op_, fr::conv_bn_relu_maxpool(params_, precision_, scope_.multiprocessors(),
                                               scope_.stream()));
    return y;
  }

 private:
  const char* op_;
  Tensor x_;
  Operands operands_;
  DeviceScope scope_;
  ConvShape shape_;
  ConvPrecision precision_;
  StemParams params_{};
  bool fits_;
};

Tensor max_pool(const Tensor& y, const Pool& pool) {
  return max_pool2d(y, pool.kernel, pool.stride, pool.padding);
}

Tensor conv_bn_relu_maxpool_cuda(const Tensor& x, const Tensor& weight,
                                 const OptionalTensor& conv_bias, const OptionalTensor& bn_weight,
                                 const OptionalTensor& bn_bias, const Tensor& mean,
                                 const Tensor& var, IntArrayRef stride, IntArrayRef padding,
                                 IntArrayRef dilation, int64_t groups, double eps,
                                 IntArrayRef pool_kernel, IntArrayRef pool_stride,
                                 IntArrayRef pool_padding, Activation activation) {
  const char* op = "conv_bn_relu_maxpool";
  const Pool pool{pool_kernel, pool_stride, pool_padding};
  StemCall call(op, x, weight.sizes(), {stride, padding, dilation, groups}, pool);
  if (!call.fits()) {
    ConvCall conv(op, x, weight.sizes(), {stride, padding, dilation, groups});
    conv.set_weight(weight);
    conv.set_batch_norm(conv_bias, bn_weight, bn_bias, mean, var, eps);
    conv.set_activation(activation);
    return max_pool(conv.run(), pool).contiguous(x.suggest_memory_format());
  }
  check_same(op, "weight", weight, weight.sizes(), x);
  ConvAffine affine{};
  affine.conv_bias = call.vector("conv_bias", conv_bias);
  affine.weight = call.vector("bn_weight", bn_weight);
  affine.bias = call.vector("bn_bias", bn_bias);
  affine.mean = call.vector("mean", mean);
  affine.var = call.vector("var", var);
  affine.eps = static_cast<float>(eps);
  return call.run(weight.contiguous(kChannelsLast), affine, activation)
      .contiguous(x.suggest_memory_format());
}

Tensor conv_bn_relu_maxpool_packed_cuda(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                        const Tensor& shift, IntArrayRef weight_shape,
                                        IntArrayRef stride, IntArrayRef padding,
                                        IntArrayRef dilation, int64_t groups,
                                        IntArrayRef pool_kernel, IntArrayRef pool_stride,
                                        IntArrayRef pool_padding, Activation activation) {
  const char* op = "conv_bn_relu_maxpool_packed";
  const Pool pool{pool_kernel, pool_stride, pool_padding};
  StemCall call(op, x, weight_shape, {stride, padding, dilation, groups}, pool);
  if (!call.fits()) {
    ConvCall conv(op, x, weight_shape, {stride, padding, dilation, groups});
    conv.set_packed(packed);
    conv.set_affine(scale, shift);
    conv.set_activation(activation);
    return max_pool(conv.run(), pool);
  }
  check_same(op, "packed", packed, {call.shape().k * call.shape().depth()}, x);
  ConvAffine affine{};
  affine.weight = call.vector("scale", scale);
  affine.bias = call.vector("shift", shift);
  return call.run(packed.contiguous(), affine, activation);
}

}  // namespace

FR_CUDA_LIBRARY(m) {
  m.impl("conv_bn_relu_maxpool", FR_BOX(conv_bn_relu_maxpool_cuda));
  m.impl("conv_bn_relu_maxpool_packed", FR_BOX(conv_bn_relu_maxpool_packed_cuda));
}

}  // namespace fr
