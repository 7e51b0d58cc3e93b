// The interface between the drivers in csrc/ and the kernels, which are compiled once per ISA.
//
// A block of query rows attends to one block of keys after another. It may be finished in between and resumed later:
//   begin(rows); absorb(rows, keys 0..127); absorb(rows, keys 128..255); ...; finish(rows)
// Everything that differs between rows is in Row, so kernels do not deal with batches, heads, groups or layouts.
#pragma once
#include <cstddef>
#include <cstdint>

#include "arithmetic.h"
#include "dtype.h"
#include "kernels/layer_arguments.h"

namespace selfattn {

// Inside the core, scores, row_max and lse are in log2 units, so exp2 needs no conversion.
struct Row {
  const void* query;         // head_dim contiguous elements of the kernel's query type
  void* out;                 // value_dim contiguous elements of the block's out_type
  const std::uint8_t* mask;  // the row's mask, from key 0 on; null: all keys are visible
  const char* bias;          // the row's bias, from key 0 on; null: none
  const void* relative;      // added to q.k before scaling; in the type of computation, from key 0 on; null: none
  void* scores;              // where to store the row's final scores, from key 0 on; null: nowhere
  std::int64_t key_begin;    // first visible key
  std::int64_t key_end;      // end of the visible keys; mask and bias may hide keys in between
  std::int64_t position;     // ALiBi distances are measured from this key; without sinks, clamped to the visible keys
  double slope;              // ALiBi slope
  double omitted;            // what clamping `position` adds to every score (log2 units); subtracted from lse
  double sink;               // logit whose exponential is added to the softmax's denominator (log2 units), or -inf
  std::uint32_t coordinates[3];  // identifies the row for dropout: batch entry, head, query
};

// A weight is dropped if the random 32-bit word of its coordinates (batch entry, head, query, key) is below the
// threshold; otherwise it is multiplied by the factor (decision 11).
struct Dropout {
  double factor = 0;  // 0: there is no dropout
  std::uint32_t threshold = 0;
  std::uint64_t seed = 0;
  std::int64_t first_key = 0;  // the index that the call's key 0 has for dropout

  explicit operator bool() const { return factor != 0; }
};

// How products q.k become scores, and how weights are dropped. The same for all rows of a block.
struct Scoring {
  double multiplier = 0;  // applied first; the result is in log2 units unless softcap follows
  double softcap = 0;     // applied next: softcap * tanh(score), in log2 units; 0: none
  bool alibi = false;
  bool mask = false;
  bool bias = false;
  DType bias_type = DType::f32;
  bool bias_at_hand = false;  // the bias was computed for this block and is in scratch memory, not the caller's
  // The bias is at hand, there is no mask, and all rows read their biases from one array: the bias of each row starts
  // one element before that of the previous row.
  bool toeplitz = false;
  std::int64_t mask_stride = 0;  // bytes from one key to the next
  std::int64_t bias_stride = 0;
  Dropout dropout;  // of the weights; only tile kernels apply it
};

// Rows of memory that will be read soon: `count` rows of `bytes` contiguous bytes, which may be
// anywhere in memory.
struct LaterRows {
  const void* const* rows;
  std::int64_t count;
  std::int64_t bytes;
};

struct KeyBlock {
  std::int64_t first;  // index of the block's first key
  int count;
  const void* keys;  // rows of head_dim contiguous elements, `key_stride` elements apart
  std::int64_t key_stride;
  const void* values;  // rows of value_dim contiguous elements, `value_stride` elements apart
  std::int64_t value_stride;
  // What tile kernels prefetch while they compute: values (of this block if they are read in place, else of the next
  // block) and the keys of the next block.
  LaterRows later_values, later_keys;
  // Kernels that read by row use these arrays instead of `keys` and `values`. Each holds pointers to `count` rows,
  // which may be anywhere in memory, then pointers to rows_ahead more rows. Kernels prefetch those rows and may load
  // them, but do not use the loaded numbers.
  const void* const* key_rows;
  const void* const* value_rows;
  const float* key_scales;  // codes only: one scale per key (number = code * scale), padded to whole vectors
  const float* value_scales;
};
constexpr int rows_ahead = 64;

struct RowBlock {
  const Row* rows;
  int count;
  int key_block;  // the largest KeyBlock::count that will be absorbed
  std::int64_t head_dim;
  std::int64_t value_dim;
  Scoring scoring;
  DType out_type;  // the type of computation, or a 16-bit type
  bool normalise;  // whether finish divides by row_sum; false if more keys follow or are in other ranges
  bool resumes;    // begin continues from row_max, row_sum and the rows' out, as finish left them without normalising
  // Per row, padded to whole strips: the maximum score and the sum of probs. Drivers read them after finish.
  void *row_max, *row_sum;
  void* scratch;  // scratch_bytes(...) bytes, 64-byte aligned
};

struct AttendKernel {
  const char* name;
  const char* unit;  // the CPU's execution unit for the products
  DType queries;     // type of queries in memory; maxima and sums have the type of computation
  DType keys;        // type of keys and values in memory, with one element per word
  bool packs;        // copies keys and values, which pays off only with many rows in a block
  bool by_row;       // reads keys and values through KeyBlock::key_rows and value_rows
  int strip_rows;    // rows that share registers; the number of rows in a block should be a multiple of it
  std::size_t (*scratch_bytes)(int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim);
  void (*begin)(const RowBlock&) noexcept;
  void (*absorb)(const RowBlock&, const KeyBlock&) noexcept;
  void (*finish)(const RowBlock&) noexcept;
  std::int64_t widest = INT64_MAX;  // the largest head_dim
};

// The backward pass of one block of query rows of a head against a range of keys. Queries, keys, values and the
// gradient of out have the kernel's operand type; everything else has the type of computation. All rows are contiguous
// and zero-padded to whole vectors; the next row follows directly.
struct BackwardBlock {
  const Row* rows;  // what each row sees, and its terms; query, out and scores are not used
  int count;
  Scoring scoring;
  std::int64_t head_dim;
  std::int64_t value_dim;
  const void* queries;  // [row][head_dim]
  const void* dout;     // [row][value_dim]: the gradient of out
  // Per row, padded to whole vectors. probs = 2^(score - shift) * factor; delta is the sum over keys of prob *
  // (gradient of prob).
  const void* shift;
  const void* factor;
  const void* delta;
  // [row][head_dim], overwritten: the gradient of the queries, not yet multiplied by the scale. Null: not wanted.
  void* dquery;
  std::int64_t first_key;
  int key_count;
  int key_block;       // keys that are processed at a time
  const void* keys;    // [key][head_dim]
  const void* values;  // [key][value_dim]
  // Added to: the gradients of the keys, not yet multiplied by the scale, and of the values. Null: not wanted.
  void* dkeys;
  void* dvalues;
  bool finite;  // none of queries, dout, keys and values is NaN or infinite
  // [row][key]: the gradients of the scores, and of the scaled products from which the scores are computed. They differ
  // if there is a softcap. Null: not wanted. Keys that no row of a strip sees may be left unwritten.
  void* dscores;
  std::int64_t dscore_stride;  // elements from one row to the next
  void* dproducts;
  std::int64_t dproduct_stride;
  const void* dweights;         // from row 0 and key 0 on: added to the gradients of probs; null: none
  std::int64_t dweight_stride;  // elements from one row to the next
  void* scratch;
};

// The backward pass of relative products (backward_relative.h), for the keys and rows of a BackwardBlock whose rows are
// consecutive queries. Column c consists of the pairs of row i and key first_key + c - (count - 1 - i), for all i.
// These pairs have the same distance. Arrays are padded as in BackwardBlock. Gradients are not yet multiplied by the
// scale.
struct RelativeBlock {
  const Row* rows;
  int count;
  std::int64_t head_dim;
  std::int64_t first_key;
  int key_count;
  int column_block;       // BackwardBlock::key_block
  const void* dproducts;  // BackwardBlock::dproducts, with 0 for pairs that were not written, and in the count - 1
                          // elements before and after the keys of each row
  std::int64_t dproduct_stride;
  const void* queries;  // [row][head_dim]
  const void* vectors;  // [column][head_dim]: the vector of each column's distance
  void* dquery;         // [row][head_dim], overwritten: the gradient of the queries; null: not wanted
  void* dvectors;       // [column][head_dim], added to: the gradients of the vectors; null: not wanted
  bool finite;          // none of queries and vectors is NaN or infinite
  void* scratch;        // as for BackwardBlock
};

struct BackwardKernel {
  DType operands;
  int strip_rows;
  int lanes;  // numbers of the type of computation in a vector
  std::size_t (*scratch_bytes)(int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim);
  void (*run)(const BackwardBlock&) noexcept;
  void (*run_relative)(const RelativeBlock&) noexcept;  // null if the kernel multiplies pairs
  // Whether all numbers, which have the type of the operands, are finite.
  bool (*finite)(const void* numbers, std::int64_t count) noexcept;
  // The dot product of two padded rows.
  double (*dot)(const void* a, const void* b, std::int64_t count) noexcept;
  // to[i] += from[i], at any addresses
  void (*add)(const void* from, std::int64_t count, void* to) noexcept;
};

// Multiplies registers or tiles as fast as possible, for benchmarks. Returns the number of floating-point operations.
using PeakLoop = double (*)(std::int64_t rounds) noexcept;

// The kernels that read operands of one element type; null where there is none.
struct StoredKernels {
  const AttendKernel* row;                       // few rows: vectors run along head_dim and along keys
  void (*project)(const ProjectArgs&) noexcept;  // for panels of this type
  // Convert contiguous numbers to float, and floats to a 16-bit type. Null for types of computation.
  void (*widen)(const void* from, std::int64_t count, float* to) noexcept;
  void (*narrow)(const float* from, std::int64_t count, void* to) noexcept;
  // to[r][c] = from[c * stride + r], in this type or the type of computation; r < rows, c < columns.
  void (*transpose)(const void* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, DType to_type,
                    void* to) noexcept;
  void (*finish)(const FinishArgs&) noexcept;  // for results of this type
  // Converts contiguous words to the unpacked type, for types with several elements per word.
  void (*unpack)(const void* words, std::int64_t count, void* to) noexcept;
};

// The kernels of one type of computation: float or double.
struct TypeKernels {
  AttendKernel tile;             // many rows: vectors run across query rows
  ByType<StoredKernels> stored;  // this type, and the types that are computed in it
  int lanes;                     // elements per vector
  int row_limit;                 // up to this many rows, row kernels are faster for any number of keys
  int panel_columns;
  // panel[d][i] = rows[i][d]: packs panel_columns rows of `depth` elements into a panel for `project`.
  void (*pack_panel)(const void* const* rows, std::int64_t depth, void* panel) noexcept;
  // scores[j] = exp2(scores[j] - row_max) * factor
  void (*weigh)(void* scores, std::int64_t count, double row_max, double factor) noexcept;
  // sums[j] += numbers[j]
  void (*add)(const void* numbers, std::int64_t count, double* sums) noexcept;
  // Applies dropout to the weights of a row for the keys [first, first + count).
  void (*drop)(const Dropout& dropout, const Row& row, std::int64_t first, std::int64_t count, void* weights) noexcept;
  void (*normalise)(const NormArgs&) noexcept;
  PeakLoop peak_loop;
  BackwardKernel backward;

  const StoredKernels& of(DType dtype) const { return stored[dtype]; }
};

// Kernels for operands that are bfloat16, or that are rounded to bfloat16 or split into a sum of bfloat16 numbers, and
// for codes that are multiplied as integers. A pointer is null if the ISA has no such kernel, or none that is faster
// than FMA.
struct MatrixKernels {
  const AttendKernel* bf16;         // bfloat16 operands
  const AttendKernel* f16;          // float16 operands, each split into two bfloat16
  const AttendKernel* f32_highest;  // float32 operands, each split into three
  const AttendKernel* f32_high;     // split into two
  const AttendKernel* f32_medium;   // rounded to one
  // Row kernels, by the type of keys and values.
  ByType<const AttendKernel*> row;
  // x and weights are bfloat16. Rows of x are 4-byte aligned, and an odd depth is zero-padded. Panels are
  // [cells][panel_columns]: a cell is a pair along the depth, and the number of cells is a multiple of 16.
  void (*project_bf16)(const ProjectArgs&) noexcept;
  void (*project_f32)(const ProjectArgs&) noexcept;  // x is float32, products use FMA; panels as for project_bf16
  // Weights are codes. Rows of x are split into `digits` rows of digits by split_digits. Panels are
  // [cells][panel_columns]: a cell is digit_cell codes along the depth. Groups consist of whole cells.
  void (*project_codes)(const ProjectArgs&) noexcept;
  // Writes, for each digit, a row of `depth` bytes followed by digit_scale_bytes. `depth` is a multiple of digit_cell.
  void (*split_digits)(const float* x, std::int64_t depth, int digits, void* to) noexcept;
  const BackwardKernel* backward_bf16;  // bfloat16 operands
  PeakLoop peak_loop;
};

struct KernelSet {
  const char* name;
  std::uint32_t features;          // bits of Feature that the machine must have
  std::uint32_t not_default_with;  // bits of Feature: on a machine with one of them, the next set is faster
  const TypeKernels& f32;
  const TypeKernels& f64;
  MatrixKernels matrix;

  const TypeKernels& computing(DType computed) const { return computed == DType::f32 ? f32 : f64; }
};

// Features of a CPU and its operating system that kernels require.
enum Feature : std::uint32_t {
  feature_avx2_fma = 1u << 0,     // and F16C
  feature_avx512 = 1u << 1,       // F, DQ, VL and BW, with the registers enabled by the operating system
  feature_avx512_bf16 = 1u << 2,  // and VNNI
  feature_avx512_fp16 = 1u << 3,
  feature_amx = 1u << 4,  // tiles, bfloat16 products, and the operating system's permission to use them
};

}  // namespace selfattn
