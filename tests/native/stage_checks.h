// Calls on a small cache that can fail after each stage, and checks of the state in which they leave the cache.
#pragma once
#include "cache_call.h"
#include "held_cache.h"

namespace selfattn::native {

enum class Stage { claimed, stored, attended, committed };

// Attention over a cache, which fails after a stage; q, k and v are (batch, tokens, heads, width).
Array attend_over(const CacheSource& source, const CacheInputs& inputs, std::int64_t left = -1,
                  Stage last = Stage::committed);

// A layer that appends two tokens to each sequence, and fails after a stage.
Array run_layer(const CacheSource& source, std::int64_t left = -1, Stage last = Stage::committed);

void check_every_stage();

}  // namespace selfattn::native
