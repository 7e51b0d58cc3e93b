#include "fuzz_case.h"

#include <algorithm>
#include <limits>

#include "fuzz_shapes.h"
#include "registry.h"

namespace selfattn::native {
namespace {

Layout read_layout(Bytes& bytes, std::size_t ndim, DType dtype, bool may_repeat) {
  Layout layout;
  const int style = bytes.next();
  const std::int64_t size = size_of(dtype);
  for (std::size_t axis = ndim; axis-- > 0;) layout.order.push_back(static_cast<int>(axis));
  if (style & 1)
    for (std::size_t i = ndim; i > 1; --i)
      std::swap(layout.order[i - 1], layout.order[static_cast<std::size_t>(bytes.below(static_cast<std::int64_t>(i)))]);
  if (style & 2)
    for (std::size_t axis = 0; axis < ndim; ++axis) layout.gaps.push_back(bytes.below(4) * size);
  if (style & 4)
    for (std::size_t axis = 0; axis < ndim; ++axis) layout.negative.push_back(bytes.flag());
  if (style & 8 && may_repeat)
    for (std::size_t axis = 0; axis < ndim; ++axis) layout.repeated.push_back(bytes.flag());
  if ((style & 48) == 48) {  // elements may be unaligned
    layout.misalignment = bytes.below(8);
    for (std::int64_t& gap : layout.gaps) gap += bytes.below(2);
  }
  return layout;
}

struct Values {
  Random random;
  double size;  // of the numbers
  int odd;      // one in this many numbers is NaN, infinite, 0, huge or tiny; 0: none
  int share;    // average number of True among 256 entries of a mask
};

double real(Values& values, double size) {
  if (values.odd > 0 && values.random.below(values.odd) == 0) {
    constexpr double inf = std::numeric_limits<double>::infinity();
    const double odd[] = {inf, -inf, std::numeric_limits<double>::quiet_NaN(), 1e38, -1e38, 1e-42, 0};
    return odd[values.random.below(7)];
  }
  return values.random.real() * size;
}

void fill(Bytes& bytes, Name name, const Array& array, Values& values, std::int64_t limit) {
  const bool far = name == q_offset && bytes.next() % 8 == 7, wrong = limit < 0;
  constexpr std::int64_t ends[] = {std::numeric_limits<std::int64_t>::max(), std::numeric_limits<std::int64_t>::min(),
                                   std::int64_t{1} << 60, -(std::int64_t{1} << 40)};
  array.each([&](char* p) {
    if (name == mask) return store(p, DType::boolean, values.random.below(256) < values.share);
    if (name == bias && values.random.below(8) == 0)
      return store(p, array.dtype(), -std::numeric_limits<double>::infinity());
    if (array.dtype() != DType::i64) return store(p, array.dtype(), real(values, name == bias ? 3 : values.size));
    std::int64_t n = far     ? ends[values.random.below(4)]
                     : wrong ? values.random.below(64) - 32
                             : values.random.below(limit + 1) - (name == q_offset ? limit / 2 : 0);
    std::memcpy(p, &n, sizeof n);
  });
}

void read_store(int bits, Store& store) {
  constexpr std::int64_t page_sizes[] = {0, 1, 3, 16};
  store.page_size = page_sizes[bits & 3];
  store.ring = bits & 4 && store.page_size == 0;
  if (bits & 8) store.codes = bits & 16 ? DType::i4 : DType::i8;
  store.seed = static_cast<std::uint64_t>(bits);
}

// A 16-bit type if the lowest bit of `narrow` is set; the next bit chooses which of the two.
DType read_type(int narrow, int wide) {
  if (narrow & 1) return narrow & 2 ? DType::bf16 : DType::f16;
  return wide != 0 ? DType::f64 : DType::f32;
}

// What the first bytes choose.
struct Kinds {
  DType dtype, kv_dtype, bias_dtype;
  bool spoiled;       // one shape is wrong
  bool claims;        // some extents are larger than any memory
  bool wrong_values;  // lengths may be wrong
  bool starts, relative, table;
};

Kinds read_kinds(Bytes& bytes, Described& d) {
  const std::vector<const KernelSet*>& sets = available_kernels();
  d.kernels = sets[static_cast<std::size_t>(bytes.below(static_cast<std::int64_t>(sets.size())))];
  d.threads = 2 + static_cast<int>(bytes.below(3));
  const int mode = bytes.next();
  // If these bytes are 0, operands and bias have a 32-bit or 64-bit type, which `mode` chooses.
  const int narrow_operands = bytes.next(), narrow_bias = bytes.next();
  d.input.options.recent_mask = narrow_operands & 32;
  read_store(narrow_bias >> 2, d.store);
  d.cached = narrow_operands & 128;
  const DType dtype = read_type(narrow_operands, mode & 1);
  return {.dtype = dtype,
          .kv_dtype = narrow_operands & 4 && !is_narrow(dtype) ? read_type(narrow_operands >> 3 | 1, 0) : dtype,
          .bias_dtype = read_type(narrow_bias, mode & 2),
          .spoiled = (mode & 12) == 12,
          .claims = (mode & 48) == 48,
          .wrong_values = (mode & 192) == 192,
          .starts = (narrow_operands & 64) != 0,
          .relative = (narrow_bias & 64) != 0,
          .table = (narrow_bias & 128) != 0};
}

void read_options(Bytes& bytes, Described& d) {
  AttentionArguments& options = d.input.options;
  const int flags = bytes.next();
  options.layout = flags & 1 ? selfattn::Layout::bshd : selfattn::Layout::bhsd;
  options.causal = flags & 2;
  d.input.lse = flags & 4;
  d.input.weights = flags & 8;
  constexpr std::int64_t reaches[] = {0, 1, 7, 33, 128, 1000, std::int64_t{1} << 60};
  if (flags & 16) options.window_left = bytes.one_of(reaches);
  if (flags & 32) options.window_right = bytes.one_of(reaches);
  if (flags & 64) options.scale = bytes.one_of({0.5, 1.0, 0.0, -0.7, 1e-3, 2.0});
  if (flags & 128) options.softcap = bytes.one_of({5.0, 0.5, 50.0, 1e4});
}

// Reads terms by distance: relative vectors and a table, in forms that are always accepted.
void read_distances(Bytes& bytes, const Kinds& kinds, const Sizes& s, Values& values, Case& c) {
  const std::int64_t heads = s.kv_heads * s.group;
  const auto real_array = [&](Array& array, DType type, Extents shape, const Layout& layout) {
    array = Array(type, std::move(shape), layout);
    array.each([&](char* p) { store(p, type, real(values, values.size)); });
  };
  const std::int64_t count = 1 + bytes.below(bytes.one_of({2, 40, 300}));
  const std::int64_t origin = bytes.below(count);
  if (kinds.relative) {
    Extents shape{count, s.head_dim};
    if (bytes.flag()) shape.insert(shape.begin(), heads);
    real_array(c.r, kinds.kv_dtype, shape, read_layout(bytes, shape.size(), kinds.kv_dtype, /*may_repeat=*/true));
    real_array(c.u, DType::f64, {heads, s.head_dim}, {});
    real_array(c.w, DType::f64, {heads, s.head_dim}, {});
    c.options.r_origin = origin;
  }
  if (kinds.table) {
    real_array(c.distance_bias, DType::f64, {heads, count}, {});
    c.options.distance_origin = origin;
    if (heads > 0 && bytes.flag())
      store(c.distance_bias.at(bytes.below(heads * count)), DType::f64, -std::numeric_limits<double>::infinity());
  }
}

void read_dropout(Bytes& bytes, AttentionArguments& options) {
  options.dropout = bytes.one_of({0.0, 0.1, 0.5, 0.9});
  if (options.dropout != 0) options.seed = static_cast<std::uint64_t>(bytes.below(1 << 16)) * 0x9E3779B97F4A7C15u;
}

// Reads all arrays but those of read_distances. Returns false if NumPy could not have one of them.
bool read_arrays(Bytes& bytes, const Kinds& kinds, const Sizes& sizes, const Shapes& shapes, Values& values,
                 Described& d) {
  Case& c = d.input;
  Array* const arrays[names] = {
      &c.q, &c.k, &c.v, &c.mask, &c.bias, &c.q_offset, &c.q_lens, &c.kv_lens, &c.alibi_slopes, &c.sinks, &c.kv_starts};
  const DType dtypes[names] = {kinds.dtype,      kinds.kv_dtype, kinds.kv_dtype, DType::boolean,
                               kinds.bias_dtype, DType::i64,     DType::i64,     DType::i64,
                               DType::f64,       DType::f64,     DType::i64};
  const std::int64_t limits[names] = {0, 0, 0, 0, 0, 40, sizes.q_len, sizes.kv_len, 0, 0, sizes.kv_len};
  for (int i = 0; i < names; ++i) {
    const Extents& shape = shapes.of[i];
    if (!shapes.present[i]) continue;
    if (!expressible(shape)) return false;
    Layout layout = read_layout(bytes, shape.size(), dtypes[i], /*may_repeat=*/true);
    if (!d.computable) layout.repeated.assign(shape.size(), true);
    *arrays[i] = Array(dtypes[i], shape, layout);
    fill(bytes, static_cast<Name>(i), *arrays[i], values, kinds.wrong_values && i < public_names ? -1 : limits[i]);
  }
  // The result has as many axes as the largest operand, in any order in memory.
  const std::size_t ndim = std::max({shapes.of[q].size(), shapes.of[k].size(), shapes.of[v].size()});
  c.out = read_layout(bytes, ndim, kinds.dtype, /*may_repeat=*/false);
  return true;
}

}  // namespace

Described describe(const std::uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  Described d;
  const Kinds kinds = read_kinds(bytes, d);
  read_options(bytes, d);
  Sizes sizes = read_sizes(bytes);
  if (kinds.claims) read_claims(bytes, sizes);
  std::int64_t heads;
  if (__builtin_mul_overflow(sizes.kv_heads, sizes.group, &heads)) return d;
  Shapes shapes;
  shapes.present[kv_starts] = kinds.starts;
  read_shapes(bytes, sizes, d.input.options, shapes);
  if (kinds.spoiled) spoil(bytes, shapes.of[bytes.below(public_names)]);
  d.computable = !kinds.claims && affordable(sizes, shapes);
  d.valid =
      !kinds.spoiled && !kinds.claims && !(kinds.wrong_values && (shapes.present[q_lens] || shapes.present[kv_lens]));

  Values values{Random(static_cast<std::uint64_t>(bytes.next())), bytes.one_of({1.0, 0.1, 2.0, 1e30}),
                bytes.one_of({0, 0, 0, 3, 50, 2000}), bytes.one_of({128, 255, 250, 5, 0})};
  d.well_behaved = values.size <= 2 && values.odd == 0;
  if (!read_arrays(bytes, kinds, sizes, shapes, values, d)) {
    d.input = Case{};
    return d;
  }
  // Read last, so that older inputs keep their meaning.
  if (d.computable && !kinds.spoiled) read_distances(bytes, kinds, sizes, values, d.input);
  read_dropout(bytes, d.input.options);
  d.input.options.chunk = bytes.one_of({0, 0, 0, 1, 7, 33, 128});
  // With kv_lens alone, the positions of the queries may be ambiguous, and then the call is refused.
  if (d.input.kv_lens && !d.input.q_lens && !d.input.q_offset) d.valid = false;
  return d;
}

}  // namespace selfattn::native
