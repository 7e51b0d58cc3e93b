// The contract between the drivers in csrc/ and the kernels that are compiled once per ISA.
//
// A block of query rows attends to blocks of keys one after the other:
//   begin(rows); absorb(rows, keys 0..127); absorb(rows, keys 128..255); ...; finish(rows)
// Rows carry everything that differs between them, so that a kernel knows nothing of batches, heads, groups or layouts.
#pragma once
#include <cstddef>
#include <cstdint>

#include "arithmetic.h"
#include "dtype.h"

namespace selfattn {

// Scores, row_max and lse inside the core are in units of log2, so that exp needs no conversion.
struct Row {
  const void* query;         // head_dim contiguous elements of the kernel's type
  void* out;                 // value_dim contiguous elements of the block's out_type
  const std::uint8_t* mask;  // the row's mask at key 0, or null: all visible
  const char* bias;          // the row's bias at key 0, or null: none
  const void* relative;      // what joins the row's products, in the type of computation, at key 0, or null: nothing
  void* scores;              // where the row's final scores are kept, at key 0, or null: nowhere
  std::int64_t key_begin;    // keys in [key_begin, key_end) are visible ...
  std::int64_t key_end;      // ... unless mask or bias hide them
  std::int64_t position;     // the key at ALiBi distance 0, or the visible one nearest to it ...
  double slope;              // ALiBi slope
  double omitted;            // ... and what that leaves out of every score: lse gets it back
  double sink;               // logit that joins the denominator only (log2), or -inf
};

enum class BiasType : std::uint8_t { none, f32, f64, f16, bf16 };

// How a product q.k becomes a score; the same for every row of a call.
struct ScoreTerms {
  double multiplier = 0;  // first factor; the result is in log2 units unless softcap follows
  double softcap = 0;     // then softcap * tanh(score), in log2 units; 0: none
  bool alibi = false;
  bool mask = false;
  BiasType bias = BiasType::none;
  bool bias_at_hand = false;   // made for the block just now, not read from the caller's memory ...
  bool toeplitz = false;       // ... and all there is: in one line, each row's one place before that of the row before
  std::int64_t mask_step = 0;  // bytes from key to key
  std::int64_t bias_step = 0;
};

struct KeyBlock {
  std::int64_t first;  // index of the block's first key
  int count;
  const void* keys;  // rows of head_dim contiguous elements, `key_step` elements apart
  std::int64_t key_step;
  const void* values;  // rows of value_dim contiguous elements, `value_step` elements apart
  std::int64_t value_step;
  const void* next_keys;  // where the keys of the block to come start, as many and as far apart, or null: unknown
  // For kernels that take them one by one, instead: the rows of `count` keys and values, wherever they stand, then
  // rows_ahead more, which are only asked for ahead of time.
  const void* const* key_rows;
  const void* const* value_rows;
  const float* key_scales;  // of codes, which stand for code * scale; whole vectors of them
  const float* value_scales;
};
constexpr int rows_ahead = 32;

struct RowBlock {
  const Row* rows;
  int count;
  int key_block;  // the largest KeyBlock::count to come
  std::int64_t head_dim;
  std::int64_t value_dim;
  ScoreTerms terms;
  DType out_type;  // the type of computation, or one of 16 bits
  bool normalise;  // finish divides by row_sum; otherwise the block is one of several key ranges
  void* row_max;   // per row, in the element type; valid after finish, room for whole strips
  void* row_sum;
  void* scratch;  // scratch_bytes(...) bytes on a 64-byte boundary
};

struct AttendKernel {
  const char* name;
  const char* unit;  // of the CPU, which its products run on
  DType queries;     // the types that it reads; maxima, sums and outputs are of the type of computation
  DType keys;        // and of values
  bool packs;        // copies keys and values, which many rows in a block repay
  bool by_row;       // takes keys and values by KeyBlock::key_rows and value_rows
  int strip_rows;    // rows that share registers; blocks are best a multiple of it
  std::size_t (*scratch_bytes)(int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim);
  void (*begin)(const RowBlock&) noexcept;
  void (*absorb)(const RowBlock&, const KeyBlock&) noexcept;
  void (*finish)(const RowBlock&) noexcept;
};

// out[i][n] = sum_k x[i][k] * weights[k][n] + bias[n] for one panel of columns.
struct ProjectArgs {
  const void* x;  // rows of depth contiguous elements, `x_step` elements apart
  std::int64_t x_step;
  std::int64_t rows;
  std::int64_t depth;
  const void* panel;  // [depth][panel_columns], zero-padded, in the weights' own type
  const void* bias;   // panel_columns elements, or null
  void* out;          // `columns` contiguous elements a row, rows `out_step` elements apart
  std::int64_t out_step;
  int columns;  // at most panel_columns
};

// For benchmarks only, which compare with it: multiplies on registers or tiles as fast as it can, and returns the
// number of floating-point operations.
using PeakLoop = double (*)(std::int64_t rounds) noexcept;

// The kernels of one element type.
struct TypeKernels {
  AttendKernel tile;            // many rows: vectors run across query rows
  AttendKernel row;             // few rows: vectors run along head_dim and along keys
  const AttendKernel* row_f16;  // the same for keys and values of 16 bits in place, or null: they are widened first
  const AttendKernel* row_bf16;
  const AttendKernel* row_i8;  // for codes, or null: they are multiplied by their scales first
  int lanes;                   // elements of a vector
  int row_limit;               // up to this many rows `row` is the faster of the two, however few the keys
  int panel_columns;
  void (*project)(const ProjectArgs&) noexcept;
  void (*project_f16)(const ProjectArgs&) noexcept;  // for panels of 16 bits, or null
  void (*project_bf16)(const ProjectArgs&) noexcept;
  // panel[d][i] = rows[i][d], which makes a panel for `project` of panel_columns rows of depth elements.
  void (*pack_panel)(const void* const* rows, std::int64_t depth, void* panel) noexcept;
  // scores[j] = exp2(scores[j] - row_max) * factor
  void (*weigh)(void* scores, std::int64_t count, double row_max, double factor) noexcept;
  PeakLoop peak_loop;
};

// Numbers of 16 bits and floats, contiguous.
struct Conversion {
  void (*widen)(const void* from, std::int64_t count, float* to) noexcept;
  void (*narrow)(const float* from, std::int64_t count, void* to) noexcept;
};

// Kernels whose products are of bfloat16, which their operands are, are split into or are rounded to. Null where the
// ISA has none that is faster than FMA.
struct MatrixKernels {
  const AttendKernel* bf16;         // operands of bfloat16
  const AttendKernel* f16;          // of float16, split into two bfloat16
  const AttendKernel* f32_highest;  // of float32, split into three
  const AttendKernel* f32_high;     // into two
  const AttendKernel* f32_medium;   // rounded to one
  const AttendKernel* row_bf16;     // few rows of bfloat16
  // x and weights of bfloat16: rows of x on a 4-byte grid, an odd depth filled up with 0; panels [cells][panel_columns]
  // of pairs along the depth, a multiple of 16 of them.
  void (*project_bf16)(const ProjectArgs&) noexcept;
  PeakLoop peak_loop;
};

struct KernelSet {
  const char* name;
  std::uint32_t features;  // bits of Feature that the machine must have
  std::uint32_t shuns;  // where one of these is there as well, the set is not the default: it is slower than the next
  const TypeKernels& f32;
  const TypeKernels& f64;
  const Conversion& f16;
  const Conversion& bf16;
  const Conversion& i8;  // to floats only
  MatrixKernels matrix;
};

// What a CPU and its operating system can do, as far as kernels ask for it.
enum Feature : std::uint32_t {
  feature_avx2_fma = 1u << 0,  // and F16C
  feature_avx512 = 1u << 1,    // F, DQ, VL, BW and the registers enabled
  feature_avx512_bf16 = 1u << 2,
  feature_avx512_fp16 = 1u << 3,
  feature_amx = 1u << 4,  // tiles, products of bfloat16, and the kernel's permission to use them
};

}  // namespace selfattn
