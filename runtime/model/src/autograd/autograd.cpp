// What training needs of torch's autograd and tch does not bind: a backward pass from given gradients, RMSNorm and SwiGLU
// whose two ways are one pass each on a CPU, where torch has a dozen, and products of fp32 matrices by oneDNN.

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../guarded.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// One copy for each generation of processors; the loops are written so that the compiler makes vectors of them. Which one
// runs is part of the numerics class (the processor's instruction set).
#ifdef __x86_64__
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif

// Sums are kept in so many parts, in one order on every machine.
constexpr int64_t LANES = 16;
// Rows that one thread takes at least.
constexpr int64_t ROWS = 16;
// Columns of a weight's gradient that one thread takes: its sum runs over the rows in order, whatever the threads.
constexpr int64_t COLUMNS = 64;

// sum of x · x · w, or of x · y · w
VECTORISED float dot(const float* x, const float* y, const float* w, int64_t width) {
    float sums[LANES] = {};
    int64_t at = 0;
    for (; at + LANES <= width; at += LANES)
        for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += x[at + lane] * y[at + lane] * w[at + lane];
    float sum = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) sum += sums[lane];
    for (; at < width; ++at) sum += x[at] * y[at] * w[at];
    return sum;
}

VECTORISED float squares(const float* x, int64_t width) {
    float sums[LANES] = {};
    int64_t at = 0;
    for (; at + LANES <= width; at += LANES)
        for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += x[at + lane] * x[at + lane];
    float sum = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) sum += sums[lane];
    for (; at < width; ++at) sum += x[at] * x[at];
    return sum;
}

VECTORISED void scale(float* y, const float* x, const float* w, float factor, int64_t width) {
    for (int64_t at = 0; at < width; ++at) y[at] = x[at] * factor * w[at];
}

// The gradient of one row: factor · (g · w − x · share).
VECTORISED void row_gradient(float* d, const float* g, const float* x, const float* w, float factor, float share, int64_t width) {
    for (int64_t at = 0; at < width; ++at) d[at] = factor * (g[at] * w[at] - x[at] * share);
}

VECTORISED void add_scaled(float* sum, const float* g, const float* x, float factor, int64_t width) {
    for (int64_t at = 0; at < width; ++at) sum[at] += g[at] * (x[at] * factor);
}

VECTORISED void widen(float* to, const c10::BFloat16* from, int64_t width) {
    const auto* bits = reinterpret_cast<const uint16_t*>(from);
    auto* wide = reinterpret_cast<uint32_t*>(to);
    for (int64_t at = 0; at < width; ++at) wide[at] = static_cast<uint32_t>(bits[at]) << 16;
}

// To the nearest, halves to even; what is not a number stays none.
VECTORISED void narrow(c10::BFloat16* to, const float* from, int64_t width) {
    const auto* wide = reinterpret_cast<const uint32_t*>(from);
    auto* bits = reinterpret_cast<uint16_t*>(to);
    for (int64_t at = 0; at < width; ++at) {
        const uint32_t value = wide[at];
        const uint32_t rounded = (value + 0x7FFF + ((value >> 16) & 1)) >> 16;
        bits[at] = static_cast<uint16_t>((value & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
}

// A piece of a tensor as fp32: itself, or widened into room of its own.
struct Source {
    std::vector<float> room;
    const float* read(const float* from, int64_t) { return from; }
    const float* read(const c10::BFloat16* from, int64_t width) {
        room.resize(width);
        widen(room.data(), from, width);
        return room.data();
    }
};

// Where a piece of a tensor is written as fp32: itself, or room whose values are then rounded.
struct Sink {
    std::vector<float> room;
    float* begin(float* to, int64_t) { return to; }
    float* begin(c10::BFloat16*, int64_t width) {
        room.resize(width);
        return room.data();
    }
    void end(float*, int64_t) {}
    void end(c10::BFloat16* to, int64_t width) { narrow(to, room.data(), width); }
};

// Calls `work` with a value of the tensor's type, fp32 or bf16.
template <typename Work>
void with_type(const at::Tensor& tensor, Work work) {
    if (tensor.scalar_type() == at::kFloat) {
        work(float{});
    } else {
        TORCH_CHECK(tensor.scalar_type() == at::kBFloat16, "fp32 or bf16 is wanted, not ", tensor.scalar_type());
        work(c10::BFloat16{});
    }
}

// RMSNorm (Zhang and Sennrich 2019) of rows on a CPU; all arithmetic is fp32.
struct RmsNorm : torch::autograd::Function<RmsNorm> {
    static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const at::Tensor& weight, double eps) {
        TORCH_CHECK(input.dim() > 0 && input.size(-1) > 0 && weight.numel() == input.size(-1),
                    "a norm's weight is as wide as its rows: ", weight.sizes(), " and ", input.sizes());
        const auto x = input.contiguous(), wide = weight.to(at::kFloat).contiguous();
        auto y = at::empty_like(x), factors = at::empty({x.numel() / x.size(-1)}, wide.options());
        with_type(x, [&](auto value) { normalise<decltype(value)>(x, wide, static_cast<float>(eps), y, factors); });
        context->save_for_backward({x, weight, factors});
        return y;
    }

    template <typename T>
    static void normalise(const at::Tensor& x, const at::Tensor& weight, float eps, at::Tensor& y, at::Tensor& factors) {
        const int64_t width = x.size(-1);
        const auto* all = x.const_data_ptr<T>();
        const auto* w = weight.const_data_ptr<float>();
        auto* out = y.mutable_data_ptr<T>();
        auto* factor = factors.mutable_data_ptr<float>();
        at::parallel_for(0, factors.numel(), ROWS, [&](int64_t begin, int64_t end) {
            Source source;
            Sink sink;
            for (int64_t row = begin; row < end; ++row) {
                const auto* from = source.read(all + row * width, width);
                factor[row] = 1.0F / std::sqrt(squares(from, width) / static_cast<float>(width) + eps);
                scale(sink.begin(out + row * width, width), from, w, factor[row], width);
                sink.end(out + row * width, width);
            }
        });
    }

    static variable_list backward(AutogradContext* context, variable_list upstream) {
        const auto saved = context->get_saved_variables();
        const auto &x = saved[0], &weight = saved[1], &factors = saved[2];
        const auto given = upstream[0].contiguous(), wide = weight.to(at::kFloat).contiguous();
        auto input_gradient = at::empty_like(x);
        at::Tensor weight_gradient;
        if (context->needs_input_grad(1)) weight_gradient = at::zeros_like(wide);
        with_type(x, [&](auto value) {
            using T = decltype(value);
            carry_back<T>(x, wide, factors, given, input_gradient);
            if (weight_gradient.defined()) sum_up<T>(x, factors, given, weight_gradient);
        });
        if (weight_gradient.defined()) weight_gradient = weight_gradient.to(weight.scalar_type());
        return {input_gradient, weight_gradient, at::Tensor()};
    }

    template <typename T>
    static void carry_back(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& factors, const at::Tensor& given,
                           at::Tensor& gradient) {
        const int64_t width = x.size(-1);
        const auto *all = x.const_data_ptr<T>(), *above = given.const_data_ptr<T>();
        const auto *w = weight.const_data_ptr<float>(), *factor = factors.const_data_ptr<float>();
        auto* out = gradient.mutable_data_ptr<T>();
        at::parallel_for(0, factors.numel(), ROWS, [&](int64_t begin, int64_t end) {
            Source x_source, g_source;
            Sink sink;
            for (int64_t row = begin; row < end; ++row) {
                const auto *from = x_source.read(all + row * width, width), *g = g_source.read(above + row * width, width);
                const float share = dot(g, from, w, width) * factor[row] * factor[row] / static_cast<float>(width);
                row_gradient(sink.begin(out + row * width, width), g, from, w, factor[row], share, width);
                sink.end(out + row * width, width);
            }
        });
    }

    template <typename T>
    static void sum_up(const at::Tensor& x, const at::Tensor& factors, const at::Tensor& given, at::Tensor& gradient) {
        const int64_t width = x.size(-1);
        const auto *all = x.const_data_ptr<T>(), *above = given.const_data_ptr<T>();
        const auto* factor = factors.const_data_ptr<float>();
        auto* sums = gradient.mutable_data_ptr<float>();
        at::parallel_for(0, (width + COLUMNS - 1) / COLUMNS, 1, [&](int64_t begin, int64_t end) {
            Source x_source, g_source;
            const int64_t first = begin * COLUMNS, count = std::min(end * COLUMNS, width) - first;
            for (int64_t row = 0; row < factors.numel(); ++row) {
                const auto at = row * width + first;
                add_scaled(sums + first, g_source.read(above + at, count), x_source.read(all + at, count), factor[row], count);
            }
        });
    }
};

// 1 / (1 + e^-x) to about an ulp: 2^n by the exponent's bits, the rest by Taylor's series on [-ln 2 / 2, ln 2 / 2].
inline float sigmoid(float x) {
    const float clamped = std::min(std::max(-x, -87.0F), 87.0F);
    // Beyond 2^23 no float has a fraction: adding so much rounds.
    constexpr float ROUNDS = 12582912.0F;
    const float n = (clamped * 1.44269504F + ROUNDS) - ROUNDS;
    const float r = (clamped - n * 0.693359375F) - n * -2.12194440e-4F;
    float series = 1.0F / 5040.0F;
    series = series * r + 1.0F / 720.0F;
    series = series * r + 1.0F / 120.0F;
    series = series * r + 1.0F / 24.0F;
    series = series * r + 1.0F / 6.0F;
    series = series * r + 0.5F;
    series = series * r * r + r + 1.0F;
    uint32_t bits;
    std::memcpy(&bits, &series, sizeof bits);
    bits += static_cast<uint32_t>(static_cast<int32_t>(n)) << 23;
    std::memcpy(&series, &bits, sizeof bits);
    return 1.0F / (1.0F + series);
}

VECTORISED void gate_piece(float* y, const float* gate, const float* up, int64_t width) {
    for (int64_t at = 0; at < width; ++at) y[at] = gate[at] * sigmoid(gate[at]) * up[at];
}

VECTORISED void gate_gradients(float* gate_gradient, float* up_gradient, const float* g, const float* gate, const float* up,
                               int64_t width) {
    for (int64_t at = 0; at < width; ++at) {
        const float open = sigmoid(gate[at]);
        up_gradient[at] = g[at] * gate[at] * open;
        gate_gradient[at] = g[at] * up[at] * open * (1.0F + gate[at] * (1.0F - open));
    }
}

// silu(gate) · up (Shazeer 2020), element by element on a CPU; all arithmetic is fp32.
struct SwiGlu : torch::autograd::Function<SwiGlu> {
    // Elements that are done at a time.
    static constexpr int64_t PIECE = 4096;

    static at::Tensor forward(AutogradContext* context, const at::Tensor& opened, const at::Tensor& given) {
        TORCH_CHECK(opened.sizes() == given.sizes() && opened.scalar_type() == given.scalar_type(),
                    "a gate is of the shape and type of what it lets through: ", opened.sizes(), " and ", given.sizes());
        const auto gate = opened.contiguous(), up = given.contiguous();
        auto y = at::empty_like(gate);
        with_type(gate, [&](auto value) {
            using T = decltype(value);
            const auto *gates = gate.const_data_ptr<T>(), *ups = up.const_data_ptr<T>();
            auto* out = y.mutable_data_ptr<T>();
            in_pieces(y.numel(), [&](int64_t first, int64_t count) {
                thread_local Source gate_source, up_source;
                thread_local Sink sink;
                gate_piece(sink.begin(out + first, count), gate_source.read(gates + first, count),
                           up_source.read(ups + first, count), count);
                sink.end(out + first, count);
            });
        });
        context->save_for_backward({gate, up});
        return y;
    }

    static variable_list backward(AutogradContext* context, variable_list upstream) {
        const auto saved = context->get_saved_variables();
        const auto &gate = saved[0], &up = saved[1];
        const auto given = upstream[0].contiguous();
        auto gate_gradient = at::empty_like(gate), up_gradient = at::empty_like(up);
        with_type(gate, [&](auto value) {
            using T = decltype(value);
            const auto *gates = gate.const_data_ptr<T>(), *ups = up.const_data_ptr<T>(), *above = given.const_data_ptr<T>();
            auto *of_gate = gate_gradient.mutable_data_ptr<T>(), *of_up = up_gradient.mutable_data_ptr<T>();
            in_pieces(gate.numel(), [&](int64_t first, int64_t count) {
                thread_local Source gate_source, up_source, given_source;
                thread_local Sink gate_sink, up_sink;
                gate_gradients(gate_sink.begin(of_gate + first, count), up_sink.begin(of_up + first, count),
                               given_source.read(above + first, count), gate_source.read(gates + first, count),
                               up_source.read(ups + first, count), count);
                gate_sink.end(of_gate + first, count);
                up_sink.end(of_up + first, count);
            });
        });
        return {gate_gradient, up_gradient};
    }

    template <typename Work>
    static void in_pieces(int64_t count, Work work) {
        at::parallel_for(0, (count + PIECE - 1) / PIECE, 1, [&](int64_t begin, int64_t end) {
            for (int64_t piece = begin; piece < end; ++piece)
                work(piece * PIECE, std::min(PIECE, count - piece * PIECE));
        });
    }
};

// x · wᵀ of fp32 matrices on a CPU. By default torch takes MKL for them, which is slower on processors that are not Intel's,
// and adds in another order with another number of threads; oneDNN does neither, as far as has been seen.
at::Tensor product(const at::Tensor& x, const at::Tensor& weight) {
    using Scalars = c10::List<std::optional<at::Scalar>>;
    using Name = std::optional<std::string_view>;
    using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                                 Scalars, Name);
    static const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!found) return at::linear(x, weight);
    static const auto multiply = found->typed<Signature>();
    return multiply.call(x, weight, std::nullopt, "none", Scalars(), Name(""));
}

// x · wᵀ and its gradients.
struct Linear : torch::autograd::Function<Linear> {
    static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight) {
        context->save_for_backward({x, weight});
        return product(x, weight);
    }

    static variable_list backward(AutogradContext* context, variable_list upstream) {
        const auto saved = context->get_saved_variables();
        const auto &x = saved[0], &weight = saved[1], &given = upstream[0];
        at::Tensor input, weights;
        if (context->needs_input_grad(0)) input = product(given, weight.t());
        if (context->needs_input_grad(1))
            weights = product(given.reshape({-1, given.size(-1)}).t(), x.reshape({-1, x.size(-1)}).t());
        return {input, weights};
    }
};

}  // namespace

extern "C" {

// Carries `gradients` back from `roots`, `count` of each, to the leaves.
const char* vicuna_backward(const at::Tensor* const* roots, const at::Tensor* const* gradients, size_t count) {
    return guarded([&] {
        variable_list from, given;
        for (size_t index = 0; index < count; ++index) {
            from.push_back(*roots[index]);
            given.push_back(*gradients[index]);
        }
        torch::autograd::backward(from, given);
    });
}

// Both of fp32 or bf16 on a CPU; `output` is a new tensor, the caller's to free.

const char* vicuna_rms_norm(const at::Tensor* input, const at::Tensor* weight, double eps, at::Tensor** output) {
    return guarded([&] { *output = new at::Tensor(RmsNorm::apply(*input, *weight, eps)); });
}

const char* vicuna_swiglu(const at::Tensor* gate, const at::Tensor* up, at::Tensor** output) {
    return guarded([&] { *output = new at::Tensor(SwiGlu::apply(*gate, *up)); });
}

// Both of fp32 on a CPU; `output` as above.
const char* vicuna_linear(const at::Tensor* x, const at::Tensor* weight, at::Tensor** output) {
    return guarded([&] { *output = new at::Tensor(Linear::apply(*x, *weight)); });
}
}
