// Cross-attention to one or several sources; see mmfast/fusion/op.py for the operators it serves.
#pragma once

#include "fusion/fusion_core.h"

namespace mmfast {
namespace fusion {

// Decoupled sources together have at most so many keys: their probabilities stay in the second cache.
constexpr int64_t kResidentKeys = 512;

// A log-sum-exp beyond it has lost what probabilities of less than a part in 10 000 off need.
constexpr double kFar = 1024;

// out: (batch, heads, rows, value_dim); lse[softmaxes][batch][heads][rows], natural, -inf for a query without keys.
template <class T>
void forward_cpu(const Problem& problem, const Target& out, T* lse);

// weights[source]: (batch, heads, rows, keys), or with `mean` (batch, 1, rows, keys), zero before; those that no query may see
// stay so. lse[batch][heads][rows], of one softmax over all sources.
template <class T>
void weights_cpu(const Problem& problem, const T* lse, bool mean, const Target* weights);

// Whether forward_weighing_cpu, which is both at once, takes less time than the two.
template <class T>
bool weighs_at_once(const Problem& problem, bool mean);
template <class T>
void forward_weighing_cpu(const Problem& problem, const Target& out, T* lse, bool mean, const Target* weights);

// Gradients, null where none is wanted; each has the sizes of what it belongs to (batch 1 where that is shared).
template <class T>
struct Gradients {
    Target query;
    Target key[kMostSources], value[kMostSources];
    T* gates = nullptr;  // [sources][batch][heads][rows]: sum over the columns of the gradient times attention j
    // Of which sizes the batch of each is: 1 or the batch.
    int64_t query_batch = 1, key_batch[kMostSources] = {}, value_batch[kMostSources] = {};
};

// out and grad_out: (batch, heads, rows, value_dim); out may be null if there are at most kResidentKeys keys.
// lse and grad_lse (or null): as lse of forward_cpu.
template <class T>
void backward_cpu(const Problem& problem, const View& grad_out, const T* grad_lse, const View& out, const T* lse,
                  const Gradients<T>& gradients);

}  // namespace fusion
}  // namespace mmfast
