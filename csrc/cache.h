// The keys and values of sequences that grow: where their tokens stand, how new ones get there, and how attention sees
// them. Owns nothing.
#pragma once
#include <cstdint>

#include "kernels/kernel_set.h"
#include "problem.h"

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
  TensorView tokens(View& view, const Cache::Side& side, Layout layout) const;
  TensorView scales(View& view, const TokenRows& rows) const;

  const Cache& cache_;
  const std::int64_t* lengths_;
  std::int64_t longest_ = 0;
  std::int64_t count_, step_ = sizeof(std::int64_t);
  View keys_, values_, key_scales_, value_scales_;
};

// Tokens (batch, heads, tokens, width), or in layout bshd with the middle axes swapped, as a view
// (batch, tokens, heads, width).
struct TokensView {
  std::int64_t shape[4], strides[4];
  TensorView view;

  TokensView(const TensorView& tokens, bool bshd);
  TokensView(const TokensView&) = delete;  // the view points to its own object
  TokensView& operator=(const TokensView&) = delete;
};

// Writes tokens (batch, tokens, heads, width) after each sequence's length, rounded to the cache's type. `row` has room
// for one row of the widest type twice.
void store_tokens(const KernelSet& kernels, const Cache& cache, const Cache::Side& side, const TensorView& tokens,
                  char* row);

}  // namespace selfattn
