// Python types of _core that hold the operands of calls. Used where a call has many operands.
#pragma once
#include "bindings/record.h"
#include "rope.h"

namespace selfattn::bindings {

// Operands of attend_cache(). All but q may be None.
struct CacheInputs {
  py::object q = py::none(), k = py::none(), v = py::none(), rope = py::none(), positions = py::none();
  bool unrounded = false;    // return out in the type of computation
  std::int64_t skipped = 0;  // see CacheSource
  std::int64_t tokens = -1;  // tokens of k and v; -1: as many as queries
};

// The keys or values of a cache: an array (pages, heads, page_size, words), the scales (pages, heads, page_size) of
// codes, else None, and the number of elements in a row.
struct CacheTokens {
  py::object rows = py::none(), scales = py::none();
  std::int64_t width = 0;
};

// Operands of call_layer(). All but x may be None. `step` is a _core.Step.
struct LayerInputs {
  py::object x = py::none(), context = py::none(), positions = py::none(), residual = py::none(), step = py::none();
};

// Weights and biases of a layer. The last five may be None.
struct UnpackedWeights {
  py::object w_q = py::none(), w_k = py::none(), w_v = py::none(), w_o = py::none();
  py::object b_q = py::none(), b_k = py::none(), b_v = py::none(), b_o = py::none();
};

// Norms of a layer: of x, of the result, of queries and of keys, as capsules or None. `q_width` and `k_width` count the
// numbers that q_norm and k_norm normalise together.
struct LayerNorms {
  py::object norm = py::none(), post_norm = py::none(), q_norm = py::none(), k_norm = py::none();
  std::int64_t q_width = 0, k_width = 0;
};

// Weights and biases of a linear layer, and of its gate. All but w may be None. If w (w_gate) holds codes, `scales`
// (`gate_scales`) are the scales of its groups.
struct UnpackedLinear {
  py::object w = py::none(), scales = py::none(), b = py::none();
  py::object w_gate = py::none(), gate_scales = py::none(), b_gate = py::none();
};

// A norm. The vectors are contiguous and have the type of computation; each may be None.
struct NormForm {
  py::object weight = py::none(), bias = py::none();
  double epsilon = 0;
  bool centred = false;
};

// The two linear layers and the norms of a feed-forward network, as capsules. The norms may be None.
struct FeedForwardWeights {
  py::object first = py::none(), second = py::none(), norm = py::none(), post_norm = py::none();
};

// Operands of attention_varlen() and its gradients. The last six may be None. They replace the options of the same
// names, which are None in the call's options: `mask` and `bias` are lists with one item per sequence, and the first
// axis of q_offset, kv_starts, prefix_lens and alibi_slopes counts sequences. The Python layer has checked cu_seqlens
// and the lengths of these lists and axes.
struct VarlenInputs {
  py::object q = py::none(), k = py::none(), v = py::none(), cu_seqlens_q = py::none(), cu_seqlens_k = py::none(),
             mask = py::none(), bias = py::none(), q_offset = py::none(), kv_starts = py::none(),
             prefix_lens = py::none(), alibi_slopes = py::none();
};

// Operands of relative_attention() and its gradients, in addition to q, k and v.
struct RelativeInputs {
  py::object r = py::none(), u = py::none(), w = py::none();
  std::int64_t r_origin = 0;
};

// Operands of a backward pass, in addition to those of the forward pass: the results of the forward pass, and the
// gradients of these results. The last two may be None.
struct GradientInputs {
  py::object grad_out = py::none(), out = py::none(), lse = py::none(), grad_lse = py::none(),
             grad_weights = py::none();
};

// A rope for one head_dim. It has either `frequencies` (float64), or `cosines` and `sines`. `axes` (int64) may be None.
// `frequencies` and `axes` are contiguous, with one number for each pair of dims. The Python layer has checked the
// shapes.
struct RopeTables {
  py::object frequencies = py::none(), cosines = py::none(), sines = py::none(), axes = py::none();
  double scaling = 1;
  bool interleaved = false;
};

std::optional<Rope> rope_of(py::handle description);  // nullopt for None; a Rope refers to arrays of `description`

void register_operands(py::module_& module);

}  // namespace selfattn::bindings
