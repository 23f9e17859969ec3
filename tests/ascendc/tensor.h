// LocalTensor and GlobalTensor: where an operand lies, and its bounds.
#pragma once

#include "types.h"

#define __aicore__
#define __global__
#define __vector__
#define __gm__
#define GM_ADDR uint8_t*

namespace AscendC {

template <typename T>
class LocalTensor {
public:
    LocalTensor() = default;
    LocalTensor(uint32_t at, uint32_t bytes) : at(at), bytes(bytes) {}
    uint32_t at = 0, bytes = 0;  // in the Unified Buffer

    LocalTensor operator[](uint32_t i) const
    {
        uint64_t skip = uint64_t(i) * sizeof(T);
        if (skip > bytes) {
            shim::Fail("element %u of a tensor of %zu", i, bytes / sizeof(T));
        }
        return {at + uint32_t(skip), bytes - uint32_t(skip)};
    }
    template <typename U>
    LocalTensor<U> ReinterpretCast() const
    {
        return {at, bytes};
    }
    T GetValue(uint32_t i) const
    {
        T value;
        shim::Op op(shim::S, "GetValue");
        std::memcpy(&value, Bytes(op, i, 1, false), sizeof(T));
        return value;
    }
    void SetValue(uint32_t i, T value) const
    {
        shim::Op op(shim::S, "SetValue");
        std::memcpy(Bytes(op, i, 1, true), &value, sizeof(T));
    }

    // Elements `i` on, which `op` reads or writes.
    uint8_t* Bytes(shim::Op& op, uint64_t i, uint64_t n, bool write) const
    {
        if ((i + n) * sizeof(T) > bytes) {
            shim::Fail("%s touches elements %llu to %llu of a tensor of %zu", op.name, (unsigned long long)i,
                       (unsigned long long)(i + n), bytes / sizeof(T));
        }
        uint64_t first = at + i * sizeof(T);
        return write ? op.Write(shim::ub, first, n * sizeof(T))
                     : const_cast<uint8_t*>(op.Read(shim::ub, first, n * sizeof(T)));
    }
    T Get(shim::Op& op, uint64_t i) const
    {
        T value;
        std::memcpy(&value, Bytes(op, i, 1, false), sizeof(T));
        return value;
    }
    void Set(shim::Op& op, uint64_t i, T value) const { std::memcpy(Bytes(op, i, 1, true), &value, sizeof(T)); }
    void Align(const shim::Op& op, uint32_t step = 32) const
    {
        if (at % step != 0) {
            shim::Fail("%s: an operand begins at byte %u of the Unified Buffer, no multiple of %u", op.name, at, step);
        }
    }
};

template <typename T>
class GlobalTensor {
public:
    void SetGlobalBuffer(T* data, uint64_t size)
    {
        memory = &shim::Find(data, size * sizeof(T));
        at = reinterpret_cast<uint8_t*>(data) - memory->data;
        bytes = size * sizeof(T);
    }
    GlobalTensor operator[](uint64_t i) const
    {
        GlobalTensor rest = *this;
        if (i * sizeof(T) > bytes) {
            shim::Fail("element %llu of a global tensor of %llu", (unsigned long long)i,
                       (unsigned long long)(bytes / sizeof(T)));
        }
        rest.at += i * sizeof(T);
        rest.bytes -= i * sizeof(T);
        return rest;
    }
    // `n` bytes from `skip` on, which `op` reads or writes.
    uint8_t* Bytes(shim::Op& op, uint64_t skip, uint64_t n, bool write) const
    {
        if (skip + n > bytes) {
            shim::Fail("%s touches bytes %llu to %llu of a global tensor of %llu", op.name, (unsigned long long)skip,
                       (unsigned long long)(skip + n), (unsigned long long)bytes);
        }
        return write ? op.Write(*memory, at + skip, n) : const_cast<uint8_t*>(op.Read(*memory, at + skip, n));
    }
    shim::Memory* memory = nullptr;
    uint64_t at = 0, bytes = 0;
};

inline int64_t GetBlockIdx() { return shim::core->block; }
inline int64_t GetBlockNum() { return shim::blocks; }

}  // namespace AscendC
