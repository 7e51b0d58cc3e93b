// A cache of the keys and values of growing sequences: where tokens are stored, how new tokens are written, and how
// attention reads all tokens. Nothing declared here owns memory.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/kernel_set.h"
#include "message.h"
#include "problem.h"

namespace selfattn {

// An array with one row per token and head; strides in bytes. A sequence is either a batch entry of the array or a list
// of pages of the array.
struct TokenRows {
  char* data = nullptr;
  std::int64_t batch = 0, head = 0, row = 0, page = 0;
};

struct Cache {
  // Keys or values.
  struct Rows {
    TokenRows tokens;
    TokenRows scales;  // float32, of codes
    std::int64_t width;
  };
  DType dtype;
  std::int64_t batch, num_kv_heads;
  Rows key, value;
  Pages pages;
  const std::int64_t* lengths;  // number of tokens in each sequence
  TensorView starts;            // first token that each sequence still holds; absent: 0
};

// Whether values are the first numbers of the keys, in the same memory.
inline bool shares_rows(const Cache& cache) { return cache.key.tokens.data == cache.value.tokens.data; }

// The arrays of a cache: pages of `page_size` tokens for each head.
struct CacheStore {
  DType dtype = DType::f32;
  std::int64_t num_pages = 0, num_kv_heads = 0, page_size = 0;
  Cache::Rows key, value;    // TokenRows::batch is the stride between pages
  std::int64_t window = -1;  // the largest distance to the left that queries may see; -1: the cache keeps all tokens
};

// A sequence that holds the tokens [start, length). Its length will become `kept`.
struct Cut {
  std::int64_t sequence, start, length, kept;
};

// Throws std::invalid_argument if `kept` is not in [0, length], or if queries after the cut could see tokens that the
// sequence no longer holds, with this window (-1: none). `verb` follows the argument's name in the message.
void check_cut(const char* function, const Argument& argument, const char* verb, const Cut& cut, std::int64_t window);

// Presents a cache as the keys and values of an attention call.
class CachedKeys {
 public:
  // `lengths` include the tokens that the call appends.
  CachedKeys(const Cache& cache, const std::int64_t* lengths);
  CachedKeys(const CachedKeys&) = delete;  // views point into this object
  CachedKeys& operator=(const CachedKeys&) = delete;
  void present(AttentionArguments& arguments);

 private:
  struct View {
    std::int64_t shape[4], strides[4];
  };
  TensorView tokens(View& view, const Cache::Rows& cached, Layout layout) const;
  TensorView scales(View& view, const TokenRows& rows) const;

  const Cache& cache_;
  const std::int64_t* lengths_;
  std::int64_t longest_ = 0;
  std::int64_t count_, stride_ = sizeof(std::int64_t);
  View keys_, values_, key_scales_, value_scales_;
};

// Views an array of tokens as (batch, tokens, heads, width). In layout bhsd the array has the axes (batch, heads,
// tokens, width); in layout bshd it already has the axes of the view. If the array holds the tokens of one sequence, it
// may lack the first axis.
struct TokensView {
  std::int64_t shape[4], strides[4];
  TensorView view;

  TokensView(const TensorView& tokens, Layout layout);
  TokensView(const TokensView&) = delete;  // the view points into this object
  TokensView& operator=(const TokensView&) = delete;
};

// Scratch memory for a row of keys or values that is converted.
struct TokenMemory {
  char* given;  // in the type of the new tokens
  char* floats;
  std::size_t bytes;

  TokenMemory(char* base, std::int64_t width);
};

// Writes tokens (batch, tokens, heads, width) after the end of each sequence, converted to the cache's type.
void store_tokens(const KernelSet& kernels, const Cache& cache, const Cache::Rows& cached, const TensorView& tokens,
                  char* scratch);

}  // namespace selfattn
