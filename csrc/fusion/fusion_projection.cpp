// Which thread computes what of a linear layer.
#include "fusion/fusion_projection.h"

#include <algorithm>
#include <vector>

#include "common/work.h"
#include "fusion/fusion_tile.h"

namespace mmfast {
namespace fusion {
namespace {

// Of the largest block of weights the sums, and some hundred rows of what they are sums of, stay in the second cache.
constexpr int64_t kLargestBlock = 512, kSmallestBlock = 4 * kProjectionStep;

// Nanoseconds of so many multiply-adds on the matrix unit.
double cost_of(int64_t rows, int64_t in, int64_t out) {
    return double(rows) * double(in) * double(out) / 600;
}

// The size of so many equal pieces, in whole steps.
int64_t piece(int64_t all, int64_t pieces) {
    const int64_t size = (all + pieces - 1) / pieces;
    return (size + kProjectionStep - 1) / kProjectionStep * kProjectionStep;
}

// Packed by the threads that then read it: 2 bytes a weight.
template <class Pack, class Run>
void multiply_rows(const Projection& p, int64_t panels, int64_t depth, const Pack& pack, const Run& run) {
    const ProjectionKernels& kernels = matrix_kernels().projection;
    const Scratch packed(size_t(panels * depth * kProjectionStep) * 2);
    uint32_t* const to = reinterpret_cast<uint32_t*>(packed.data());
    const int64_t panel = depth / 2 * kProjectionStep;
    deal_out(panels, double(panel) / 4, 64, [&](int64_t i, char*) { pack(p, i, to + i * panel); });
    const int64_t items = (p.rows + kProjectionRows - 1) / kProjectionRows;
    deal_out(items, cost_of(kProjectionRows, p.in, p.all_out()), size_t(kernels.rows_scratch(p)) * 4,
             [&](int64_t i, char* scratch) {
                 run(p, i * kProjectionRows, std::min(p.rows, (i + 1) * kProjectionRows), to,
                     reinterpret_cast<float*>(scratch));
             });
}

void weight_gradients(const Projection& p) {
    const ProjectionKernels& kernels = matrix_kernels().projection;
    // Rows of gradients are arranged for each item anew, and so are those of x: rather few large blocks.
    int64_t outs = kLargestBlock, ins = std::min(p.in, kLargestBlock);
    const auto count = [&] {
        int64_t blocks = 0;
        for (int j = 0; j < p.parts; ++j) blocks += (p.out[j] + outs - 1) / outs;
        return blocks * ((p.in + ins - 1) / ins);
    };
    while (count() < max_threads() && outs > kSmallestBlock) outs /= 2;
    while (count() < max_threads() && ins > kSmallestBlock) ins = piece(ins, 2);
    std::vector<WeightBlock> blocks;
    WeightBlock largest{};
    for (int j = 0; j < p.parts; ++j) {
        const int64_t height = piece(p.out[j], (p.out[j] + outs - 1) / outs);
        const int64_t width = piece(p.in, (p.in + ins - 1) / ins);
        for (int64_t o = 0; o < p.out[j]; o += height)
            for (int64_t i = 0; i < p.in; i += width)
                blocks.push_back({j, o, std::min(height, p.out[j] - o), i, std::min(width, p.in - i)});
        largest.outs = std::max(largest.outs, height);
        largest.ins = std::max(largest.ins, width);
    }
    deal_out(int64_t(blocks.size()), cost_of(p.rows, largest.ins, largest.outs),
             size_t(kernels.weights_scratch(largest)) * 4, [&](int64_t i, char* scratch) {
                 kernels.weights(p, blocks[size_t(i)], reinterpret_cast<float*>(scratch));
             });
}

}  // namespace

bool projects() {
    return matrix_kernels().panel > 0;
}

void project_cpu(const Projection& p) {
    const ProjectionKernels& kernels = matrix_kernels().projection;
    multiply_rows(p, p.all_out() / kProjectionStep, p.in, kernels.pack_outputs, kernels.forward);
}

void project_backward_cpu(const Projection& p) {
    const ProjectionKernels& kernels = matrix_kernels().projection;
    if (p.grad_x.data) multiply_rows(p, p.in / kProjectionStep, p.all_out(), kernels.pack_inputs, kernels.backward);
    if (p.grad_weight || p.grad_bias) weight_gradients(p);
}

}  // namespace fusion
}  // namespace mmfast
