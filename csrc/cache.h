// The keys and values of sequences that grow: where their tokens stand, how new ones get there, and how attention sees
// them. Owns nothing.
#pragma once
#include <cstdint>

#include "kernels/kernel_set.h"
#include "problem.h"
#include "rope.h"

namespace selfattn {

// Rows of tokens; all steps in bytes. A sequence is a batch entry of one array, or has pages of it.
struct TokenRows {
  char* data = nullptr;
  std::int64_t batch = 0, head = 0, row = 0, page = 0;
};

struct Cache {
  struct Side {
    TokenRows tokens;
    TokenRows scales;  // float32, of codes
    std::int64_t width;
  };
  DType dtype;
  std::int64_t batch, num_kv_heads;
  Side key, value;
  Pages pages;
  const std::int64_t* lengths;  // tokens of each sequence
  TensorView starts;            // the first token that is still held, or absent: 0
};

// A cache as the keys and values of an attention call.
class CachedKeys {
 public:
  // `lengths` holds those of the time of the call.
  CachedKeys(const Cache& cache, const std::int64_t* lengths);
  CachedKeys(const CachedKeys&) = delete;  // views point to its own arrays
  CachedKeys& operator=(const CachedKeys&) = delete;
  void place(AttentionArguments& arguments);

 private:
  struct View {
    std::int64_t shape[4], strides[4];
  };
  TensorView tokens(View& view, const Cache::Side& side, bool bshd) const;
  TensorView scales(View& view, const TokenRows& rows) const;

  const Cache& cache_;
  const std::int64_t* lengths_;
  std::int64_t longest_ = 0;
  std::int64_t count_, step_ = sizeof(std::int64_t);
  View keys_, values_, key_scales_, value_scales_;
};

// Rows of new tokens (batch, heads, count, width) in any strides.
struct Tokens {
  const char* data;
  DType dtype;
  std::int64_t batch, heads, count, width;
  std::int64_t batch_step, head_step, row_step, column_step;
};

// A rotation of each token by its position.
struct Turn {
  const Rope* rope;           // or null: none
  TensorView positions;       // (batch or 1, tokens or 1) with strides, or absent: ...
  const std::int64_t* first;  // ... token t of sequence b stands at first[b] + t
  double* tables;             // room for rope->rotary_dim numbers

  std::int64_t position(std::int64_t sequence, std::int64_t token) const;
};

// Writes rows one after the other: (batch, heads, count, width) in their own type.
void turn_tokens(const Tokens& tokens, const Turn& turn, char* to);

// Writes tokens behind each sequence's length, turned, then rounded to the cache's type. `row` has room for one row of
// the widest type twice.
void store_tokens(const KernelSet& kernels, const Cache& cache, const Cache::Side& side, const Tokens& tokens,
                  const Turn& turn, char* row);

}  // namespace selfattn
