// Supplies blocks of keys and values of one KV head of one batch entry. A kernel needs rows of contiguous, aligned
// elements of one type. If the operand has this form, blocks are used in place; otherwise each block is copied when it
// is needed.
#pragma once
#include "plan.h"
#include "thread_memory.h"

namespace selfattn {

class KeySource {
 public:
  KeySource(const Problem& problem, const Plan& plan, const ThreadMemory& memory, std::int64_t batch,
            std::int64_t kv_head);
  KeyBlock block(std::int64_t first, int count) const;

 private:
  // Keys or values, and the scales of their codes.
  struct Input {
    const Operand& operand;
    const Operand& scales;
    const char* base;
    const char* scale_base;
    std::int64_t width;
    bool copies;
    char* copy;
    const void** rows;
    float* scale;
  };
  struct Rows {
    const void* data;
    std::int64_t stride;
  };

  const char* at(const Operand& operand, const char* base, std::int64_t key) const;
  template <class Use>
  void each_run(const Operand& operand, const char* base, std::int64_t first, std::int64_t count, Use use) const;
  Rows prepare(const Input& input, std::int64_t first, int count) const;
  void copy(const Input& input, std::int64_t first, int count) const;
  void list(const Input& input, std::int64_t first, int count) const;
  void list_known(const Input& input, std::int64_t first, std::int64_t count) const;
  LaterRows later(const Input& input, std::int64_t first, int count) const;
  void read_scales(const Input& input, std::int64_t first, int count) const;

  const Problem& problem_;
  const Plan& plan_;
  const Pages::Table pages_;
  const std::int64_t end_;  // of the batch entry's valid keys that are held
  const Input keys_, values_;
};

}  // namespace selfattn
