// The training kernels of one instruction set as a table of function pointers, and their arguments.
// Raw pointers and plain numbers, as in ../table.h.
//
// Maps are channels-last, of the table's storage type T. Vectors per channel and the packed weights
// are of the arithmetic type A: double for double, else float.
//
// Work is cut into blocks whose extent depends on the shape alone, and each block stores its sums
// separately, so a result has the same bits on any number of threads.
#pragma once

#include "../table.h"

namespace fr {

// The most rows whose terms are added in float32 before the sum continues in float64.
constexpr int64_t kSumRows = 512;

// What the sums of a block consist of, one double per channel each.
enum StatisticsRow { kPivot, kSumFromPivot, kSquaresFromPivot, kStatisticsRows };
enum GradientRow { kSumG, kSumGXc, kGradientRows, kSumGShortcutXc = kGradientRows, kBlockEndRows };

// --- Passes over maps of `rows` pixels. ----------------------------------------------------------

// y = activation(z * scale + shift + s), s the shortcut, or shortcut * shortcut_scale +
// shortcut_shift.
struct BlockEnd {
  int64_t rows, channels;
  const void *z, *scale, *shift;
  const void* shortcut;                         // null: none
  const void *shortcut_scale, *shortcut_shift;  // null: the shortcut as it is
  void* y;
  Activation activation;
};

// g = dy through the activation, and its sums, alone and times z - mean and shortcut -
// shortcut_mean.
struct BlockEndBackward {
  int64_t rows, channels;
  const void* dy;
  const void* y;  // null: no activation
  Activation activation;
  const void *z, *mean;                  // null without sums
  const void *shortcut, *shortcut_mean;  // null: no third sum
  void* g;                               // null: not wanted
  double* sums;                          // [block][kBlockEndRows][channels]; null: not wanted
};

// Of the map as it is stored, about a pivot of each block's own.
struct Statistics {
  int64_t channels;
  const void* z;
  double* sums;  // [block][kStatisticsRows][channels]
};

// dz = a * g + b * z + c.
struct BnGradient {
  int64_t channels;
  const void *g, *z, *a, *b, *c;  // z, b and c null: dz = a * g
  void* dz;
};

// g, in place, through the activation of x * scale + shift, and its sums, alone and times x - mean.
struct MaskedSums {
  int64_t channels;
  Activation activation;
  void* g;
  const void *x, *scale, *shift;
  const void* mean;  // null with `sums`
  double* sums;      // [block][kGradientRows][channels]; null: not wanted
};

// y = maxpool(activation(z * scale + shift)), and where in its window the first largest is.
struct StemEnd {
  PoolForward pool;  // its x and y are not used
  Activation activation;
  const void *z, *scale, *shift;
  void* y;
  uint8_t* index;
};

struct StemEndBackward {
  PoolForward pool;
  int64_t pixels;  // of the whole map
  Activation activation;
  const void* dy;
  const uint8_t* index;
  const void *z, *scale, *shift, *mean;
  void* g;
  double* sums;  // [block][kGradientRows][c]; null: not wanted
};

// Filters, each a matrix of `rows` by `columns`, written as its transpose.
struct FilterCopy {
  int64_t rows, columns;
  bool from_wide, to_wide;  // of type A rather than T
  const void* from;
  void* to;
};

// --- Convolutions. -------------------------------------------------------------------------------

// z = conv(p(x), w) with p(x) = relu(x * x_scale + x_shift), or x where these are null.
struct TrainingForward {
  ConvShape shape;
  const void *x, *x_scale, *x_shift;
  const void* weight;  // as pack_forward leaves it
  const void* filter;  // as it is, [k][kh][kw][c / groups] of T
  int64_t splits;      // of each block
  void* z;
  double* sums;  // [block][kStatisticsRows][k], of the stored z; null: not wanted
};

// With dz = a * g + b * z + c, or a * g where z, b and c are null:
//   data gradient    g_x = conv_transpose(dz, w), then with x_scale: zero where
//                    x * x_scale + x_shift <= 0, and its sums; without: + add
//   weight gradient  of p(x) and dz
struct TrainingBackward {
  ConvShape shape;
  const void *g, *z, *a, *b, *c;
  const void *x, *x_scale, *x_shift, *x_mean;
  const void* weight;  // as pack_backward leaves it; null for the weight gradient alone
  const void* filter;  // as it is, [k][kh][kw][c / groups] of T; null likewise
  int64_t splits;      // of each block
  const void* add;     // null: nothing
  void* g_x;           // null for the weight gradient alone
  double* sums;        // [block][kGradientRows][c]; null: not wanted
  void* dw;            // of type A: [part][k][kh][kw][c]; null for the data gradient alone
};

// The blocks of one direction. Any of them may run at the same time as any other. A block, which
// has its sums in one place, may be run in several splits, of the channels that it makes: unit u is
// split u % splits of block u / splits. No bit depends on their number.
template <class Args>
struct BlockKernel {
  int64_t (*blocks)(const ConvShape&);         // null: this direction has no kernel
  int64_t (*scratch_bytes)(const ConvShape&);  // of one thread
  // How many weight gradients the blocks make, to be added in order; each is written whole, whether
  // or not there are images. Null for directions without one.
  int64_t (*parts)(const ConvShape&);
  // How many pixels a block's statistics are of. Null but for the forward.
  int64_t (*pixels)(const ConvShape&, int64_t block);
  void (*run)(const Args&, int64_t unit, void* scratch);
  int64_t (*splits)(const ConvShape&);  // at most; null: one
};

// One algorithm. A weight comes in T, channels-last memory, that is [k][kh][kw][c / groups].
struct TrainingConv {
  bool (*fits)(const ConvShape&);  // null: not available
  int64_t (*packed_bytes)(const ConvShape&);
  int64_t (*pack_units)(const ConvShape&);  // which several threads may share
  void (*pack_forward)(const ConvShape&, const void* weight, int64_t begin, int64_t end,
                       void* packed);
  void (*pack_backward)(const ConvShape&, const void* weight, int64_t begin, int64_t end,
                        void* packed);
  BlockKernel<TrainingForward> forward;
  BlockKernel<TrainingBackward> data_gradient, weight_gradient, both_gradients;
};

struct TrainingKernels {
  // Of rows [begin, end), which are block `block`, at most kSumRows. `scratch` has room for a
  // vector of type A for each of the sums.
  void (*block_end)(const BlockEnd&, int64_t begin, int64_t end);
  void (*block_end_backward)(const BlockEndBackward&, int64_t begin, int64_t end, int64_t block,
                             void* scratch);
  void (*statistics)(const Statistics&, int64_t begin, int64_t end, int64_t block, void* scratch);
  void (*bn_gradient)(const BnGradient&, int64_t begin, int64_t end);
  void (*masked_sums)(const MaskedSums&, int64_t begin, int64_t end, int64_t block, void* scratch);
  // Of rows of the result (of its n * out_h) and of rows of the map (of its n * h).
  void (*stem_end)(const StemEnd&, int64_t begin, int64_t end);
  void (*stem_end_backward)(const StemEndBackward&, int64_t begin, int64_t end, int64_t block,
                            void* scratch);
  // to[i] = the sum of parts[part * numel + i], in order, for i in [begin, end); of type A.
  void (*add_parts)(const void* parts, int64_t count, int64_t numel, int64_t begin, int64_t end,
                    void* to);
  // Of filters [begin, end).
  void (*copy_filters)(const FilterCopy&, int64_t begin, int64_t end);
  TrainingConv direct;        // any kernel and stride
  TrainingConv winograd;      // 3x3, stride 1
  TrainingConv few_channels;  // of the input: the weight gradient alone
};

struct TrainingTable {
  TrainingKernels of[kNumDTypes];
};

const TrainingTable& training_table_portable();
const TrainingTable& training_table_avx2();
const TrainingTable& training_table_avx512();
namespace avx512_bf16 {
void replace_bfloat16(TrainingTable& table);
}

}  // namespace fr
