// The operands of calls that take many, as types of the module.
#pragma once
#include "bindings/record.h"
#include "rope.h"

namespace selfattn::bindings {

// Of attend_cache(); all but q may be None.
struct CacheInputs {
  py::object q = py::none(), k = py::none(), v = py::none(), rope = py::none(), positions = py::none();
  bool unrounded = false;    // return out in the type of computation
  std::int64_t skipped = 0;  // see CacheSource
};

// Of call_layer(); all but x may be None. `store` and `sequences` are those of a cache.
struct LayerInputs {
  py::object x = py::none(), context = py::none(), positions = py::none(), residual = py::none(), store = py::none(),
             sequences = py::none();
};

// Of attention_varlen() and its gradients. The last four replace the options of the same names, which are None in the
// call's options. Masks and biases are lists of arrays; q_offset and alibi_slopes are arrays whose first axis counts
// sequences; each of them may be None. The Python layer has checked lengths.
struct VarlenInputs {
  py::object q = py::none(), k = py::none(), v = py::none(), cu_seqlens_q = py::none(), cu_seqlens_k = py::none(),
             mask = py::none(), bias = py::none(), q_offset = py::none(), alibi_slopes = py::none();
};

// Of relative_attention() and its gradients, in addition to q, k and v.
struct RelativeTerms {
  py::object r = py::none(), u = py::none(), w = py::none();
  std::int64_t r_origin = 0;
};

// Of a backward pass, in addition to the operands of the forward pass: its results, and the gradients of these. The
// last two may be None.
struct GradientInputs {
  py::object grad_out = py::none(), out = py::none(), lse = py::none(), grad_lse = py::none(),
             grad_weights = py::none();
};

std::optional<Rope> rope_of(py::handle description);  // a _core.Rope or None

void register_operands(py::module_& module);

}  // namespace selfattn::bindings
