// What to compute: the arguments of an attention call, checked and converted to the form
//   query (batch, num_heads, q_len, head_dim)      key (batch, num_kv_heads, kv_len, head_dim)
//   out   (batch, num_heads, q_len, value_dim)     value (batch, num_kv_heads, kv_len, value_dim)
// Here batch is any number of leading axes. Every operand keeps its own strides.
#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "arithmetic.h"
#include "attention_options.h"
#include "tensor_view.h"

namespace selfattn {

constexpr int max_axes = 64;  // NumPy's own limit

struct Shape {
  int ndim = 0;
  std::int64_t extent[max_axes];

  Shape() = default;
  explicit Shape(std::span<const std::int64_t> extents) {
    for (const std::int64_t n : extents) append(n);
  }
  void append(std::int64_t n) { extent[ndim++] = n; }
  std::span<const std::int64_t> extents() const { return {extent, static_cast<std::size_t>(ndim)}; }
};

// The extents of any number of axes, of which there are rarely more than a few.
class FewAxes {
 public:
  void assign(std::span<const std::int64_t> extents) {
    ndim_ = extents.size();
    if (ndim_ > few)
      many_.assign(extents.begin(), extents.end());
    else
      std::copy(extents.begin(), extents.end(), few_);
  }
  std::span<const std::int64_t> extents() const { return ndim_ > few ? std::span(many_) : std::span(few_, ndim_); }

 private:
  static constexpr std::size_t few = 6;
  std::size_t ndim_ = 0;
  std::int64_t few_[few];
  std::vector<std::int64_t> many_;
};

// An array in the problem's form. An axis that it lacks or broadcasts has stride 0. Strides are in bytes.
struct Operand {
  char* data = nullptr;
  DType dtype = DType::f32;
  bool in_place = false;  // kernels for this type can use it without a copy: rows are contiguous and aligned
  std::uint8_t axes = 0;  // number of BatchAxis items, from first_axis on: see Problem::axes_of
  int first_axis = 0;
  std::int64_t head = 0;
  std::int64_t row = 0;
  std::int64_t column = 0;
  std::int64_t page = 0;   // see Pages
  std::int64_t batch = 0;  // from one batch entry to the next; 0 if the operand has BatchAxis items

  explicit operator bool() const { return data != nullptr; }
};

// One batch axis of an operand, or several adjacent axes that one stride steps through. An operand has none if
// Operand::batch alone describes all its batch axes. The offset of entry b is the sum of b / inside % extent * stride
// over the axes.
struct BatchAxis {
  std::int64_t inside;  // batch entries per step
  std::int64_t extent;
  std::int64_t stride;
};

// Keys and values in pages of `size` keys. The pages may be in any order. Operand::page is the stride between pages in
// bytes. A ring buffer has no page tables and a page stride of 0, so that all its runs of keys share one page.
struct Pages {
  // The page table of one batch entry, from run `first` on. Run r consists of the keys [r * size, (r + 1) * size).
  // Without `numbers`, run r is in page r.
  struct Table {
    const std::int32_t* numbers = nullptr;
    std::int64_t first = 0;
  };
  std::int64_t size = 0;          // keys per page; 0: not paged
  const Table* tables = nullptr;  // one per batch entry; null: no page tables

  Table of(std::int64_t batch_index) const { return tables ? tables[batch_index] : Table{}; }
  // Offset of a key from its operand's base, in bytes. A block of keys may start before the first key that the
  // sequence still holds. Such keys are hidden, and the first page is read in their place.
  std::int64_t offset(const Table& own, std::int64_t key, std::int64_t page_stride, std::int64_t row_stride) const {
    if (size == 0) return key * row_stride;
    return page_of(own, key / size) * page_stride + key % size * row_stride;
  }
  std::int64_t page_of(const Table& own, std::int64_t run) const {
    return own.numbers ? own.numbers[run < own.first ? 0 : run - own.first] : run;
  }
};

// An array per head, the same for the whole batch. Strides are in bytes; head stride 0: all heads share the array.
struct PerHead {
  const char* data = nullptr;
  DType dtype = DType::f64;
  std::int64_t head = 0;
  std::int64_t row = 0;
  std::int64_t column = 0;
  bool in_place = false;  // see Operand

  explicit operator bool() const { return data != nullptr; }
};

// One row for each distance i + offset - j of query i and key j. Distances beyond an end use the row at that end.
struct ByDistance {
  PerHead rows;
  std::int64_t count = 0;
  std::int64_t origin = 0;

  explicit operator bool() const { return static_cast<bool>(rows); }
  // The index of the row for a distance. Problem::offset_of is clamped, so the sum cannot overflow.
  std::int64_t index_of(std::int64_t distance) const {
    return std::clamp<std::int64_t>(distance + origin, 0, count - 1);
  }
  const char* at(std::int64_t head_index, std::int64_t distance) const {
    return rows.data + head_index * rows.head + index_of(distance) * rows.row;
  }
};

// Keys [begin, end); empty: begin == end.
struct KeyRange {
  std::int64_t begin, end;
};

inline bool is_empty(const KeyRange& keys) { return keys.begin >= keys.end; }
inline KeyRange common(const KeyRange& a, const KeyRange& b) {
  const std::int64_t end = std::min(a.end, b.end);
  return {std::min(std::max(a.begin, b.begin), end), end};
}

// A call on a piece of the keys: k, v, mask and bias hold the keys from `first` on, of kv_len keys in all.
struct Piece {
  std::int64_t first, kv_len;
};

// What a call on a piece continues and leaves for the next piece, one number per row. Problem::out holds the rows'
// outputs, in the type of computation and not normalised.
struct RunningSums {
  Operand row_max, row_sum;  // in the type of computation
  Operand sees_key;          // boolean: the row sees a key, although its sum is 0
  bool begun = false;        // there was a piece before

  explicit operator bool() const { return static_cast<bool>(row_max); }
};

// The arguments as received: shapes have not been checked.
struct AttentionArguments : AttentionOptions<TensorView> {
  const char* function = "attention";  // the function that error messages name
  TensorView q, k, v, r, u, w;  // r (num_heads, count, head_dim) or (count, head_dim); u and w (num_heads, head_dim)
  std::optional<Piece> piece;
  std::int64_t r_origin = 0;
  // For caches: the pages of k and v and the strides between them in bytes, and the scales of codes.
  bool cached = false;  // queries are aligned with the newest keys, however few these are
  Pages pages;
  std::int64_t key_page = 0, value_page = 0;
  TensorView key_scales, value_scales;  // (batch, num_kv_heads, kv_len)
  std::int64_t key_scale_page = 0, value_scale_page = 0;
  bool recent_mask = false;  // the mask covers only the newest q_len keys
};

struct Problem : Settings {
  DType dtype = DType::f32;  // of the computation, of lse and of weights
  bool recent_mask = false;  // the mask covers only the newest q_len keys
  int ndim = 0;              // of out
  FewAxes batch_shape;       // the leading axes of all operands, broadcast
  std::int64_t batch = 1;    // number of entries
  std::int64_t num_heads = 0, num_kv_heads = 0, group_size = 0;
  std::int64_t q_len = 0, kv_len = 0, head_dim = 0, value_dim = 0;
  Operand query, key, value, mask, bias, q_offset, q_lens, kv_lens, alibi_slopes, sinks;
  Operand key_scales, value_scales, kv_starts, prefix_lens;
  // Transformer-XL: the product is (query + key_bias) . key + (query + relative_bias) . relative.
  ByDistance relative;              // vectors of head_dim elements
  PerHead key_bias, relative_bias;  // head_dim contiguous doubles
  ByDistance distance_bias;         // T5: doubles, added to scores like a bias
  Pages pages;
  KeyRange held{0, 0};        // the keys that the operands hold: all keys, or a piece
  Operand out, lse, weights;  // lse and weights may be absent
  Operand key_mass;           // the sum of the weights of each key over the queries; may be absent
  RunningSums running;        // absent: the call starts and finishes the sums of all rows
  double scale = 0;
  double softcap = 0;                 // 0: none
  std::vector<BatchAxis> batch_axes;  // of all operands; most operands have none, only Operand::batch

  // Innermost first.
  std::span<const BatchAxis> axes_of(const Operand& operand) const {
    return {batch_axes.data() + operand.first_axis, operand.axes};
  }
  char* at(const Operand& operand, std::int64_t batch_index) const {
    char* p = operand.data + batch_index * operand.batch;
    for (const BatchAxis& axis : axes_of(operand)) p += batch_index / axis.inside % axis.extent * axis.stride;
    return p;
  }
  std::int64_t held_keys() const { return held.end - held.begin; }
  std::int64_t keys_of(std::int64_t batch_index) const;          // end of an entry's valid keys
  std::int64_t prefix_of(std::int64_t batch_index) const;        // every query sees the keys before it; may be 0
  std::int64_t start_of(std::int64_t batch_index) const;         // first key that the entry still holds
  std::int64_t masked_from(std::int64_t batch_index) const;      // the key of the mask's first column
  std::int64_t queries_of(std::int64_t batch_index) const;       // number of valid queries
  std::int64_t exact_offset_of(std::int64_t batch_index) const;  // key aligned with query 0; any int64
  std::int64_t offset_of(std::int64_t batch_index) const;  // exact_offset_of, clamped so that sums cannot overflow
};

static_assert(sizeof(Problem) <= 1728);  // a call of many sequences has one for each

// Returns the int64 at an address that may be unaligned.
std::int64_t integer_at(const char* p);

// Throws std::invalid_argument; the message names the function, the argument, its value and the rule. Until attach_out,
// the problem describes `out` as a new array of the queries' type: the problem can be planned, but not computed.
Problem make_problem(const AttentionArguments& arguments);

// The shape of an array like q, k, v or out, with all batch axes, in the problem's layout.
Shape rows_shape(const Problem& problem, std::int64_t heads, std::int64_t length, std::int64_t dim);
Shape out_shape(const Problem& problem);
Shape lse_shape(const Problem& problem);
Shape weights_shape(const Problem& problem);
Shape key_mass_shape(const Problem& problem);

// Operands for arrays: place_rows takes the shape rows_shape, place_per_row takes lse_shape, and place_scores takes any
// shape that broadcasts to weights_shape.
Operand place_rows(Problem& problem, const TensorView& view);
Operand place_per_row(Problem& problem, const TensorView& view);
Operand place_scores(Problem& problem, const TensorView& view);

void attach_out(Problem& problem, const TensorView& out);
void attach_lse(Problem& problem, const TensorView& lse);
void attach_weights(Problem& problem, const TensorView& weights);
void attach_key_mass(Problem& problem, const TensorView& mass);  // all zeros

// The distances i + offset - j of query i and key j at which causal and window let the query see the key; absent:
// unbounded.
struct VisibleDistances {
  std::optional<std::int64_t> least, most;
};
VisibleDistances visible_distances(const Problem& problem);

struct ValidKeys {
  std::int64_t begin, end;   // the valid keys of a batch entry
  std::int64_t offset;       // the key aligned with query 0
  std::int64_t first, last;  // causal and window let query i see the keys first + i to last + i
  std::int64_t chunk;        // length of the chunks of keys; 0: none
  std::int64_t prefix;       // end of the keys that every query sees
};
ValidKeys valid_keys(const Problem& problem, std::int64_t batch_index);
// The keys that a query of a batch entry may see, before mask and bias.
inline KeyRange visible_keys(std::int64_t query, const ValidKeys& valid) {
  std::int64_t begin = std::max(valid.begin, query + valid.first),
               end = std::min(valid.end, std::max(query + valid.last + 1, valid.prefix));
  if (valid.chunk != 0) {
    const std::int64_t chunk = round_down(query + valid.offset, valid.chunk);
    begin = std::max(begin, chunk);
    end = std::min(end, chunk + valid.chunk);
  }
  end = std::max<std::int64_t>(end, 0);
  return {std::min(begin, end), end};
}
// The first token that a query at a position, and so any later query, sees through a window: visible_keys(...).begin of
// a query that sees `window` tokens to its left. A negative window is unbounded.
constexpr std::int64_t first_seen(std::int64_t position, std::int64_t window) {
  return window < 0 ? 0 : std::max<std::int64_t>(position - window, 0);
}

}  // namespace selfattn
