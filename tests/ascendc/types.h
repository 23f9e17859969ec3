// Numbers of the device that a host compiler does not have, and what it may be cast to.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "core.h"

namespace shim {

// A float as sign, exponent and `mantissa` bits, rounded half to even. What does not fit is an
// error: whether the core saturates is a setting.
template <int mantissa, int bias, int width>
uint32_t Encode(double v, double most)
{
    double a = std::fabs(v);
    uint32_t sign = std::signbit(v) ? 1u << (width - 1) : 0;
    if (a == 0) {
        return sign;
    }
    if (!(a < 1e300)) {
        Fail("a number that is not finite is cast");
    }
    int e = std::max(std::ilogb(a), 1 - bias);
    double m = std::nearbyint(std::ldexp(a, mantissa - e));
    if (std::ldexp(m, e - mantissa) > most) {
        Fail("%g overflows in a cast to %d bits", v, width);
    }
    return sign + (static_cast<uint32_t>(e + bias - 1) << mantissa) + static_cast<uint32_t>(m);
}

template <int mantissa, int bias, int width>
float Decode(uint32_t bits)
{
    uint32_t field = (bits >> mantissa) & ((1u << (width - 1 - mantissa)) - 1);
    double m = bits & ((1u << mantissa) - 1);
    double a = field == 0 ? std::ldexp(m, 1 - bias - mantissa)
                          : std::ldexp(m + (1u << mantissa), static_cast<int>(field) - bias - mantissa);
    return static_cast<float>(bits >> (width - 1) ? -a : a);
}

template <typename Bits, int mantissa, int bias, int most_bits>
struct Small {
    Bits bits;
    Small() = default;
    explicit Small(float v) : bits(static_cast<Bits>(Encode<mantissa, bias, sizeof(Bits) * 8>(v, Most()))) {}
    explicit operator float() const { return Decode<mantissa, bias, sizeof(Bits) * 8>(bits); }
    static double Most() { return Decode<mantissa, bias, sizeof(Bits) * 8>(most_bits); }
};

}  // namespace shim

using half = shim::Small<uint16_t, 10, 15, 0x7BFF>;
using bfloat16_t = shim::Small<uint16_t, 7, 127, 0x7F7F>;
using fp8_e4m3fn_t = shim::Small<uint8_t, 3, 7, 0x7E>;

namespace AscendC {

enum class RoundMode { CAST_NONE, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC, CAST_ODD };

}  // namespace AscendC

namespace shim {

using AscendC::RoundMode;

template <typename T, typename... Ts>
constexpr bool Among = (std::is_same<T, Ts>::value || ...);

template <typename T>
constexpr bool IsInteger = std::is_integral<T>::value;

// The table of Cast for each architecture, as far as kernels here have use for it.
template <typename To, typename From>
bool Castable(RoundMode mode)
{
    bool none = mode == RoundMode::CAST_NONE, even = mode == RoundMode::CAST_RINT;
    bool any = even || mode == RoundMode::CAST_TRUNC || mode == RoundMode::CAST_FLOOR ||
               mode == RoundMode::CAST_CEIL || mode == RoundMode::CAST_ROUND;
#if __NPU_ARCH__ == 2002
    if (Among<From, uint8_t, int8_t> && Among<To, half>) return none;
    if (Among<From, half> && Among<To, float>) return none;
    if (Among<From, half> && Among<To, int8_t, uint8_t>) return none || (any && !even);
    if (Among<From, float> && Among<To, half>) return none;
    return false;
#else
    if (Among<From, uint8_t, int8_t> && Among<To, half>) return none;
    if (Among<From, half, bfloat16_t, int16_t> && Among<To, float>) return none;
    if (Among<From, half> && Among<To, int8_t, uint8_t>) return any || (none && __NPU_ARCH__ == 2201);
    if (Among<From, float> && Among<To, half>) return any || none;
    if (Among<From, float> && Among<To, bfloat16_t, float, int32_t>) return any;
    if (Among<From, int32_t> && Among<To, float>) return any || (none && __NPU_ARCH__ == 2201);
    if (__NPU_ARCH__ == 3510 && Among<From, float> && Among<To, fp8_e4m3fn_t>) return even;
    if (__NPU_ARCH__ == 3510 && Among<From, int32_t> && Among<To, uint8_t>) return none;
    return false;
#endif
}

template <typename To>
To Converted(double v, RoundMode mode)
{
    bool whole = IsInteger<To>;
    if (mode == RoundMode::CAST_TRUNC && !whole && !std::is_same<To, float>::value) {
        Fail("truncation to a narrower float is not modelled");
    }
    if (mode != RoundMode::CAST_NONE && mode != RoundMode::CAST_RINT && mode != RoundMode::CAST_TRUNC) {
        Fail("a rounding mode that is not modelled");
    }
    auto to_integer = [&] { return mode == RoundMode::CAST_TRUNC ? std::trunc(v) : std::nearbyint(v); };
    if constexpr (IsInteger<To>) {
        double i = to_integer();
        if (!(i >= double(std::numeric_limits<To>::min()) && i <= double(std::numeric_limits<To>::max()))) {
            Fail("%g overflows in a cast to an integer of %zu bytes", v, sizeof(To));
        }
        return static_cast<To>(i);
    } else if constexpr (std::is_same<To, float>::value) {
        return static_cast<float>(v);
    } else {
        return To(static_cast<float>(v));
    }
}

template <typename T>
double Value(T x)
{
    return static_cast<double>(static_cast<float>(x));
}
inline double Value(int32_t x) { return x; }

}  // namespace shim
