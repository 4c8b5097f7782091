// Linear layers of bfloat16 on the matrix unit, or in vectors: y = x wᵀ + bias, and its gradients. Their results may be
// several, each of some of the rows of w: keys and values of one sequence.
#pragma once

#include <cstdint>

namespace mmfast {
namespace fusion {

constexpr int kMostParts = 4;

// Sizes are multiples of it, but the number of rows.
constexpr int64_t kProjectionStep = 32;

// Of so many rows results, and gradients of x, are computed at a time, at most.
constexpr int64_t kProjectionRows = 4 * kProjectionStep;

// Rows of bfloat16, `stride` elements apart.
struct HalfRows {
    uint16_t* data;
    int64_t stride;
};

struct Projection {
    int64_t rows, in;
    int parts;
    int64_t out[kMostParts];
    HalfRows x;                         // rows of `in` elements
    HalfRows weight;                    // of each part `out` rows of `in` elements, one part after the other
    const uint16_t* bias;               // of each part `out` elements; or null
    HalfRows y[kMostParts];             // results or their gradients
    uint16_t *grad_bias, *grad_weight;  // or null: as `bias`; as `weight`, without gaps
    HalfRows grad_x;                    // or null

    int64_t all_out() const {
        int64_t total = 0;
        for (int j = 0; j < parts; ++j) total += out[j];
        return total;
    }
};

// Whether this machine has what the following two need.
bool projects();

void project_cpu(const Projection& problem);
void project_backward_cpu(const Projection& problem);

// Rows of one part's weights, and of them some columns, whose gradients are one item of work.
struct WeightBlock {
    int part;
    int64_t first_out, outs, first_in, ins;
};

// What the matrix unit does: see fusion_matrix_projection.h. Scratch is counted in elements.
struct ProjectionKernels {
    // Right factors, a panel of 32 columns: of all features, for results; of all results, for gradients of x.
    void (*pack_outputs)(const Projection&, int64_t panel, uint32_t* packed);
    void (*pack_inputs)(const Projection&, int64_t panel, uint32_t* packed);
    int64_t (*rows_scratch)(const Projection&);
    void (*forward)(const Projection&, int64_t first, int64_t last, const uint32_t* packed, float* scratch);
    void (*backward)(const Projection&, int64_t first, int64_t last, const uint32_t* packed, float* scratch);
    int64_t (*weights_scratch)(const WeightBlock& largest);
    void (*weights)(const Projection&, const WeightBlock&, float* scratch);
};

}  // namespace fusion
}  // namespace mmfast
