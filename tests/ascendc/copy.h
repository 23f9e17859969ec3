// Copies between global memory and the Unified Buffer.
#pragma once

#include "pipe.h"

namespace AscendC {

struct DataCopyParams {
    uint16_t blockCount, blockLen, srcStride, dstStride;  // lengths and gaps in 32 bytes
};
struct DataCopyExtParams {
    uint16_t blockCount;
    uint32_t blockLen, srcStride, dstStride, rsv;  // bytes, but gaps in the Unified Buffer in 32
};
template <typename T>
struct DataCopyPadExtParams {
    bool isPad;
    uint8_t leftPadding, rightPadding;
    T paddingValue;
};

namespace detail {

inline void Count(const shim::Op& op, uint32_t count)
{
    if (count > 4095) {
        shim::Fail("%s: blockCount is %u, and at most 4095", op.name, count);
    }
}

template <typename T>
void Whole(const shim::Op& op, const LocalTensor<T>& local, const GlobalTensor<T>& global)
{
    local.Align(op);
    if (global.at % sizeof(T) != 0) {
        shim::Fail("%s: the global address is no multiple of %zu", op.name, sizeof(T));
    }
}

template <typename T>
void Blocks(const shim::Op& op, uint32_t count)
{
    if (count * sizeof(T) % 32 != 0) {
        shim::Fail("%s: %zu bytes are not whole blocks of 32", op.name, count * sizeof(T));
    }
}

template <typename T>
LocalTensor<uint8_t> Raw(const LocalTensor<T>& t)
{
    return t.template ReinterpretCast<uint8_t>();
}

}  // namespace detail

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& p)
{
    shim::Op op(shim::MTE2, "DataCopy");
    detail::Whole(op, dst, src);
    detail::Count(op, p.blockCount);
    for (uint64_t i = 0, n = p.blockLen * 32; i < p.blockCount; ++i) {
        const uint8_t* from = src.Bytes(op, i * (n + p.srcStride * 32), n, false);
        std::memcpy(detail::Raw(dst).Bytes(op, i * (n + p.dstStride * 32), n, true), from, n);
    }
}

template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& p)
{
    shim::Op op(shim::MTE3, "DataCopy");
    detail::Whole(op, src, dst);
    detail::Count(op, p.blockCount);
    for (uint64_t i = 0, n = p.blockLen * 32; i < p.blockCount; ++i) {
        const uint8_t* from = detail::Raw(src).Bytes(op, i * (n + p.srcStride * 32), n, false);
        std::memcpy(dst.Bytes(op, i * (n + p.dstStride * 32), n, true), from, n);
    }
}

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count)
{
    shim::Op op(shim::MTE2, "DataCopy");
    detail::Whole(op, dst, src);
    detail::Blocks<T>(op, count);
    const uint8_t* from = src.Bytes(op, 0, count * sizeof(T), false);
    std::memcpy(dst.Bytes(op, 0, count, true), from, count * sizeof(T));
}

template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count)
{
    shim::Op op(shim::MTE3, "DataCopy");
    detail::Whole(op, src, dst);
    detail::Blocks<T>(op, count);
    const uint8_t* from = src.Bytes(op, 0, count, false);
    std::memcpy(dst.Bytes(op, 0, count * sizeof(T), true), from, count * sizeof(T));
}

// Inside of the Unified Buffer, which the vector pipe does.
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count)
{
    shim::Op op(shim::V, "DataCopy");
    dst.Align(op);
    src.Align(op);
    detail::Blocks<T>(op, count);
    const uint8_t* from = src.Bytes(op, 0, count, false);
    std::memcpy(dst.Bytes(op, 0, count, true), from, count * sizeof(T));
}

namespace detail {

template <typename T>
void Extent(const shim::Op& op, const LocalTensor<T>& local, const DataCopyExtParams& p)
{
#if __NPU_ARCH__ == 2002
    shim::Fail("DataCopyPad is not on dav-2002");
#endif
    local.Align(op);
    Count(op, p.blockCount);
    if (p.blockLen > 2097151 || p.blockLen % sizeof(T) != 0) {
        shim::Fail("%s: blockLen is %u, and a multiple of %zu up to 2097151", op.name, p.blockLen, sizeof(T));
    }
}

}  // namespace detail

template <typename T>
void DataCopyPad(
    const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& p, const DataCopyPadExtParams<T>& pad)
{
    shim::Op op(shim::MTE2, "DataCopyPad");
    detail::Extent(op, dst, p);
    uint64_t left = pad.leftPadding * sizeof(T), right = pad.rightPadding * sizeof(T), n = p.blockLen;
    if (left > 32 || right > 32) {
        shim::Fail("DataCopyPad: more than 32 bytes of padding on a side");
    }
    uint64_t filled = (left + n + right + 31) / 32 * 32;
    for (uint64_t i = 0; i < p.blockCount; ++i) {
        const uint8_t* from = src.Bytes(op, i * (n + p.srcStride), n, false);
        LocalTensor<uint8_t> raw = detail::Raw(dst);
        uint64_t at = i * (filled + p.dstStride * 32);
        uint8_t* to = raw.Bytes(op, at, filled, true);
        std::memset(to, 0xA5, filled);
        std::memcpy(to + left, from, n);
        for (uint64_t b = 0; b < filled; ++b) {
            bool padding = b < left || b >= left + n;
            bool valued = pad.isPad && left + right > 0;
            if (padding && valued) {
                // Parameters that do not fill up to 32 bytes have the value there, too.
                to[b] = reinterpret_cast<const uint8_t*>(&pad.paddingValue)[(b + sizeof(T) * 32 - left) % sizeof(T)];
            } else if (padding) {
                shim::ub.bytes[raw.at + at + b].known = false;  // "dummy" data
            }
        }
    }
}

template <typename T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyExtParams& p)
{
    shim::Op op(shim::MTE3, "DataCopyPad");
    detail::Extent(op, src, p);
    uint64_t n = p.blockLen, filled = (n + 31) / 32 * 32;
    for (uint64_t i = 0; i < p.blockCount; ++i) {
        const uint8_t* from = detail::Raw(src).Bytes(op, i * (filled + p.srcStride * 32), n, false);
        std::memcpy(dst.Bytes(op, i * (n + p.dstStride), n, true), from, n);
    }
}

}  // namespace AscendC
