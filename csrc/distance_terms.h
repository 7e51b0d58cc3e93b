// Score terms that depend on the distance between query and key: relative products and distance biases. They are
// computed for a few hundred keys at a time, so that no array has an element for every score. Each row reads its terms
// from its own start address, so that rows need not be shifted in memory.
#pragma once
#include <cstdint>

#include "kernels/kernel_set.h"
#include "score_rows.h"

namespace selfattn {

namespace core {
struct Carver;
}

// How relative products are computed.
struct RelativeProducts {
  const KernelSet* kernels = nullptr;
  const TypeKernels* types = nullptr;
  bool copies = false;    // kernels cannot read the vectors in place
  std::int64_t keys = 0;  // number of keys for which they are computed at a time
};

// Scratch memory of one thread for the terms of a block of rows.
struct DistanceMemory {
  char* queries = nullptr;         // [row][head_dim]: queries plus relative_bias
  const void** vectors = nullptr;  // pointers to the vectors of a panel
  char* copies = nullptr;          // copies of these vectors, if kernels cannot read them in place
  char* panel = nullptr;           // the packed panel
  char* products = nullptr;        // [row][stride]
  std::int64_t stride = 0;
  char* biases = nullptr;  // lines of biases: one per head of the group, or per row if the caller passes a bias too
  std::int64_t bias_stride = 0;
};

// Takes the memory for blocks of `rows` rows and `keys` keys.
DistanceMemory take_distance_memory(core::Carver& carver, const Problem& problem, const RelativeProducts& relative,
                                    std::int64_t rows, std::int64_t keys);

class DistanceTerms {
 public:
  // `rows` are the rows of the span. Copies the queries of the relative products. The pointers in `rows` are set by
  // prepare().
  DistanceTerms(const Problem& problem, const RelativeProducts& relative, const RowSpan& span, Row* rows,
                const DistanceMemory& memory);

  // Points the rows to their terms for the keys [first, first + count). Must be called for the blocks of keys in order;
  // `end` is the end of the last block.
  void prepare(std::int64_t first, int count, std::int64_t end);

 private:
  void multiply(std::int64_t first, std::int64_t count);
  template <class T>
  void fill_biases(std::int64_t first, int count) const;
  template <class T>
  void add_biases(std::int64_t first, int count) const;

  const Problem& problem_;
  const RelativeProducts relative_;
  const RowSpan& span_;
  Row* const rows_;
  const DistanceMemory& memory_;
  const std::int64_t offset_;
  std::int64_t made_ = -1;  // end of the keys whose relative products are computed
};

}  // namespace selfattn
