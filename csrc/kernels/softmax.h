// The online softmax: maxima, probs and their sums, one block of keys after another.
#pragma once
#include "kernels/exp.h"
#include "kernels/score_tile.h"

namespace selfattn::SELFATTN_ISA {

// The scores of one softmax: lines of Cols vectors, `stride` elements apart. `end` is a pointer, so that loops need no
// other counter.
template <class T>
struct ScoreLines {
  T* scores;
  T* end;
  int stride;
};

template <class T, int Cols>
struct SoftmaxStep {
  Vec<T> peak[Cols];     // maximum scores: before the step, of earlier blocks; after it, of this block as well
  Vec<T> rescale[Cols];  // factor that adapts earlier sums and outputs to the new maximum
  Vec<T> sum[Cols];      // sums of this block's probs; with AcrossKeys, not yet summed over lanes
};

// probs = 2^(score - max). scaled(x) turns a stored number into a score. keep(prob, line, lane) stores the probs of
// `Cell` lines.
template <class Axes, int Cell, class T, int Cols, class Scaled, class Keep>
[[gnu::always_inline]] inline void softmax(const ScoreLines<T>& lines, SoftmaxStep<T, Cols>& step, Scaled scaled,
                                           Keep keep) {
  constexpr int W = Vec<T>::width;
  const Vec<T> nothing = broadcast(minus_infinity<T>);
  Vec<T> peak[Cols], shift[Cols], sum[Cols];
  for (int c = 0; c < Cols; ++c) peak[c] = step.peak[c];
  for (const T* line = lines.scores; line < lines.end; line += lines.stride)
    for (int c = 0; c < Cols; ++c) peak[c] = max(peak[c], scaled(load(line + c * W)));
  for (int c = 0; c < Cols; ++c) {
    peak[c] = Axes::max_of_line(peak[c]);
    // -inf minus -inf is NaN, so a row that has seen no key yet shifts by 0, and its probs stay 0.
    shift[c] = select(peak[c] == nothing, broadcast(T(0)), peak[c]);
    step.rescale[c] = exp2(step.peak[c] - shift[c]);
    step.peak[c] = peak[c];
    sum[c] = broadcast(T(0));
  }
  for (T* line = lines.scores; line < lines.end; line += Cell * lines.stride)
    for (int c = 0; c < Cols; ++c) {
      Vec<T> prob[Cell];
      for (int i = 0; i < Cell; ++i) {
        const T* score = line + i * lines.stride;
        const bool there = i == 0 || score < lines.end;
        prob[i] = there ? exp2(scaled(load(score + c * W)) - shift[c]) : broadcast(T(0));
        sum[c] = sum[c] + prob[i];
      }
      keep(prob, line, c * W);
    }
  for (int c = 0; c < Cols; ++c) step.sum[c] = sum[c];
}

// Initial maximum and sum of a row. A sink counts as a score in the maximum and in the sum, but not in the outputs.
template <class T>
inline void start_softmax(double sink, T& row_max, T& row_sum) {
  row_max = static_cast<T>(sink);
  row_sum = sink == minus_infinity<double> ? T(0) : T(1);
}

// The final factor of outputs. A row that saw no key has sum 0 and output 0.
template <class T>
inline Vec<T> output_factor(Vec<T> sum, bool normalise) {
  const Vec<T> one = broadcast(T(1));
  return normalise ? one / select(sum == broadcast(T(0)), one, sum) : one;
}

}  // namespace selfattn::SELFATTN_ISA
