// What fusion_cpu.cpp deals out; fusion_forward.cpp, fusion_backward.cpp and fusion_weights.cpp implement it once per
// instruction set.
#pragma once

#include "common/isa.h"
#include "fusion/fusion.h"
#include "fusion/fusion_projection.h"

namespace mmfast {
namespace fusion {

// Queries of `fold` neighbouring heads, which share their keys in every source, are rows of one matrix: row r is query
// r % rows of head (first head + r / rows). A panel is as many rows as the kernels keep in registers, in lanes.
template <class T>
struct ForwardJob {
    const Problem* problem;
    int64_t fold;
    int64_t panels;  // of a fold
    Target out;
    T* lse;
    // Several items share the keys of the same rows: each writes output [value_dim][panel], maximum [panel] and sum [panel]
    // of its own, or null.
    T* partial;
};

// Panel by panel; or several heads and panels block by block of the keys, with queries in the lanes, or with features where so
// few queries read the keys that copies do not pay.
enum class Order { panels, wide, few };
constexpr int64_t kFewRows = 8;      // at most, for Order::few
constexpr int64_t kSingleRows = 64;  // at most, for keys read once and where they lie
constexpr int64_t kWideKeys = 64;    // of a block, for Order::wide
constexpr int64_t kPieceKeys = 512;  // of a piece at most, on the matrix unit
constexpr int64_t kTileKeys = 16;    // of a tile there
constexpr int64_t kWideRows = 512;   // of an item at most, for Order::wide

struct Item {
    int64_t batch, head;    // the first head of the first fold
    int64_t heads;          // number of folds
    int64_t panel, panels;  // first and number
    Order order;
    int64_t split, splits;  // share of the keys
    int64_t slot;  // among the partial results; that of the next panel is `splits` on, and the next fold's behind
};

// Sums of the gradients that several items contribute to: each run has its own copy, added up afterwards.
struct Accumulator {
    Target target;       // the result itself, or the runs' copies in the computing type
    int64_t run = 0;     // stride from one to the next, in elements
    bool add = false;    // to what is there: else every element is written exactly once, and in the target's type
    bool large = false;  // beyond the caches
};

template <class T>
struct BackwardJob {
    const Problem* problem;
    int64_t fold;
    View grad_out, out;
    const T *lse, *grad_lse;
    T* grad_gates;
    Accumulator query, key[kMostSources], value[kMostSources];
};

struct BackwardItem {
    int64_t batch, head;  // the first head of the first fold
    int64_t heads;  // number of folds; more than one only if no source has its keys in common with another of them
    int64_t panel, panels;  // first and number
    bool few;               // features in the lanes; then of one softmax, with one panel
    int64_t first,
        last;    // keys, counted through all sources; on the matrix unit each source's filled up to whole tiles
    bool whole;  // all of them
    int64_t query_run, key_run[kMostSources], value_run[kMostSources];
};

template <class T>
struct WeightsJob {
    const Problem* problem;
    const T* lse;                  // [batch][heads][rows]
    Target weights[kMostSources];  // (batch, heads or 1, rows, keys)
};

struct WeightsItem {
    int64_t batch, head, heads;  // of several heads, from the first on, the mean
    int64_t panel, panels;       // first and number; more than one on the matrix unit only
};

template <class T>
struct TileKernels {
    int64_t panel;
    int64_t (*forward_scratch)(const Problem&, int64_t heads, int64_t panels,
                               Order order);  // elements, for items of so many
    void (*forward)(const ForwardJob<T>&, const Item&, T* scratch);
    void (*merge)(const ForwardJob<T>&, const Item&, T* scratch);  // of `splits` partial results from `slot` on
    int64_t (*backward_scratch)(const Problem&, int64_t heads, bool few);
    void (*backward)(const BackwardJob<T>&, const BackwardItem&, T* scratch);
    int64_t (*weights_scratch)(const Problem&);
    void (*weights)(const WeightsJob<T>&, const WeightsItem&, T* scratch);
    // Output and weights of one panel of one head, or of all heads and their mean: see fusion_weighing.h.
    int64_t (*weighing_scratch)(const Problem&);
    void (*forward_weighing)(const ForwardJob<T>&, const WeightsJob<T>&, const Item&, T* scratch);
};

// Of bfloat16, on the matrix unit or in vectors; `forward` of keys that all stay in the second cache: see fusion_matrix.cpp. `panel`
// is 0 where there are none.
struct MatrixKernels {
    int64_t panel;
    bool rounds_sums;  // P and dS are rounded where they are multiplied for gradients of values and keys (for tests)
    int64_t (*forward_scratch)(const Problem&, int64_t heads);
    void (*forward)(const ForwardJob<float>&, const Item&, float* scratch);
    int64_t (*forward_long_scratch)(const Problem&, int64_t panels);
    void (*forward_long)(const ForwardJob<float>&, const Item&, float* scratch);  // of one softmax, any number of keys
    int64_t (*backward_scratch)(const Problem&, int64_t heads,
                                int64_t keys);  // of a piece, as BackwardItem counts them
    void (*backward)(const BackwardJob<float>&, const BackwardItem&, float* scratch);
    int64_t (*weights_scratch)(const Problem&, int64_t heads);
    void (*weights)(const WeightsJob<float>&, const WeightsItem&, float* scratch);
    ProjectionKernels projection;
};

// Those of this machine: fusion_isa.cpp.
const MatrixKernels& matrix_kernels();

namespace avx512_bf16 {
void matrix_kernels_float(MatrixKernels& kernels);
}  // namespace avx512_bf16
namespace amx {
void matrix_kernels_float(MatrixKernels& kernels);
}  // namespace amx

#define MMFAST_DECLARE_TILES(isa)                               \
    namespace isa {                                             \
    void forward_kernels_float(TileKernels<float>& kernels);    \
    void forward_kernels_double(TileKernels<double>& kernels);  \
    void backward_kernels_float(TileKernels<float>& kernels);   \
    void backward_kernels_double(TileKernels<double>& kernels); \
    void weights_kernels_float(TileKernels<float>& kernels);    \
    void weights_kernels_double(TileKernels<double>& kernels);  \
    }
MMFAST_DECLARE_TILES(baseline)
#if defined(MMFAST_X86)
MMFAST_DECLARE_TILES(avx2)
MMFAST_DECLARE_TILES(avx512)
#endif
#undef MMFAST_DECLARE_TILES

}  // namespace fusion
}  // namespace mmfast
