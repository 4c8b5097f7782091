// Index rules of cross-attention: where things lie, which keys a query sees.
#pragma once

#include <cstdint>

#include "common/hd.h"
#include "common/scalar_types.h"

namespace mmfast {
namespace fusion {

// A tensor of the four dimensions (batch, head, row, column); strides in elements, 0 along what is broadcast.
struct View {
    const void* data = nullptr;
    ScalarType type = ScalarType::float32;
    bool boolean = false;  // bytes, not `type`
    int64_t batch = 0, head = 0, row = 0, column = 0;
    MMFAST_INLINE int64_t at(int64_t b, int64_t h, int64_t i) const { return b * batch + h * head + i * row; }
};

struct Target {
    void* data = nullptr;
    ScalarType type = ScalarType::float32;
    int64_t batch = 0, head = 0, row = 0, column = 0;
    MMFAST_INLINE int64_t at(int64_t b, int64_t h, int64_t i) const { return b * batch + h * head + i * row; }
};

constexpr int kMostSources = 16;

struct Source {
    View key, value;
    View added[2];  // masks: boolean, true where a query may attend, or added to the scores; data null if there is none
    View gate;      // one factor a query, in the computing type, or null
    int64_t keys = 0, heads = 0;
    const int64_t* lengths = nullptr;  // [batch] or null
    MMFAST_INLINE int64_t length(int64_t b) const { return lengths ? lengths[b] : keys; }
};

// Attention of `rows` queries in each of `heads` heads; see mmfast/fusion/attention.py for the formulas.
struct Problem {
    int64_t batch = 0, heads = 0, rows = 0, dim = 0, value_dim = 0;
    bool causal = false, decoupled = false;
    double scale = 1;
    View query;
    int count = 0;  // of sources
    Source sources[kMostSources];
    // Softmaxes: one, or one a source.
    MMFAST_INLINE int softmaxes() const { return decoupled ? count : 1; }
};

MMFAST_INLINE constexpr int64_t up_to_multiple(int64_t n, int64_t of) {
    return (n + of - 1) / of * of;
}
MMFAST_INLINE constexpr int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}
MMFAST_INLINE constexpr int64_t larger(int64_t a, int64_t b) {
    return a < b ? b : a;
}

}  // namespace fusion
}  // namespace mmfast
