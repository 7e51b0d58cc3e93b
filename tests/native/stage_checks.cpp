#include "stage_checks.h"

#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "layer.h"
#include "page_growth.h"

namespace selfattn::native {
namespace {

AttentionArguments arguments_of(const char* function, std::int64_t left) {
  AttentionArguments arguments;
  arguments.function = function;
  arguments.layout = selfattn::Layout::bshd;
  arguments.causal = true;
  arguments.window_left = left;
  return arguments;
}

// Runs the work of a call. Before it fails as stored, it stores k and v.
template <class Work>
void run(const CacheStep& step, const TensorView& k, const TensorView& v, Stage last, Work work) {
  step.run([&] {
    if (last == Stage::claimed) fail();
    if (last == Stage::stored) step.store(active_kernels(), k, v), fail();
    const bool finished = work();
    if (last == Stage::attended) fail();  // as after an interrupt
    SELFATTN_CHECK(finished);
  });
}

constexpr double frequencies[key_width / 2] = {1, 0.1};

// A layer with rotary embedding and an output projection.
LayerWeights make_layer(std::int64_t width) {
  const KernelSet& kernels = active_kernels();
  const auto projection = [&](std::int64_t depth, std::int64_t columns) {
    return Projection(kernels, numbers({depth, columns}, 7).view(), {});
  };
  LayerWeights layer{&kernels,
                     DType::f32,
                     heads,
                     heads,
                     key_width,
                     value_width,
                     projection(width, heads * key_width),
                     projection(width, heads * key_width),
                     projection(width, heads * value_width),
                     std::nullopt,
                     Rope{.rotary_dim = key_width, .frequencies = frequencies},
                     nullptr,
                     nullptr,
                     {},
                     {}};
  layer.output.emplace(projection(heads * value_width, width));
  return layer;
}

}  // namespace

Array attend_over(const CacheSource& source, const CacheInputs& inputs, std::int64_t left, Stage last) {
  Array out(DType::f32, {batch, inputs.q.extent(2), heads, value_width});
  CacheStep step("attend", source, inputs.k ? inputs.q.extent(2) : 0);
  CacheCall call(step, inputs, arguments_of("attend", left));
  attach_out(call.problem(), out.view());
  const Plan plan = make_plan(call.problem(), active_kernels());
  run(step, inputs.k, inputs.v, last, [&] { return call.run(plan, 1, nullptr); });
  return out;
}

Array run_layer(const CacheSource& source, std::int64_t left, Stage last) {
  constexpr std::int64_t count = 2, width = 5;
  const LayerWeights layer = make_layer(width);
  const Array x = numbers({batch, count, width}, 8);
  Array out(DType::f32, x.shape());
  CacheStep step("layer", source, count);
  LayerCall call(layer, x.view(), {}, {}, &step, arguments_of("layer", left));
  const NewTokens tokens(count);
  run(step, tokens.k.view(), tokens.v.view(), last, [&] { return call.run(out.view(), {}, 1, nullptr); });
  return out;
}

namespace {

using State = std::vector<std::int64_t>;

// A call that appends two tokens to each sequence, with a window of 3.
struct Call {
  const char* name;
  void (*run)(const CacheSource& source, Stage last);

  void begin(const char* section) const {
    static std::string title;  // begin_section keeps its address
    title = std::string("failures of ") + name + ", " + section;
    test::begin_section(title.c_str());
  }
};

// `open` makes the source of each call. `state` is what a cache must still hold after a call that failed.
void fail_after_each_stage(const Call& call, const std::function<CacheSource()>& open,
                           const std::function<State()>& state) {
  const State before = state();
  for (const Stage last : {Stage::claimed, Stage::stored, Stage::attended})
    SELFATTN_CHECK(fails([&] { call.run(open(), last); }) && state() == before);
  call.run(open(), Stage::committed);
  SELFATTN_CHECK(state() != before);
}

State bytes_of(const Held& held) {
  const std::vector<char> k = held.k.bytes(), v = held.v.bytes();
  State found(k.begin(), k.end());
  found.insert(found.end(), v.begin(), v.end());
  return found;
}

void fail_with_ledger(const Call& call, std::int64_t window) {
  call.begin(window < 0 ? "with a ledger" : "with a ring");
  Held held;
  held.store.window = window;
  held.set(3, 5);
  const auto lengths = [&] { return State(held.in_force(), held.in_force() + 2); };
  fail_after_each_stage(call, [&] { return held.source(); }, lengths);
}

void fail_in_pages_of_the_caller(const Call& call) {
  call.begin("in pages of the caller");
  Held held(3);
  const std::int32_t first[] = {2, 0}, second[] = {1};
  std::int64_t lengths[] = {7, 5};
  std::unique_ptr<PageChanges> changes;
  const auto open = [&] {
    changes.reset(new PageChanges({{first, 2, 0, lengths}, {second, 1, 0, lengths + 1}}, 2));
    return held.source(*changes);
  };
  fail_after_each_stage(call, open, [&] {
    State found = bytes_of(held);
    found.insert(found.end(), lengths, lengths + batch);
    return found;
  });
}

void fail_in_pool(const Call& call) {
  call.begin("in a pool whose pages are all in use");
  Held held(4);
  held.store.window = 3;
  PagePool pool(4, slots);
  const std::vector<std::int64_t> ids = {pool.add(), pool.add()};
  std::unique_ptr<PageChanges> changes;
  const auto open = [&](std::int64_t tokens) {
    auto growth = std::make_unique<PageGrowth>(pool);
    growth->begin({"append", ids, tokens, 3});
    changes = std::move(growth);
    return held.source(*changes);
  };
  append(open(16), NewTokens(16));  // whole pages: all that is written later is in reused pages
  const auto state = [&] {
    State found = bytes_of(held);
    for (const auto& [id, row] : pool.rows()) {
      found.insert(found.end(), {row.length, row.start, pool.count(row)});
      found.insert(found.end(), row.pages.begin(), row.pages.begin() + pool.count(row));
    }
    for (std::int32_t page = 0; page < 4; ++page) found.push_back(pool.sharers(page));
    found.push_back(static_cast<std::int64_t>(pool.free_pages().size()));
    return found;
  };
  fail_after_each_stage(call, [&] { return open(2); }, state);
}

}  // namespace

void check_every_stage() {
  const auto attend = [](const CacheSource& source, Stage last) {
    const NewTokens tokens(2);
    const Array q = numbers({batch, 2, heads, key_width}, 5);
    attend_over(source, {q.view(), tokens.k.view(), tokens.v.view(), {}, {}}, 3, last);
  };
  const auto apply_layer = [](const CacheSource& source, Stage last) { run_layer(source, 3, last); };
  for (const Call& call : {Call{"attention", attend}, Call{"a layer", apply_layer}}) {
    fail_with_ledger(call, -1);
    fail_with_ledger(call, 3);
    fail_in_pages_of_the_caller(call);
    fail_in_pool(call);
  }
}

}  // namespace selfattn::native
