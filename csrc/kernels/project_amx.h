// Linear projection with AMX: x and weights are bfloat16.
#pragma once
#include "kernels/amx_matmul.h"
#include "kernels/kernel_set.h"
#include "kernels/pack.h"

namespace selfattn::SELFATTN_ISA {

// Loads tiles of the left operand: rows of x in memory. Tiles that reach beyond the rows or the depth are padded with
// 0.
struct ProjectedRows {
  const float* x;
  std::int64_t stride, rows, depth;  // in cells

  template <int Tile, int R>
  void operator()(int, std::int64_t k) const {
    const std::int64_t there = rows - R * tile_rows, cells = depth - k;
    const float* from = x + R * tile_rows * stride + k;
    if (there >= tile_rows && cells >= tile_cells) return load_tile<Tile>(from, stride);
    alignas(64) float whole[tile_rows * tile_cells];
    for (int r = 0; r < tile_rows; ++r)
      store(whole + r * tile_cells, r < there ? load_up_to(from + r * stride, cells) : broadcast(0.0f));
    load_tile<Tile>(whole, tile_cells);
  }
};

template <int Rows, int Cols>
inline void project_block(const ProjectArgs& args, int first_column, int panel_columns, std::int64_t row) {
  constexpr int W = VecF::width;
  const std::int64_t depth = ceil_div(args.depth, 2), x_stride = args.x_stride / 2;
  const ProjectedRows x{static_cast<const float*>(args.x) + row * x_stride, x_stride, args.rows - row, depth};
  alignas(64) float sums[Rows * tile_rows * Cols * W];
  clear_sums<Rows, Cols>();
  multiply_cells<1, Rows, Cols>(x, {static_cast<const float*>(args.panel) + first_column, panel_columns, 0}, depth);
  store_sums<Rows, Cols>(sums, Cols * W);
  const float* bias = static_cast<const float*>(args.bias);
  for (std::int64_t r = 0; r < Rows * tile_rows && row + r < args.rows; ++r) {
    float* out = static_cast<float*>(args.out) + (row + r) * args.out_stride;
    for (int c = 0; c < Cols; ++c) {
      const int column = first_column + c * W;
      if (column >= args.columns) break;
      const VecF sum = load(sums + (r * Cols + c) * W);
      store_up_to(out + column, bias ? sum + load(bias + column) : sum, args.columns - column);
    }
  }
}

// Panels are three tiles wide.
inline void project_panel(const ProjectArgs& args) {
  constexpr int W = VecF::width, panel_columns = 3 * W;
  for (std::int64_t row = 0; row < args.rows; row += 2 * tile_rows) {
    if (args.rows - row > tile_rows) {
      project_block<2, 2>(args, 0, panel_columns, row);
      project_block<2, 1>(args, 2 * W, panel_columns, row);
    } else {
      project_block<1, 2>(args, 0, panel_columns, row);
      project_block<1, 1>(args, 2 * W, panel_columns, row);
    }
  }
}

inline void project_amx(const ProjectArgs& args) noexcept {
  constexpr int panel_columns = 3 * VecF::width;
  configure_tiles();
  for (ProjectArgs panel = args; panel.columns > 0; panel.columns -= panel_columns) {
    project_panel(panel);
    panel.panel = static_cast<const char*>(panel.panel) + panel.panel_stride;
    if (panel.bias) panel.bias = static_cast<const float*>(panel.bias) + panel_columns;
    panel.out = static_cast<float*>(panel.out) + panel_columns;
  }
  release_tiles();
}

}  // namespace selfattn::SELFATTN_ISA
