#include "definition.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "arithmetic.h"
#include "philox.h"

namespace selfattn::native {
namespace {

using Wide = long double;
constexpr Wide infinity = std::numeric_limits<Wide>::infinity();

// The element at `index` of an array that is broadcast to the shape of a result. The index has as many axes as the
// result.
Wide element(const Array& array, const Extents& index) {
  std::int64_t position = 0;
  const std::size_t ndim = array.shape().size();
  for (std::size_t i = 0; i < ndim; ++i) {
    const std::int64_t extent = array.shape()[i], wanted = index[index.size() - ndim + i];
    position = position * extent + (extent == 1 ? 0 : wanted);
  }
  std::int64_t n;
  if (array.dtype() != DType::i64) return static_cast<Wide>(array.number(position));
  std::memcpy(&n, array.at(position), sizeof n);
  return static_cast<Wide>(n);  // exact: at least 64 bits of significand
}

struct Row {
  Extents batch;
  std::int64_t entry;  // of the batch
  std::int64_t head, query;
};

struct Exact {
  std::vector<Wide> out, magnitude, weights;
  Wide lse, sigma;  // sigma: rounding errors of a score are proportional to it
};

class Definition {
 public:
  Definition(const Case& c, const Results& results)
      : c_(c), ndim_(results.out.shape().size()), bshd_(c.options.layout == selfattn::Layout::bshd && ndim_ > 2) {
    const Extents& out = results.out.shape();
    batch_.assign(out.begin(), out.end() - static_cast<std::ptrdiff_t>(std::min<std::size_t>(ndim_, 3)));
    q_len_ = out[ndim_ - (bshd_ ? 3 : 2)];
    heads_ = ndim_ == 2 ? 1 : out[ndim_ - (bshd_ ? 2 : 3)];
    value_dim_ = out.back();
    kv_len_ = axis(c.k, 1);
    head_dim_ = c.q.shape().back();
    group_ = heads_ / std::max<std::int64_t>(axis(c.k, 2), 1);
  }

  std::int64_t rows() const {
    std::int64_t total = heads_ * q_len_;
    for (const std::int64_t n : batch_) total *= n;
    return total;
  }
  double row_cost() const { return static_cast<double>((kv_len_ + 1) * (head_dim_ + value_dim_ + 1)); }

  Row row(std::int64_t i) const {
    const std::int64_t entry = i / (q_len_ * heads_);
    Row row{batch_, entry, i / q_len_ % heads_, i % q_len_};
    i = entry;
    for (std::size_t axis = batch_.size(); axis-- > 0; i /= batch_[axis]) row.batch[axis] = i % batch_[axis];
    return row;
  }

  Exact compute(const Row& row) const {
    Exact exact{std::vector<Wide>(static_cast<std::size_t>(value_dim_)), {}, {}, -infinity, 0};
    exact.magnitude = exact.out;
    exact.weights.assign(static_cast<std::size_t>(kv_len_), 0);
    const Wide queries = this->queries(row);
    if (static_cast<Wide>(row.query) >= queries) return exact;
    std::vector<Wide> scores(static_cast<std::size_t>(kv_len_), -infinity);
    Wide peak = c_.sinks ? element(c_.sinks, {row.head}) : -infinity;
    const Wide sink = peak;
    for (std::int64_t j = 0; j < kv_len_; ++j) {
      if (!visible(row, j)) continue;
      const auto [score, size] = score_of(row, j);
      scores[static_cast<std::size_t>(j)] = score;
      exact.sigma = std::max(exact.sigma, size);
      peak = std::max(peak, score);
    }
    if (peak == -infinity) return exact;
    Wide total = sink == -infinity ? 0 : std::exp(sink - peak);
    for (const Wide score : scores) total += std::exp(score - peak);
    exact.lse = peak + std::log(total);
    for (std::int64_t j = 0; j < kv_len_; ++j) {
      const Wide weight = std::exp(scores[static_cast<std::size_t>(j)] - peak) / total * kept(row, j);
      exact.weights[static_cast<std::size_t>(j)] = weight;
      if (weight == 0) continue;
      for (std::int64_t d = 0; d < value_dim_; ++d) {
        const Wide value = operand(c_.v, row, row.head / group_, j, d);
        exact.out[static_cast<std::size_t>(d)] += weight * value;
        exact.magnitude[static_cast<std::size_t>(d)] += weight * std::fabs(value);
      }
    }
    return exact;
  }

  Wide result(const Array& out, const Row& row, std::int64_t d) const {
    return operand(out, row, row.head, row.query, d);
  }
  Wide weight(const Array& weights, const Row& row, std::int64_t j) const { return element(weights, scores(row, j)); }
  Wide lse(const Array& lse, const Row& row) const {
    Extents index = scores(row, 0);
    index.pop_back();
    return element(lse, index);
  }
  std::int64_t head_dim() const { return head_dim_; }
  std::int64_t kv_len() const { return kv_len_; }
  std::int64_t value_dim() const { return value_dim_; }

 private:
  // The extent of the sequence axis (from_end = 1) or head axis (2) of q, k or v. `from_end` counts as in layout
  // "bhsd".
  std::int64_t axis(const Array& array, std::size_t from_end) const {
    const std::size_t ndim = array.shape().size();
    if (ndim == 2) return from_end == 2 ? 1 : array.shape()[0];
    return array.shape()[ndim - 1 - (bshd_ ? 3 - from_end : from_end)];
  }

  Wide operand(const Array& array, const Row& row, std::int64_t head, std::int64_t position, std::int64_t d) const {
    Extents index = row.batch;
    if (array.shape().size() == 2)
      index.insert(index.end(), {position, d});
    else
      index.insert(index.end(), {bshd_ ? position : head, bshd_ ? head : position, d});
    return element(array, index);
  }

  Extents scores(const Row& row, std::int64_t j) const {
    Extents index = row.batch;
    if (ndim_ > 2) index.push_back(row.head);
    index.insert(index.end(), {row.query, j});
    return index;
  }
  Extents per_batch(const Row& row) const { return row.batch.empty() ? Extents{0} : row.batch; }

  Wide keys(const Row& row) const {
    return c_.kv_lens ? element(c_.kv_lens, per_batch(row)) : static_cast<Wide>(kv_len_);
  }
  Wide queries(const Row& row) const {
    return c_.q_lens ? element(c_.q_lens, per_batch(row)) : static_cast<Wide>(q_len_);
  }

  Wide distance(const Row& row, std::int64_t j) const {
    const Wide offset = c_.q_offset ? element(c_.q_offset, per_batch(row)) : keys(row) - queries(row);
    return static_cast<Wide>(j) - (static_cast<Wide>(row.query) + offset);
  }

  bool masked(const Row& row, std::int64_t j) const {
    const std::int64_t column = c_.options.recent_mask ? j - static_cast<std::int64_t>(keys(row)) + q_len_ : j;
    return column >= 0 && element(c_.mask, scores(row, column)) == 0;
  }

  // Whether a key is in the chunk of a position. Positions beyond the limits are in no chunk that has a key.
  bool in_chunk(Wide position, std::int64_t j) const {
    constexpr Wide limit = std::int64_t{1} << 60;
    const auto near = static_cast<std::int64_t>(std::clamp(position, -limit, limit));
    return round_down(near, c_.options.chunk) == round_down(j, c_.options.chunk);
  }

  bool visible(const Row& row, std::int64_t j) const {
    const AttentionArguments& o = c_.options;
    const Wide away = distance(row, j);
    if (static_cast<Wide>(j) >= keys(row)) return false;
    if (c_.kv_starts && static_cast<Wide>(j) < element(c_.kv_starts, per_batch(row))) return false;
    if (o.causal && away > 0) return false;
    if (o.window_left >= 0 && away < -static_cast<Wide>(o.window_left)) return false;
    if (o.window_right >= 0 && away > static_cast<Wide>(o.window_right)) return false;
    if (o.chunk != 0 && !in_chunk(static_cast<Wide>(j) - away, j)) return false;
    if (c_.mask && masked(row, j)) return false;
    if (c_.distance_bias && by_distance(c_.distance_bias, o.distance_origin, row, j) == -infinity) return false;
    return !c_.bias || element(c_.bias, scores(row, j)) != -infinity;
  }

  // The factor of a weight under dropout.
  Wide kept(const Row& row, std::int64_t j) const {
    const AttentionArguments& o = c_.options;
    if (o.dropout == 0) return 1;
    const auto word = [](std::int64_t n) { return static_cast<std::uint32_t>(n); };
    const std::uint32_t coordinates[] = {word(row.entry + o.first_entry), word(row.head), word(row.query), word(j / 4)};
    const double threshold = std::nearbyint(std::ldexp(o.dropout, 32));
    return philox_word(coordinates, o.seed, static_cast<int>(j % 4)) < threshold
               ? 0
               : 1 / (1 - static_cast<Wide>(o.dropout));
  }

  // The element of an array (heads, count, ...) or (count, ...) for the distance between query and key, clamped to the
  // ends of the array.
  Wide by_distance(const Array& array, std::int64_t origin, const Row& row, std::int64_t j, std::int64_t d = -1) const {
    Extents index;
    if (d >= 0) index.push_back(d);
    const std::int64_t count = array.shape()[array.shape().size() - 1 - index.size()];
    const Wide place = std::clamp<Wide>(static_cast<Wide>(origin) - distance(row, j), 0, static_cast<Wide>(count - 1));
    index.insert(index.begin(), static_cast<std::int64_t>(place));
    if (array.shape().size() > index.size()) index.insert(index.begin(), row.head);
    return element(array, index);
  }

  // The score, and the sum of the magnitudes of its terms.
  std::pair<Wide, Wide> score_of(const Row& row, std::int64_t j) const {
    const AttentionArguments& o = c_.options;
    const Wide scale = o.scale ? static_cast<Wide>(*o.scale) : 1 / std::sqrt(static_cast<Wide>(head_dim_));
    Wide score = 0, size = 0;
    const auto multiply = [&](Wide query, Wide bias, Wide with) {
      score += scale * (query + bias) * with;
      size += std::fabs(scale) * (std::fabs(query) + std::fabs(bias)) * std::fabs(with);
    };
    for (std::int64_t d = 0; d < head_dim_; ++d) {
      const Wide query = operand(c_.q, row, row.head, row.query, d);
      multiply(query, c_.u ? element(c_.u, {row.head, d}) : 0, operand(c_.k, row, row.head / group_, j, d));
      if (c_.r) multiply(query, element(c_.w, {row.head, d}), by_distance(c_.r, o.r_origin, row, j, d));
    }
    if (o.softcap) score = *o.softcap * std::tanh(score / *o.softcap);
    const auto add = [&](Wide term) {
      score += term;
      size += std::fabs(term);
    };
    if (c_.bias) add(element(c_.bias, scores(row, j)));
    if (c_.distance_bias) add(by_distance(c_.distance_bias, o.distance_origin, row, j));
    if (c_.alibi_slopes) {
      Extents index = row.batch;
      index.push_back(row.head);
      add(-element(c_.alibi_slopes, index) * std::fabs(distance(row, j)));
    }
    return {score, size};
  }

  const Case& c_;
  const std::size_t ndim_;
  const bool bshd_;
  Extents batch_;
  std::int64_t heads_, q_len_, kv_len_, head_dim_, value_dim_, group_;
};

std::string complaint(const char* what, const Row& row, std::int64_t i, Wide got, Wide exact) {
  std::ostringstream text;
  text.precision(18);
  text << what << " of head " << row.head << ", query " << row.query << " at " << i << " is " << got << ", not "
       << exact;
  return text.str();
}

std::string judge_row(const Definition& definition, const Row& row, const Results& results) {
  const Exact exact = definition.compute(row);
  const DType dtype = results.out.dtype();
  const Wide unit = dtype == DType::f64 ? 0x1p-53L : 0x1p-24L;
  // 16-bit results are rounded once more. For subnormal results, the error of this rounding is absolute.
  const Wide last = dtype == DType::f16    ? 0x1p-11L
                    : dtype == DType::bf16 ? 0x1p-8L
                                           : 0,
             least = last > 0 ? 0x1p-25L : 0;
  // This is a bound for the worst case, in which all rounding errors have the same sign. This happens, because a
  // fuzzer's arrays may hold equal numbers.
  const auto dot = static_cast<Wide>(definition.head_dim()), keys = static_cast<Wide>(definition.kv_len());
  const Wide sums = 16 + 2 * std::min<Wide>(keys, 128) + keys / 64;
  const Wide tolerance = (sums + (4 + dot) * exact.sigma) * unit, tiny = 1e-37L;
  if (exact.sigma > 300) return {};  // docs/numerics.md promises nothing here
  for (std::int64_t d = 0; d < definition.value_dim(); ++d) {
    const auto i = static_cast<std::size_t>(d);
    const Wide got = definition.result(results.out, row, d);
    const Wide computed = tolerance * exact.magnitude[i] + tiny;
    if (!(std::fabs(got - exact.out[i]) <= computed + (std::fabs(exact.out[i]) + computed) * last + least))
      return complaint("out", row, d, got, exact.out[i]);
  }
  if (results.lse) {
    const Wide got = definition.lse(results.lse, row);
    if (got != exact.lse && !(std::fabs(got - exact.lse) <= tolerance * (1 + std::fabs(exact.lse))))
      return complaint("lse", row, 0, got, exact.lse);
  }
  for (std::int64_t j = 0; results.weights && j < definition.kv_len(); ++j) {
    const Wide got = definition.weight(results.weights, row, j), wanted = exact.weights[static_cast<std::size_t>(j)];
    const Wide logit = wanted > 0 ? std::fabs(std::log(wanted)) : 0;
    if (!(std::fabs(got - wanted) <= (2 * tolerance + 4 * logit * unit) * wanted + tiny))
      return complaint("weight", row, j, got, wanted);
  }
  return {};
}

}  // namespace

std::string judge(const Case& c, const Results& results, double effort) {
  for (std::int64_t i = 0; i < results.out.count(); ++i)
    if (!std::isfinite(results.out.number(i))) return "an output is not finite";
  const Definition definition(c, results);
  const std::int64_t rows = definition.rows();
  const auto judged = static_cast<std::int64_t>(std::max(effort / definition.row_cost(), 1.0));
  const std::int64_t step = rows / judged + 1;
  for (std::int64_t i = 0; i < rows; i += step)
    if (std::string wrong = judge_row(definition, definition.row(rows - 1 - i), results); !wrong.empty()) return wrong;
  return {};
}

}  // namespace selfattn::native
