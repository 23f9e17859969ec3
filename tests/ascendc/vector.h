// Instructions of the vector pipe, element by element.
#pragma once

#include <algorithm>
#include <limits>

#include "copy.h"

namespace AscendC {

enum class ReduceType { SUM, MAX, MIN };
enum class ReduceOrder { ORDER_VALUE_INDEX, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };

struct BrcbRepeatParams {
    uint16_t dstBlkStride, dstRepStride;
};

enum class DivAlgo { INTRINSIC, DIFF_COMPENSATION, PRECISION_1ULP_FTZ_TRUE, PRECISION_0ULP_FTZ_TRUE, PRECISION_0ULP_FTZ_FALSE };
struct DivConfig {
    DivAlgo algo = DivAlgo::INTRINSIC;
};
inline constexpr DivConfig DEFAULT_DIV_CONFIG{};

namespace detail {

template <typename T, typename... Types>
void Takes(const shim::Op& op)
{
    if (!shim::Among<T, Types...>) {
        shim::Fail("%s does not take this type of %zu bytes on dav-%d", op.name, sizeof(T), __NPU_ARCH__);
    }
}

// The result of arithmetic in T: rounded for floats, refused where an integer overflows.
template <typename T>
T Result(const shim::Op& op, double exact)
{
    if constexpr (shim::IsInteger<T>) {
        if (exact < double(std::numeric_limits<T>::min()) || exact > double(std::numeric_limits<T>::max())) {
            shim::Fail("%s overflows an integer of %zu bytes", op.name, sizeof(T));
        }
        return static_cast<T>(exact);
    } else {
        return static_cast<T>(static_cast<float>(exact));
    }
}

template <typename T, typename F>
void Unary(const char* name, const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t count, F f)
{
    shim::Op op(shim::V, name);
    dst.Align(op);
    src.Align(op);
    for (int32_t i = 0; i < count; ++i) {
        dst.Set(op, i, f(op, src.Get(op, i)));
    }
}

template <typename T, typename F>
void Binary(const char* name, const LocalTensor<T>& dst, const LocalTensor<T>& a, const LocalTensor<T>& b, int32_t count, F f)
{
    shim::Op op(shim::V, name);
    dst.Align(op);
    a.Align(op);
    b.Align(op);
    for (int32_t i = 0; i < count; ++i) {
        T x = a.Get(op, i), y = b.Get(op, i);
        dst.Set(op, i, f(op, x, y));
    }
}

}  // namespace detail

// f32 results are those of IEEE: a double holds sums and products of two f32 exactly, or rounds
// them so that the second rounding does not show (53 >= 2 * 24 + 2); a quotient likewise.
#define SHIM_BINARY(NAME, EXPRESSION, ...)                                                              \
    template <typename T>                                                                               \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& a, const LocalTensor<T>& b, int32_t count) \
    {                                                                                                   \
        detail::Binary(#NAME, dst, a, b, count, [](shim::Op& op, T p, T q) {                            \
            detail::Takes<T, __VA_ARGS__>(op);                                                          \
            double x = shim::Value(p), y = shim::Value(q);                                              \
            return detail::Result<T>(op, EXPRESSION);                                                   \
        });                                                                                             \
    }
SHIM_BINARY(Add, x + y, int16_t, half, int32_t, float)
SHIM_BINARY(Sub, x - y, int16_t, half, int32_t, float)
SHIM_BINARY(Mul, x* y, int16_t, half, int32_t, float)
SHIM_BINARY(Max, std::max(x, y), int16_t, half, int32_t, float)
#undef SHIM_BINARY

#define SHIM_SCALAR(NAME, EXPRESSION)                                                               \
    template <typename T>                                                                           \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, int32_t count) \
    {                                                                                               \
        detail::Unary(#NAME, dst, src, count, [&](shim::Op& op, T p) {                              \
            detail::Takes<T, int16_t, half, int32_t, float>(op);                                    \
            double x = shim::Value(p), y = shim::Value(scalar);                                     \
            return detail::Result<T>(op, EXPRESSION);                                               \
        });                                                                                         \
    }
SHIM_SCALAR(Adds, x + y)
SHIM_SCALAR(Muls, x* y)
SHIM_SCALAR(Maxs, std::max(x, y))
SHIM_SCALAR(Mins, std::min(x, y))
#undef SHIM_SCALAR

template <typename T, const DivConfig& config = DEFAULT_DIV_CONFIG>
void Div(const LocalTensor<T>& dst, const LocalTensor<T>& a, const LocalTensor<T>& b, int32_t count)
{
    detail::Binary("Div", dst, a, b, count, [](shim::Op& op, T p, T q) {
        detail::Takes<T, float>(op);
        if (__NPU_ARCH__ == 3510 && config.algo != DivAlgo::PRECISION_0ULP_FTZ_FALSE) {
            shim::Fail("Div: only the exact division of dav-3510 is modelled");
        }
        double x = shim::Value(p), y = shim::Value(q);
        if (!(std::fabs(x / y) <= std::numeric_limits<float>::max())) {
            shim::Fail("Div: %g / %g", x, y);
        }
        return T(p / q);
    });
}

template <typename T>
void Abs(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t count)
{
    detail::Unary("Abs", dst, src, count, [](shim::Op& op, T p) {
        detail::Takes<T, half, float>(op);
        return detail::Result<T>(op, std::fabs(shim::Value(p)));
    });
}

template <typename T>
void And(const LocalTensor<T>& dst, const LocalTensor<T>& a, const LocalTensor<T>& b, int32_t count)
{
    detail::Binary("And", dst, a, b, count, [](shim::Op& op, T p, T q) {
        detail::Takes<T, int16_t, uint16_t>(op);
        return T(p & q);
    });
}

template <typename T>
void ShiftLeft(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& by, int32_t count)
{
    detail::Unary("ShiftLeft", dst, src, count, [&](shim::Op& op, T p) {
        detail::Takes<T, int16_t, uint16_t, int32_t, uint32_t>(op);
        return T(std::make_unsigned_t<T>(p) << by);
    });
}

template <typename T>
void ShiftRight(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& by, int32_t count)
{
    detail::Unary("ShiftRight", dst, src, count, [&](shim::Op& op, T p) {
        detail::Takes<T, int16_t, uint16_t, int32_t, uint32_t>(op);
        return T(p >> by);
    });
}

template <typename T>
void Duplicate(const LocalTensor<T>& dst, const T& value, int32_t count)
{
    shim::Op op(shim::V, "Duplicate");
    detail::Takes<T, int16_t, uint16_t, half, bfloat16_t, int32_t, uint32_t, float>(op);
    dst.Align(op);
    for (int32_t i = 0; i < count; ++i) {
        dst.Set(op, i, value);
    }
}

template <typename T>
void CreateVecIndex(LocalTensor<T> dst, const T& first, uint32_t count)
{
    shim::Op op(shim::V, "CreateVecIndex");
    if (__NPU_ARCH__ == 2002) {
        shim::Fail("CreateVecIndex is not on dav-2002");
    }
    detail::Takes<T, int16_t, int32_t>(op);
    dst.Align(op);
    for (uint32_t i = 0; i < count; ++i) {
        dst.Set(op, i, detail::Result<T>(op, double(first) + i));
    }
}

template <typename To, typename From>
void Cast(const LocalTensor<To>& dst, const LocalTensor<From>& src, const RoundMode& mode, uint32_t count)
{
    shim::Op op(shim::V, "Cast");
    if (!shim::Castable<To, From>(mode)) {
        shim::Fail("Cast from this type of %zu bytes to that of %zu, rounding mode %d, is not on dav-%d",
                   sizeof(From), sizeof(To), int(mode), __NPU_ARCH__);
    }
    dst.Align(op);
    src.Align(op);
    for (uint32_t i = 0; i < count; ++i) {
        double v = shim::Value(src.Get(op, i));
        if constexpr (std::is_same<To, From>::value) {
            v = mode == RoundMode::CAST_TRUNC ? std::trunc(v) : std::nearbyint(v);  // to an integer
        }
        dst.Set(op, i, shim::Converted<To>(v, mode));
    }
}

// Each 32 bytes of `dst` from one element of `src`, eight in a repeat.
template <typename T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint8_t repeat, const BrcbRepeatParams& p)
{
    shim::Op op(shim::V, "Brcb");
    detail::Takes<T, int16_t, uint16_t, half, bfloat16_t, int32_t, uint32_t, float>(op);
    dst.Align(op);
    src.Align(op);
    if (p.dstBlkStride == 0) {
        shim::Fail("Brcb: dstBlkStride is 0");
    }
    constexpr uint64_t lanes = 32 / sizeof(T);
    for (uint64_t i = 0; i < uint64_t(repeat) * 8; ++i) {
        T value = src.Get(op, i);
        uint64_t block = i / 8 * p.dstRepStride + i % 8 * p.dstBlkStride;
        for (uint64_t lane = 0; lane < lanes; ++lane) {
            dst.Set(op, block * lanes + lane, value);
        }
    }
}

// `mask` elements from each of `repeat` places to one each.
template <ReduceType type, typename T, typename U>
void ReduceRepeat(
    const LocalTensor<T>& dst, const LocalTensor<U>& src, int32_t mask, int32_t repeat, int32_t dstRepStride,
    int32_t srcBlkStride, int32_t srcRepStride, ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX)
{
    shim::Op op(shim::V, "ReduceRepeat");
    detail::Takes<T, half, float>(op);
    constexpr int32_t lanes = 256 / sizeof(U), block = 32 / sizeof(U);
    static_assert(std::is_same<T, U>::value && type != ReduceType::MIN, "not modelled");
    if (mask < 1 || mask > lanes || repeat < 1 || repeat > 255) {
        shim::Fail("ReduceRepeat: mask %d of %d, repeat %d of 255", mask, lanes, repeat);
    }
    if (type == ReduceType::MAX && (order != ReduceOrder::ORDER_ONLY_VALUE || __NPU_ARCH__ == 2002)) {
        shim::Fail("ReduceRepeat: this order is not modelled");
    }
    dst.Align(op, sizeof(T));
    src.Align(op);
    for (int32_t r = 0; r < repeat; ++r) {
        double result = type == ReduceType::SUM ? 0 : -std::numeric_limits<double>::infinity(), size = 0;
        bool whole = true;
        for (int32_t i = 0; i < mask; ++i) {
            double x = shim::Value(src.Get(op, (r * srcRepStride + i / block * srcBlkStride) * block + i % block));
            result = type == ReduceType::SUM ? result + x : std::max(result, x);
            size += std::fabs(x);
            whole = whole && x == std::nearbyint(x);
        }
        if (type == ReduceType::SUM && (!whole || size > (sizeof(T) == 2 ? 2048 : 1 << 24))) {
            shim::Fail("ReduceRepeat: a sum that depends on its order");
        }
        dst.Set(op, uint64_t(r) * dstRepStride, detail::Result<T>(op, result));
    }
}

}  // namespace AscendC
