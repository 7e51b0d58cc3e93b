#include "bindings/operands.h"

#include "bindings/arrays.h"

namespace selfattn::bindings {
namespace {

constexpr Field<RopeTables> rope_fields[] = {
    field<RopeTables, &RopeTables::frequencies>("frequencies"),
    field<RopeTables, &RopeTables::cosines>("cosines"),
    field<RopeTables, &RopeTables::sines>("sines"),
    field<RopeTables, &RopeTables::axes>("axes"),
    field<RopeTables, &RopeTables::scaling>("scaling"),
    field<RopeTables, &RopeTables::interleaved>("interleaved"),
};

constexpr Field<CacheInputs> cache_fields[] = {
    field<CacheInputs, &CacheInputs::q>("q"),
    field<CacheInputs, &CacheInputs::k>("k"),
    field<CacheInputs, &CacheInputs::v>("v"),
    field<CacheInputs, &CacheInputs::rope>("rope"),
    field<CacheInputs, &CacheInputs::positions>("positions"),
    field<CacheInputs, &CacheInputs::unrounded>("unrounded"),
    field<CacheInputs, &CacheInputs::skipped>("skipped"),
    field<CacheInputs, &CacheInputs::tokens>("tokens"),
};

constexpr Field<CacheTokens> token_fields[] = {
    field<CacheTokens, &CacheTokens::rows>("rows"),
    field<CacheTokens, &CacheTokens::scales>("scales"),
    field<CacheTokens, &CacheTokens::width>("width"),
};

constexpr Field<LayerInputs> layer_fields[] = {
    field<LayerInputs, &LayerInputs::x>("x"),
    field<LayerInputs, &LayerInputs::context>("context"),
    field<LayerInputs, &LayerInputs::positions>("positions"),
    field<LayerInputs, &LayerInputs::residual>("residual"),
    field<LayerInputs, &LayerInputs::step>("step"),
};

constexpr Field<UnpackedWeights> weight_fields[] = {
    field<UnpackedWeights, &UnpackedWeights::w_q>("w_q"), field<UnpackedWeights, &UnpackedWeights::w_k>("w_k"),
    field<UnpackedWeights, &UnpackedWeights::w_v>("w_v"), field<UnpackedWeights, &UnpackedWeights::w_o>("w_o"),
    field<UnpackedWeights, &UnpackedWeights::b_q>("b_q"), field<UnpackedWeights, &UnpackedWeights::b_k>("b_k"),
    field<UnpackedWeights, &UnpackedWeights::b_v>("b_v"), field<UnpackedWeights, &UnpackedWeights::b_o>("b_o"),
};

constexpr Field<LayerNorms> norm_fields[] = {
    field<LayerNorms, &LayerNorms::norm>("norm"),       field<LayerNorms, &LayerNorms::post_norm>("post_norm"),
    field<LayerNorms, &LayerNorms::q_norm>("q_norm"),   field<LayerNorms, &LayerNorms::k_norm>("k_norm"),
    field<LayerNorms, &LayerNorms::q_width>("q_width"), field<LayerNorms, &LayerNorms::k_width>("k_width"),
};

constexpr Field<UnpackedLinear> linear_fields[] = {
    field<UnpackedLinear, &UnpackedLinear::w>("w"),
    field<UnpackedLinear, &UnpackedLinear::scales>("scales"),
    field<UnpackedLinear, &UnpackedLinear::b>("b"),
    field<UnpackedLinear, &UnpackedLinear::w_gate>("w_gate"),
    field<UnpackedLinear, &UnpackedLinear::gate_scales>("gate_scales"),
    field<UnpackedLinear, &UnpackedLinear::b_gate>("b_gate"),
};

constexpr Field<NormForm> form_fields[] = {
    field<NormForm, &NormForm::weight>("weight"),
    field<NormForm, &NormForm::bias>("bias"),
    field<NormForm, &NormForm::epsilon>("eps"),
    field<NormForm, &NormForm::centred>("centred"),
};

constexpr Field<FeedForwardWeights> feed_forward_fields[] = {
    field<FeedForwardWeights, &FeedForwardWeights::first>("first"),
    field<FeedForwardWeights, &FeedForwardWeights::second>("second"),
    field<FeedForwardWeights, &FeedForwardWeights::norm>("norm"),
    field<FeedForwardWeights, &FeedForwardWeights::post_norm>("post_norm"),
};

constexpr Field<VarlenInputs> varlen_fields[] = {
    field<VarlenInputs, &VarlenInputs::q>("q"),
    field<VarlenInputs, &VarlenInputs::k>("k"),
    field<VarlenInputs, &VarlenInputs::v>("v"),
    field<VarlenInputs, &VarlenInputs::cu_seqlens_q>("cu_seqlens_q"),
    field<VarlenInputs, &VarlenInputs::cu_seqlens_k>("cu_seqlens_k"),
    field<VarlenInputs, &VarlenInputs::mask>("mask"),
    field<VarlenInputs, &VarlenInputs::bias>("bias"),
    field<VarlenInputs, &VarlenInputs::q_offset>("q_offset"),
    field<VarlenInputs, &VarlenInputs::kv_starts>("kv_starts"),
    field<VarlenInputs, &VarlenInputs::prefix_lens>("prefix_lens"),
    field<VarlenInputs, &VarlenInputs::alibi_slopes>("alibi_slopes"),
};

constexpr Field<RelativeInputs> relative_fields[] = {
    field<RelativeInputs, &RelativeInputs::r>("r"),
    field<RelativeInputs, &RelativeInputs::u>("u"),
    field<RelativeInputs, &RelativeInputs::w>("w"),
    field<RelativeInputs, &RelativeInputs::r_origin>("r_origin"),
};

constexpr Field<GradientInputs> gradient_fields[] = {
    field<GradientInputs, &GradientInputs::grad_out>("grad_out"),
    field<GradientInputs, &GradientInputs::out>("out"),
    field<GradientInputs, &GradientInputs::lse>("lse"),
    field<GradientInputs, &GradientInputs::grad_lse>("grad_lse"),
    field<GradientInputs, &GradientInputs::grad_weights>("grad_weights"),
};

}  // namespace

std::optional<Rope> rope_of(py::handle description) {
  if (description.is_none()) return std::nullopt;
  const RopeTables& tables = Record<RopeTables>::in(description);
  const TensorView frequencies = optional_view(tables.frequencies, DType::f64);
  const TensorView axes = optional_view(tables.axes, DType::i64);
  Rope rope{.interleaved = tables.interleaved, .scaling = tables.scaling};
  if (frequencies) {
    rope.frequencies = static_cast<const double*>(frequencies.data);
  } else {
    rope.cosines = float_view("rope", "cosines", tables.cosines);
    rope.sines = float_view("rope", "sines", tables.sines);
  }
  rope.rotary_dim = 2 * (frequencies ? frequencies : rope.cosines).extent(0);
  if (axes) rope.axes = static_cast<const std::int64_t*>(axes.data);
  return rope;
}

void register_operands(py::module_& module) {
  Record<RopeTables>::add(module, "Rope", rope_fields);
  Record<CacheInputs>::add(module, "CacheInputs", cache_fields);
  Record<CacheTokens>::add(module, "CacheTokens", token_fields);
  Record<LayerInputs>::add(module, "LayerInputs", layer_fields);
  Record<UnpackedWeights>::add(module, "UnpackedWeights", weight_fields);
  Record<LayerNorms>::add(module, "LayerNorms", norm_fields);
  Record<UnpackedLinear>::add(module, "UnpackedLinear", linear_fields);
  Record<NormForm>::add(module, "NormForm", form_fields);
  Record<FeedForwardWeights>::add(module, "FeedForwardWeights", feed_forward_fields);
  Record<VarlenInputs>::add(module, "VarlenInputs", varlen_fields);
  Record<RelativeInputs>::add(module, "RelativeInputs", relative_fields);
  Record<GradientInputs>::add(module, "GradientInputs", gradient_fields);
}

}  // namespace selfattn::bindings
