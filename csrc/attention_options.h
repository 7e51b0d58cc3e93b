// The options of a call, as option_list.h lists them.
#pragma once
#include <cstdint>
#include <optional>

namespace selfattn {

// How far the operands of float32 products may be rounded. They are rounded only if this makes products faster.
enum class Precision : std::uint8_t { highest, high, medium };

// The order of the axes of q, k, v and out: heads before the sequence, or after it.
enum class Layout : std::uint8_t { bhsd, bshd };

// The options that the computation uses as they are given. They are also part of the Problem.
struct Settings {
#define SELFATTN_SETTING(type, name, initial) type name = initial;
#include "option_list.h"
};

// All options. An array is a TensorView in the core, and a reference to a Python array in the bindings.
template <class Array>
struct AttentionOptions : Settings {
#define SELFATTN_ARRAY(name, elements) Array name{};
#define SELFATTN_OPTION(type, name, initial) type name = initial;
#define SELFATTN_SETTING(type, name, initial)
#include "option_list.h"
};

}  // namespace selfattn
