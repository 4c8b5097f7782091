// Sample types: what a waveform or a feature is stored in, and the way to and from the type it is computed in.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/hd.h"

namespace mmfast {

enum class ScalarType : int { float32, float64, float16, bfloat16, int16 };

struct BFloat16 {
    uint16_t bits;
    operator float() const {
        const uint32_t u = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &u, sizeof x);
        return x;
    }
    BFloat16() = default;
    explicit BFloat16(float x) {  // to nearest, ties to even; NaN stays NaN
        uint32_t u;
        std::memcpy(&u, &x, sizeof u);
        bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    }
};

using Float16 = _Float16;

// Calls f with a null pointer of the C++ type that stands for `type`.
template <class F>
MMFAST_INLINE void dispatch(ScalarType type, const F& f) {
    switch (type) {
        case ScalarType::float32: f(static_cast<float*>(nullptr)); break;
        case ScalarType::float64: f(static_cast<double*>(nullptr)); break;
        case ScalarType::float16: f(static_cast<Float16*>(nullptr)); break;
        case ScalarType::bfloat16: f(static_cast<BFloat16*>(nullptr)); break;
        case ScalarType::int16: f(static_cast<int16_t*>(nullptr)); break;
    }
}

template <class T>
constexpr ScalarType scalar_type_of() {
    return sizeof(T) == 8 ? ScalarType::float64 : ScalarType::float32;
}

}  // namespace mmfast
