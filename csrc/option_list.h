// Every option of a call. attention_options.h makes the core's options from this list, and bindings/options makes the
// fields of _core.Options from it.
//
//   SELFATTN_ARRAY(name, elements)          an array of booleans, of any real numbers, of int64 (i64) or float64 (f64)
//   SELFATTN_SETTING(type, name, initial)   an option that the computation uses as it is given
//   SELFATTN_OPTION(type, name, initial)    any other option
//
// Before a file includes this list, it defines the macros that it needs. The list undefines them again.
#ifndef SELFATTN_ARRAY
#define SELFATTN_ARRAY(name, elements)
#endif
#ifndef SELFATTN_OPTION
#define SELFATTN_OPTION(type, name, initial)
#endif
#ifndef SELFATTN_SETTING
#define SELFATTN_SETTING SELFATTN_OPTION
#endif

SELFATTN_ARRAY(mask, boolean)
SELFATTN_ARRAY(bias, real)
SELFATTN_ARRAY(q_offset, i64)
SELFATTN_ARRAY(q_lens, i64)
SELFATTN_ARRAY(kv_lens, i64)
SELFATTN_ARRAY(kv_starts, i64)    // the first valid key; in a cache, the first that the sequence still holds
SELFATTN_ARRAY(prefix_lens, i64)  // every query sees the keys before it
SELFATTN_ARRAY(alibi_slopes, f64)
SELFATTN_ARRAY(sinks, f64)
SELFATTN_ARRAY(distance_bias, f64)  // (num_heads, count)

SELFATTN_SETTING(Layout, layout, Layout::bhsd)
SELFATTN_SETTING(bool, causal, false)
SELFATTN_SETTING(Precision, precision, Precision::highest)
SELFATTN_SETTING(std::int64_t, window_left, -1)  // -1: unbounded
SELFATTN_SETTING(std::int64_t, window_right, -1)
SELFATTN_SETTING(std::int64_t, chunk, 0)  // queries see keys of their own chunk of this many positions; 0: all
SELFATTN_SETTING(double, dropout, 0)      // rate at which weights are dropped, in [0, 1)
SELFATTN_SETTING(std::uint64_t, seed, 0)  // of dropout
// For dropout, if the call computes a part of a larger problem: the first batch entry, head, query and key of the part.
SELFATTN_SETTING(std::int64_t, first_entry, 0)
SELFATTN_SETTING(std::int64_t, first_head, 0)
SELFATTN_SETTING(std::int64_t, first_query, 0)
SELFATTN_SETTING(std::int64_t, first_key, 0)

SELFATTN_OPTION(std::optional<double>, scale, std::nullopt)  // absent: 1 / sqrt(head_dim)
SELFATTN_OPTION(std::optional<double>, softcap, std::nullopt)
SELFATTN_OPTION(std::int64_t, distance_origin, 0)  // the column of distance_bias for distance 0
SELFATTN_OPTION(bool, same_tokens, false)          // query i and key i are the same token
SELFATTN_OPTION(bool, return_lse, false)
SELFATTN_OPTION(bool, return_weights, false)
SELFATTN_OPTION(bool, return_key_mass, false)
SELFATTN_OPTION(bool, exact, false)   // return out and gradients in the type of computation, and lse in float64
SELFATTN_OPTION(int, num_threads, 0)  // 0: the default

#undef SELFATTN_ARRAY
#undef SELFATTN_SETTING
#undef SELFATTN_OPTION
